"""Scorers: images and their prompts to one number each; ``registry`` has them by name."""
