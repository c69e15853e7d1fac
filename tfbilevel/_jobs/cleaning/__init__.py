"""Find and correct wrong labels."""
