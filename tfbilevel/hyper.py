"""The hyperparameters that `tb.HyperparameterTuner` can learn."""
