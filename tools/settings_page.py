"""Write docs/reference/settings.md from the fields: ``python -m tools.settings_page``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from inversion_dpo.run.disk import atomic_text
from inversion_dpo.run.settings import Setting, every_setting, groups, written

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "settings.md"
HEAD = """# Settings

Commands take these settings; `--help` says which groups a command reads:

- `--config NAME` starts from a preset or your own YAML file. Without it, the preset is `taste`.
- `KEY=VALUE` after the command changes one setting, for example `training.steps=200`.
- `inversion-dpo config NAME` prints a preset as commented YAML to start from.

The column "Default" holds where neither your file nor the preset sets the key.

A setting that you change and that has no effect in your run is refused by its name. The column
"Needs" says when it has one; an empty cell sets no condition. There "A and B or C" means
"(A and B), or C", and a `*` stands for any text.

This page is made from `src/inversion_dpo/run/fields.py` by `python -m tools.settings_page`.
"""
COLUMNS = ["| Setting | What it is | Value | Default | Needs |", "|---|---|---|---|---|"]


def row(setting: Setting) -> str:
    """One line of a table."""
    cells = [
        f"`{setting.key}`",
        setting.text,
        setting.range,
        f"`{written(setting.default)}`",
        re.sub(r"\S+=\S+|\S+ other than \S+", r"`\g<0>`", setting.needs),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Write the whole page."""
    parts = [HEAD]
    for group, about in groups().items():
        rows = [row(s) for key, s in every_setting().items() if key.rpartition(".")[0] == group]
        linked = re.sub(r"docs/([\w/-]+\.md)", r"[\1](../\1)", about)
        parts.append("\n".join([f"## {group}", "", linked, "", *COLUMNS, *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    atomic_text(page(), PAGE)
    print(PAGE)
