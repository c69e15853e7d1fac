"""Methods that penalise the lower problem instead of solving it."""
