"""Published settings: what each experiment's flags are filled in with."""
