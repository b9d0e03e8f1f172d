"""Evaluation in steps that leave files for one another: images, scores, comparison; and human judges' votes."""

import ncp  # noqa: F401  (keeps library notices off the screen)
