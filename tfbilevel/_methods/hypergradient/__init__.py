"""Methods that differentiate the lower solution."""
