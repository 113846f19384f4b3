"""Tiny random-weight folders of the genuine classes."""
