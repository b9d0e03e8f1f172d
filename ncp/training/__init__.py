"""Code that the training scripts share: settings, data, models, checkpoints, and the run itself."""
