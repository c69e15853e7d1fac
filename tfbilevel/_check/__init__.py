"""Checks of hypergradients and of TensorFlow's second derivatives."""
