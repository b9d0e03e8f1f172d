"""Noise-conditioned perceptual preference optimization: the method and the plumbing of the scripts."""

import logging
import os

__version__ = "0.1.0"

# Library notices that a newcomer reads as errors (a missing optional kernel, an absent torchvision) stay off the
# first screen; set these variables yourself to see them. Errors still come through.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
