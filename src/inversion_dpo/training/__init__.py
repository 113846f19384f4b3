"""Train a policy on preference pairs."""
