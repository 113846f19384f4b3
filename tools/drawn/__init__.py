"""The workshop of the drawn pictures: emoji by two hands."""
