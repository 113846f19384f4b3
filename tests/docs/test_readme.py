"""What the README says of the repository is true of it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "inversion_dpo"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def tree(text):
    """Names of the first fenced tree: those of the top, and those of the package."""
    block = re.search(r"```text\n(src/inversion_dpo/.*?)```", text, re.S)[1]
    split = [line.split("  ") for line in block.splitlines()]
    inner = [n for parts in split if not parts[0] for n in parts[1].split(", ")]
    return [n for parts in split if parts[0] for n in parts[0].split(", ")], inner


def folders(root):
    return {f"{p.name}/" for p in root.iterdir() if p.is_dir() and p.name[0] not in "._"}


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_the_tree_names_every_folder_and_nothing_else():
    top, inner = tree(README)
    assert {n for n in inner if n.endswith("/")} == folders(PACKAGE)
    assert all((PACKAGE / n).exists() for n in inner)
    assert all((ROOT / n).exists() for n in top)


def test_contributing_has_the_same_rooms():
    rooms = folders(PACKAGE) - {"assets/", "presets/"}
    assert {n for n in tree(CONTRIBUTING)[1] if n.endswith("/")} == rooms


def test_the_main_road_is_at_most_five_files_that_exist():
    line = re.search(r"`cli/main\.py` →.*", README)[0]
    road = re.findall(r"`([\w/]+\.py)`", line)
    assert 2 <= len(road) <= 5
    assert [n for n in road if not (PACKAGE / n).is_file()] == []


def test_the_recipe_calls_what_the_recipe_calls():
    block = re.search(r"```python\n(def train\(.*?)```", README, re.S)[1]
    called = set(re.findall(r"(\w+)\(", block)) - {"train", "range"}
    source = (PACKAGE / "training" / "recipe.py").read_text(encoding="utf-8")
    assert len(called) >= 6
    assert [name for name in sorted(called) if f"{name}(" not in source] == []


def test_paths_of_the_checklists_exist():
    named = re.findall(r"`((?:src|tests|tools|docs|benchmarks)/[\w/.-]+)`", CONTRIBUTING)
    assert len(named) > 20
    assert [n for n in named if not (ROOT / n).exists()] == []
