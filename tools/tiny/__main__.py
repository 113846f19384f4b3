"""``python -m tools.tiny NAME DIR``: write a tiny random folder of a model family or a scorer."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.tiny.pipelines import FAMILIES, write_tiny
from tools.tiny.scorers import WRITERS, write_tiny_scorer
from tools.tiny.vlm import write_tiny_vlm

VLM = "llava"


def main() -> None:
    """Parse the command line and write the folder."""
    names = [*FAMILIES, *WRITERS, VLM]
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny",
        description="Write a tiny folder of random weights in the classes of the published ones.",
    )
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        if given.name in FAMILIES:
            write_tiny(given.name, given.folder, given.seed)
        elif given.name in WRITERS:
            write_tiny_scorer(given.name, given.folder, given.seed)
        else:
            write_tiny_vlm(given.folder, given.seed)
    except FileExistsError as error:
        parser.error(str(error))
    print(given.folder)


if __name__ == "__main__":
    main()
