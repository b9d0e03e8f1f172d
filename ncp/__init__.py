"""Noise-conditioned perceptual preference optimization: the method, and the code that the scripts share."""

import logging
import os

__version__ = "0.1.0"

# Hides library notices that look like errors to a new user (a missing optional kernel, an absent torchvision). Set
# these variables yourself to see them. Errors are still shown.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
