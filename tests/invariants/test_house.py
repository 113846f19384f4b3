"""The rules of the house, read off the source tree.

Each rule is a pure function from source text to complaints; a test applies it to every file, and
once to a small offender, so that a rule that has stopped biting is noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "inversion_dpo"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_PARAMETERS = 6
EXPLAINED = {"maths", "trajectories", "models"}  # rooms in which each argument is explained
PURE = sorted(f"maths/{p.name}" for p in (PACKAGE / "maths").glob("*.py"))
# Arrows between rooms point down this list only.
LAYERS = (
    "__main__",
    "__init__",
    "cli",
    "api",
    "compare",
    "web",
    "labels",
    "making_pairs",
    "evaluation",
    "training",
    "trajectories",
    "models",
    "data",
    "world",
    "graphs",
    "maths",
    "run",
)

# The embedded world is data and a scorer: these two alone know it.
WORLD_REGISTRIES = {"evaluation/prompt_sets.py", "evaluation/scorers/registry.py"}

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec"}
FORBIDDEN_SWITCHES = {"trust_remote_code", "allow_pickle"}

# Written with its parts apart, so that this file does not match itself.
MACHINE_PATH = re.compile(
    "|".join([r"(?<![\w.~-])/" + r"work/\w", "/" + "farm/", r"\.\./" + r"(?:shared|\.library)\b"])
)


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Absolute dotted names that a module imports; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(package + ".")


def impurities(tree: ast.AST, module: str) -> list[str]:
    """Imports other than torch, the standard library and ``maths`` itself."""
    return [
        name
        for name in sorted(imports(tree, module))
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        and not within(name, "inversion_dpo.maths")
    ]


def room_of(name: str) -> str:
    """The folder or single file of the package that a dotted name lies in."""
    return [*name.split("."), ""][1] or "__init__"


def arrows(tree: ast.AST, module: str, is_package: bool = False) -> set[tuple[str, str]]:
    """(from, to) for each room of the package that a module imports, its own left out."""
    ours = {n for n in imports(tree, module, is_package) if within(n, "inversion_dpo")}
    here = room_of(module)
    return {(here, room_of(n)) for n in ours if room_of(n) in LAYERS and room_of(n) != here}


def upward(found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Arrows that do not point down the list of layers."""
    return sorted((a, b) for a, b in found if LAYERS.index(a) > LAYERS.index(b))


def circles(wanted: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others, by name -> names it imports.

    ``from a import b`` counts for ``a`` where ``a.b`` is no module.
    """

    def module(name: str) -> str:
        return name if name in wanted or not name else module(name.rpartition(".")[0])

    known = {m: {module(n) for n in names} - {m, ""} for m, names in wanted.items()}
    while True:
        imported = set().union(*known.values())
        left = {m: n & known.keys() for m, n in known.items() if n & known.keys() and m in imported}
        if left == known:
            return sorted([m, *sorted(names)] for m, names in known.items())
        known = left


def outsiders(names: set[str], path: str) -> set[str]:
    """Modules of ``world`` that a file outside of it imports without being a registry."""
    if path.startswith("world/") or path in WORLD_REGISTRIES:
        return set()
    return {name for name in names if within(name, "inversion_dpo.world")}


def unsafe(tree: ast.AST) -> list[str]:
    """Pickles, code from strings, code from a model repository."""
    found = [
        name
        for name in sorted(imports(tree, "inversion_dpo"))
        if name.split(".")[0] in PICKLING_MODULES or name in FORBIDDEN_CALLS
    ]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_SWITCHES:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"line {node.value.lineno}: {node.arg}")
    return found


def own_renames(tree: ast.AST) -> list[str]:
    """Files that a module gives their names itself, which ``run/disk`` does."""
    moves = {"os.replace", "os.rename", "shutil.move"}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, texts = ast.unparse(node.func), ast.unparse(node)
        named = name.endswith((".with_name", ".with_suffix")) and ".partial" in texts
        if name in moves or name.endswith(".rename") or named:
            found.append(f"line {node.lineno}: {texts}")
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, methods and nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def overlong(tree: ast.AST) -> list[str]:
    """Functions of more lines than the house allows, from `def` to the last line."""
    lengths = {
        f"line {node.lineno}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in functions(tree)
    }
    return [f"{name}, {n} lines" for name, n in lengths.items() if n > MAX_FUNCTION_LINES]


def overloaded(tree: ast.AST) -> list[str]:
    """Functions of more parameters than the house allows; ``self`` and ``cls`` are not counted."""
    found = []
    for node in functions(tree):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(parameter.arg not in ("self", "cls") for parameter in given)
        if count > MAX_PARAMETERS:
            found.append(f"line {node.lineno}: {node.name}, {count} parameters")
    return found


def undocumented(tree: ast.Module | ast.ClassDef) -> list[str]:
    """Public functions, classes and methods without a docstring."""
    found = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            found.append(f"line {node.lineno}: {node.name}")
        if isinstance(node, ast.ClassDef):
            found += undocumented(node)
    return found


def unexplained(tree: ast.Module) -> list[str]:
    """Public functions of more than two parameters whose docstring has no Args."""
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    return [
        f"{node.name} (line {node.lineno})"
        for node in public
        if len(node.args.args) + len(node.args.kwonlyargs) > 2
        and "Args:" not in (ast.get_docstring(node) or "")
    ]


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def offenders(
    rule: Callable[[ast.Module], list[str]], paths: list[Path] = SOURCES
) -> dict[str, list[str]]:
    """The complaints of a rule by file, without the files that have none."""
    found = {path.relative_to(ROOT).as_posix(): rule(parsed(path)) for path in paths}
    return {name: complaints for name, complaints in found.items() if complaints}


def text_files() -> list[Path]:
    """Files that git tracks or would add, those that are text."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def test_the_package_is_found() -> None:
    assert SOURCES


def test_nothing_unpickles_or_runs_strings() -> None:
    assert offenders(unsafe) == {}


def test_one_place_gives_files_their_names() -> None:
    paths = [*SOURCES, *sorted((ROOT / "tools").rglob("*.py"))]
    paths.remove(PACKAGE / "run" / "disk.py")
    assert offenders(own_renames, paths) == {}


def test_the_mathematics_imports_torch_and_types_only() -> None:
    paths = [PACKAGE / name for name in PURE]
    assert paths
    assert {p.name: i for p in paths if (i := impurities(parsed(p), module_of(p)))} == {}


def test_every_room_has_its_layer() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    files = {p.stem for p in PACKAGE.glob("*.py")}
    assert rooms | files == set(LAYERS)
    assert files == {"__init__", "__main__", "api"}
    assert len([p for p in PACKAGE.iterdir() if not p.name.startswith("_")]) + 2 <= 24


def test_arrows_point_down() -> None:
    found: set[tuple[str, str]] = set()
    for path in SOURCES:
        found |= arrows(parsed(path), module_of(path), path.name == "__init__.py")
    assert upward(found) == []


def test_no_modules_import_each_other() -> None:
    paths = {module_of(path): path for path in SOURCES if path.name != "__init__.py"}
    assert circles({name: imports(parsed(path), name) for name, path in paths.items()}) == []


def test_the_embedded_world_stands_behind_two_registries() -> None:
    found = {
        name
        for path in SOURCES
        if outsiders(
            imports(parsed(path), module_of(path), path.name == "__init__.py"),
            name := path.relative_to(PACKAGE).as_posix(),
        )
    }
    assert found == set()


def test_functions_and_files_are_short() -> None:
    assert offenders(overlong) == {}
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_have_few_parameters() -> None:
    commands = PACKAGE / "cli"  # typer makes an option of each parameter
    assert offenders(overloaded, [p for p in SOURCES if p.parent != commands]) == {}


def test_what_is_public_has_a_docstring() -> None:
    assert offenders(undocumented) == {}


def test_arguments_are_explained() -> None:
    paths = [p for p in SOURCES if p.parent.name in EXPLAINED or p.stem == "api"]
    assert offenders(unexplained, paths) == {}


def test_unexplained_bites() -> None:
    assert unexplained(ast.parse("def f(a, b, *, c):\n    'Add.'")) == ["f (line 1)"]
    assert unexplained(ast.parse("def f(a, b):\n    'Add.'")) == []


def test_no_file_names_a_path_of_one_machine() -> None:
    hits = []
    for path in text_files():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if MACHINE_PATH.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert hits == []


def test_no_command_left_a_folder_named_by_a_setting() -> None:
    """As a run does whose --output was left out before KEY=VALUE."""
    names = [path.relative_to(ROOT).as_posix() for path in text_files()]
    assert [name for name in names if "=" in name] == []


@pytest.mark.parametrize(
    "offender",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nstate = torch.load('x.pt')",
        "from torch import load",
        "load(name, trust_remote_code=True)",
        "load(name, trust_remote_code=flag)",
        "value = eval('1 + 1')",
        "exec('x = 1')",
    ],
)
def test_unsafe_bites(offender: str) -> None:
    assert unsafe(ast.parse(offender))


@pytest.mark.parametrize(
    "offender",
    [
        "os.replace(partial, path)",
        "partial.rename(path)",
        "shutil.move(partial, path)",
        "part = path.with_name(path.name + '.partial')",
        "part = path.with_name(f'{path.name}.{os.getpid()}.partial')",
        "part = path.with_suffix('.partial')",
    ],
)
def test_own_renames_bites(offender: str) -> None:
    assert own_renames(ast.parse(offender))


def test_own_renames_spares_a_look_at_names() -> None:
    assert own_renames(ast.parse("[p for p in folder.glob('*.partial') if p.suffix]")) == []


@pytest.mark.parametrize(
    "innocent", ["model.eval()", "load(name, trust_remote_code=False)", "'no pickle, no eval( )'"]
)
def test_unsafe_spares(innocent: str) -> None:
    assert unsafe(ast.parse(innocent)) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import numpy as np", ["numpy"]),
        ("from ..training import step", ["inversion_dpo.training.step"]),
        ("from inversion_dpo.run import disk", ["inversion_dpo.run.disk"]),
        ("import math\nimport torch.nn.functional as F\nfrom torch import Tensor", []),
        ("from inversion_dpo.maths.records import Pair\nfrom .records import Pair", []),
        ("from inversion_dpo.maths import records", []),
    ],
)
def test_impurities_bites(line: str, expected: list[str]) -> None:
    assert impurities(ast.parse(line), "inversion_dpo.maths.schedule") == expected


@pytest.mark.parametrize(
    ("line", "module", "is_package", "rises"),
    [
        ("from inversion_dpo.evaluation import report", "inversion_dpo.training.step", False, True),
        ("from ..evaluation.metrics import wilson", "inversion_dpo.models.sampler", False, True),
        ("from ..web import page", "inversion_dpo.evaluation", True, True),
        ("import inversion_dpo.web.page", "inversion_dpo.evaluation.report", False, True),
        ("from inversion_dpo import api", "inversion_dpo.run.disk", False, True),
        ("from inversion_dpo.evaluation import report", "inversion_dpo.cli.main", False, False),
        ("from . import metrics", "inversion_dpo.evaluation", True, False),
        ("from .metrics import wilson", "inversion_dpo.evaluation.report", False, False),
    ],
)
def test_upward_bites(line: str, module: str, is_package: bool, rises: bool) -> None:
    assert bool(upward(arrows(ast.parse(line), module, is_package))) is rises


def test_circles_bites() -> None:
    wanted = {"p.a": {"p.b.f", "torch"}, "p.b": {"p.c"}, "p.c": {"p.a.g", "p.d"}, "p.d": set()}
    wanted |= {"p.e": {"p.a"}}
    assert circles(wanted) == [["p.a", "p.b"], ["p.b", "p.c"], ["p.c", "p.a"]]
    assert circles(wanted | {"p.c": {"p.d"}}) == []


@pytest.mark.parametrize(
    ("line", "path", "refused"),
    [
        ("from inversion_dpo.world.captions import parse_caption", "making_pairs/build.py", True),
        ("from inversion_dpo import world", "compare/rounds.py", True),
        ("from .scorers.registry import load_scorers", "evaluation/evaluate.py", False),
        ("import inversion_dpo.world.checker", "evaluation/scorers/registry.py", False),
    ],
)
def test_outsiders_bites(line: str, path: str, refused: bool) -> None:
    assert bool(outsiders(imports(ast.parse(line), "inversion_dpo.x.y"), path)) is refused


def test_overlong_bites_at_the_limit() -> None:
    def of_length(lines: int) -> ast.Module:
        return ast.parse("def f():\n" + "    x = 1\n" * (lines - 1))

    assert overlong(of_length(MAX_FUNCTION_LINES)) == []
    assert overlong(of_length(MAX_FUNCTION_LINES + 1)) == [
        f"line 1: f, {MAX_FUNCTION_LINES + 1} lines"
    ]


def test_overloaded_bites_at_the_limit() -> None:
    assert overloaded(ast.parse("class C:\n    def f(self, a, b, c, d, e, *, f): ...")) == []
    assert overloaded(ast.parse("def f(a, b, c, d, e, *, f, g): ...")) == [
        "line 1: f, 7 parameters"
    ]


def test_undocumented_bites() -> None:
    source = "def f(): ...\ndef _g(): ...\nclass C:\n    'About C.'\n    def m(self): ...\n"
    assert undocumented(ast.parse(source)) == ["line 1: f", "line 5: m"]


@pytest.mark.parametrize(
    ("root", "rest"), [("/work", "/main"), ("/farm", "/x"), ("..", "/shared"), ("..", "/.library")]
)
def test_machine_path_bites(root: str, rest: str) -> None:
    assert MACHINE_PATH.search(f'path = "{root}{rest}"')
    assert not MACHINE_PATH.search(f"https://example.org{root}-{rest}")


def test_machine_path_spares_addresses() -> None:
    assert not MACHINE_PATH.search("https://example.org" + "/work" + "/main")
