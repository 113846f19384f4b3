"""The workshop of the embedded model."""
