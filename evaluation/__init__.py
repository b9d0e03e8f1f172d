"""Evaluation in steps that pass on files: images, scores, comparison; and human judges' votes."""

import ncp  # noqa: F401  (keeps library notices off the screen)
