"""Adapters from a model family to the few things that training needs, and what is trained."""
