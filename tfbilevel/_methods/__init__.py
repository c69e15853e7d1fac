"""All bilevel methods, one per file."""
