"""Keras optimizers as pure update rules, and what inner steps add to them."""
