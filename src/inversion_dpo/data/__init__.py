"""Preference pairs: reading, checking and turning images into pixels."""
