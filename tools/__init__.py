"""What made the embedded model, tiny pipelines and fixtures; not in the wheel."""
