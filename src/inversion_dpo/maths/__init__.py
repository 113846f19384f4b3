"""The mathematics: torch only."""
