"""Inverted trajectories: fill the cache, read it."""
