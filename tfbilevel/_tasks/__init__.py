"""Many tasks as one problem; the only place that knows how tasks are mapped."""
