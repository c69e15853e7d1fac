"""Published settings, the defaults of the experiments' flags."""
