"""The embedded world of coloured shapes: a scorer and a prompt set."""
