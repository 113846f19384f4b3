"""The embedded world: scene graphs, renderer, captions and an exact checker."""
