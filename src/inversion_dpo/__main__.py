"""``python -m inversion_dpo``."""

from inversion_dpo.cli.main import main

main()
