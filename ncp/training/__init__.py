"""What the training scripts share around the method: settings, data, models, checkpoints, and the run itself."""
