"""Methods that penalise a lower problem that is not solved."""
