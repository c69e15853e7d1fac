"""Learn continuous hyperparameters in one training run."""
