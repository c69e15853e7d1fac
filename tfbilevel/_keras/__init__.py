"""The library's interface for Keras users."""
