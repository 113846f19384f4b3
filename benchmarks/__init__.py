"""Measurements; not in the wheel."""
