"""One HTML page about what a job found."""
