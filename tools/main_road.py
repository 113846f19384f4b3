"""Count the functions that one training step of one pair passes: ``python -m tools.main_road``.

Runs ``inversion-dpo train`` for one step of one pair on the embedded model and notes every function
of the package that is entered. A function is a ``def`` of the package, nested ones included;
comprehensions and lambdas are left out, and so is what a thread reads ahead. ``--list`` names
them. Counted apart: the recipe alone, from ``recipe.train`` on, without the command line and the
checks before it; and the step alone, when everything is prepared.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import inversion_dpo
from inversion_dpo.cli.main import main as command

PACKAGE = Path(inversion_dpo.__file__).parent
SETTINGS = ("training.steps=1", "training.batch_size=1", "data.limit=4", "inversion.batch_size=8")
Place = tuple[str, int]  # file, first line


def definitions() -> dict[Place, str]:
    """Every ``def`` of the package: where it begins, and its name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[str(path), first] = node.name
    return found


class Road:
    """The functions entered so far, and those entered before the first step was taken."""

    def __init__(self) -> None:
        self.entered: set[Place] = set()
        self.until_step: set[Place] = set()
        self.recipe: set[Place] = set()  # of these, those since recipe.train was entered
        self.step: set[Place] = set()  # of these, those since step.step was entered

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take an event of ``sys.setprofile``."""
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return
        if event == "call":
            place = (code.co_filename, code.co_firstlineno)
            self.entered.add(place)
            of_recipe = code.co_qualname == "train" and place[0].endswith("training/recipe.py")
            if (of_recipe or self.recipe) and not self.until_step:
                self.recipe.add(place)
            of_step = code.co_qualname == "step" and place[0].endswith("training/step.py")
            if (of_step or self.step) and not self.until_step:
                self.step.add(place)
        if event == "return" and code.co_qualname == "step" and not self.until_step:
            if code.co_filename.endswith("training/step.py"):
                self.until_step = set(self.entered)


def walk() -> Road:
    """Train one step of one pair and return the functions that were entered."""
    road = Road()
    with TemporaryDirectory() as folder:
        sys.setprofile(road.note)
        try:
            command(["train", "--output", f"{folder}/run", *SETTINGS])
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.setprofile(None)
    return road


def main() -> None:
    """Print how many functions and files, and with ``--list`` which."""
    parser = argparse.ArgumentParser(description="Count the functions of one training step.")
    parser.add_argument("--list", action="store_true", help="name the functions, file by file")
    given, known, road = parser.parse_args(), definitions(), walk()
    for words, entered in (
        ("in the step alone, after preparation", road.step),
        ("in the recipe, until the first step is taken", road.recipe),
        ("until the first step is taken", road.until_step),
        ("in the whole command", road.entered),
    ):
        ours = entered & set(known)
        files = {file for file, _ in ours}
        print(f"{len(ours)} functions in {len(files)} files {words}")
    if given.list:
        names = defaultdict(list)
        for place in sorted(road.until_step & set(known)):
            names[str(Path(place[0]).relative_to(PACKAGE))].append(known[place])
        for file, functions in names.items():
            print(f"{file}: {', '.join(functions)}")


if __name__ == "__main__":
    main()
