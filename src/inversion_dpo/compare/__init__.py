"""Compare methods on the same pairs, model, compute and prompts: ``inversion-dpo compare``."""
