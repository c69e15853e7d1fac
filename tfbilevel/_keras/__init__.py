"""The library as Keras users meet it."""
