"""People's choices: stored, counted, exported."""
