"""Keras optimizers as pure update rules, and extensions for inner steps."""
