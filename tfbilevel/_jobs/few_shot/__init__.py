"""Learn initial weights that adapt to new classes from few examples."""
