"""Settings, folders, files and processes of a run."""
