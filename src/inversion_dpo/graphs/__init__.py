"""Scene graphs."""
