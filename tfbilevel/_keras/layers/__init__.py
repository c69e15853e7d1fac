"""Keras layers that serve as upper models, one per file."""
