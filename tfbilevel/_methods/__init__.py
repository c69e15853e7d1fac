"""Every bilevel method, one in a file."""
