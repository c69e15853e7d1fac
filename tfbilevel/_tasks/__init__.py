"""Many tasks as one problem; only this package knows how tasks are mapped."""
