"""``python -m inversion_dpo``."""

from inversion_dpo.cli import main

main()
