"""Change the code in small ways and see whether a test notices: ``python -m tools.mutate``.

A *mutant* is a file with one small fault: ``+`` for ``-``, ``<`` for ``<=``, a winner for a loser.
It is *killed* if a test of the file's fails on it, and *survives* if none does. Mutants that change
nothing that can be observed are listed with their reason in ``tools/equivalent_mutants.toml``.

The parent imports everything once. For each mutant it forks, imports the changed source in place of
the file's, imports again what depends on it, and runs the file's tests. Nothing is written to the
source tree. Packages like mutmut and cosmic-ray start Python anew for each mutant or copy
the tree; importing torch alone takes longer than these tests.

    python -m tools.mutate [FILE ...] [--seed 0] [--limit N] [--output mutants.json] [--list]

FILE: one of those in ``TESTS``, all by default. limit: mutants of a file, drawn with the seed.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType

from tools.mutants import PACKAGE, Mutant, mutants_of

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
MATHS = ["maths/test_schedule.py", "maths/test_inversion.py", "maths/test_objectives.py"]
TESTS = {  # file of the package -> files in tests/unit that should notice a fault in it
    "maths/inversion.py": MATHS,
    "maths/beta.py": ["maths/test_objectives.py"],
    "maths/losses.py": [f"maths/test_{name}.py" for name in ("methods", "objectives", "authors")],
    "maths/methods.py": ["maths/test_methods.py"],
    "maths/records.py": ["maths/test_records.py", *MATHS],
    "maths/schedule.py": MATHS,
    "maths/targets.py": ["maths/test_targets.py", "maths/test_objectives.py"],
    "trajectories/cache.py": ["trajectories/test_cache.py", "trajectories/test_fill.py"],
    "trajectories/cost.py": ["trajectories/test_cost.py"],
    "trajectories/known.py": ["trajectories/test_known.py"],
    "trajectories/reading.py": ["trajectories/test_reading.py", "trajectories/test_cache.py"],
    "trajectories/storing.py": ["trajectories/test_storing.py", "trajectories/test_fill.py"],
    "trajectories/writing.py": ["trajectories/test_writing.py", "trajectories/test_fill.py"],
    "trajectories/key.py": ["trajectories/test_key.py"],
    "trajectories/fill.py": ["trajectories/test_shard.py", "trajectories/test_fill.py"],
    "trajectories/jobs.py": [
        "trajectories/test_jobs.py",
        "trajectories/test_shard.py",
        "trajectories/test_fill.py",
    ],
    "trajectories/sampling_back.py": ["trajectories/test_sampling_back.py"],
    "training/states.py": [
        "training/test_states.py",
        "training/test_step.py",
        "training/test_released.py",
        "maths/test_authors.py",
    ],
    "training/step.py": [
        "training/test_step.py",
        "training/test_step_parts.py",
        "training/test_released.py",
    ],
    "training/plan.py": ["training/test_plan.py", "training/test_released.py"],
    "training/session.py": ["training/test_session.py"],
    "training/recipe.py": ["training/test_recipe.py", "training/test_learning_rate.py"],
}
IMPORTS: dict[str, set[str]] = {}  # module of ours -> what it imports
SECONDS = 60  # of the processor, more than ten times what any file's tests take: an endless loop


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module before Python does, and executes other code in its place."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for the one module."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leave it to Python."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed code."""
        exec(self.code, module.__dict__)


def warm_up(files: Sequence[str], scratch: Path) -> None:
    """Import all that the tests import; a child imports again what depends on its mutant."""
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    sys.pycache_prefix = str(scratch / "pycache")  # nothing is written to the source tree
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    modules = {"inversion_dpo." + file[:-3].replace("/", ".") for file in TESTS}
    for name in sorted(modules | {"tests.conftest", "tools.stages", *THIRD}):
        importlib.import_module(name)
    for test in sorted({t for file in files for t in TESTS[file]}):
        spec = importlib.util.spec_from_file_location("_warm", ROOT / "tests" / "unit" / test)
        assert spec and spec.loader
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    IMPORTS.update((n, _imported(m)) for n, m in sys.modules.items() if _ours(m))
    gc.collect()
    gc.freeze()  # a child that walked through these objects would have to copy them


THIRD = ("diffusers", "transformers", "peft", "_pytest.assertion.rewrite")  # imported lazily


def forget(changed: str) -> None:
    """Forget a module and all of ours that import it, directly or not."""
    gone = {changed}
    while more := {name for name, used in IMPORTS.items() if used & gone} - gone:
        gone |= more
    for name in gone:
        sys.modules.pop(name, None)
        package, _, own = name.rpartition(".")
        if package in sys.modules:  # else `from package import name` finds the old module there
            vars(sys.modules[package]).pop(own, None)


def _ours(module: ModuleType) -> bool:
    file = Path(getattr(module, "__file__", None) or "/")
    return file.is_relative_to(ROOT) and file.suffix == ".py" and "site-packages" not in file.parts


def _imported(module: ModuleType) -> set[str]:
    """Names of the modules that a module's source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def passes(tests: Sequence[str], mutant: Mutant | None, scratch: Path) -> bool:
    """Whether all tests of a file pass, in a child process, with the mutant in its place."""
    child = os.fork()
    if not child:
        _run(tests, mutant, scratch)
    return os.waitpid(child, 0)[1] == 0


def _run(tests: Sequence[str], mutant: Mutant | None, scratch: Path) -> None:
    """Run as the child: never return."""
    code = 1
    try:
        gc.disable()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(10 * SECONDS)  # for one that waits and does nothing
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        if mutant:
            name = "inversion_dpo." + mutant.file[:-3].replace("/", ".")
            forget(name)
            sys.meta_path.insert(0, Changed(name, PACKAGE / mutant.file, mutant.code))
        import pytest

        quick = ["-x", "-q", "-p", "no:cacheprovider"]
        quick += ["--basetemp", str(scratch / "temp")]
        code = int(pytest.main([*quick, *(f"tests/unit/{test}" for test in tests)]))
    finally:
        os._exit(code)


def equivalent() -> dict[str, str]:
    """Mutants that change nothing that can be observed, each with the reason."""
    groups = tomllib.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    return {name: reason for group in groups.values() for name, reason in group.items()}


def used() -> float:
    """Seconds of the processor, the children's."""
    times = os.times()
    return times.children_user + times.children_system


@dataclass(frozen=True)
class Tally:
    """What became of the mutants of one file; ``survived`` by name, processor seconds."""

    file: str
    mutants: int
    tried: int
    killed: int
    equivalent: int
    survived: list[str]
    seconds: float

    @property
    def share(self) -> float:
        """Killed, of those tried that are not equivalent."""
        return self.killed / max(1, self.tried - self.equivalent)


def try_file(file: str, limit: int | None, seed: int, scratch: Path) -> Tally:
    """Try the mutants of one file; the tests have to pass on the file as it is."""
    begun, known, every = used(), equivalent(), mutants_of(file)
    if not passes(TESTS[file], None, scratch):
        raise SystemExit(f"{file}: {', '.join(TESTS[file])} fail without any mutant")
    chosen = every
    if limit is not None and limit < len(every):
        chosen = sorted(random.Random(seed).sample(every, limit), key=every.index)
    killed, same, survived = 0, 0, []
    for mutant in chosen:
        if mutant.name in known:
            same += 1
        elif passes(TESTS[file], mutant, scratch):
            survived.append(mutant.name)
            print_now(f"  survived {mutant.file}:{mutant.line} {mutant.name.partition(' ')[2]}")
        else:
            killed += 1
    seconds = round(used() - begun, 1)
    return Tally(file, len(every), len(chosen), killed, same, survived, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try mutants of the files and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="default: all of TESTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="mutants of a file; default: all")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    parser.add_argument("--list", action="store_true", help="name the mutants, try none")
    options = parser.parse_args(arguments)
    files = options.files or list(TESTS)
    if unknown := set(files) - set(TESTS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(TESTS)}")
    if options.list:
        for file in files:
            print(*(f"{m.line} {m.name}" for m in mutants_of(file)), sep="\n")
        return
    scratch, output = Path(tempfile.mkdtemp(prefix="mutants-")), options.output.absolute()
    tallies = []
    try:
        warm_up(files, scratch)
        for file in files:
            tally = try_file(file, options.limit, options.seed, scratch)
            tallies.append(tally)
            print_now(row_of(tally))
            output.write_text(json.dumps([asdict(t) for t in tallies], indent=1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(row_of(total_of(tallies)))


def print_now(text: str) -> None:
    """Print a line at once, also into a file."""
    print(text, flush=True)


def total_of(tallies: Sequence[Tally]) -> Tally:
    """Sum over all files."""
    return Tally(
        file="all",
        mutants=sum(t.mutants for t in tallies),
        tried=sum(t.tried for t in tallies),
        killed=sum(t.killed for t in tallies),
        equivalent=sum(t.equivalent for t in tallies),
        survived=[name for t in tallies for name in t.survived],
        seconds=round(sum(t.seconds for t in tallies), 1),
    )


def row_of(t: Tally) -> str:
    """One line of the table."""
    counts = f"{t.mutants} mutants, {t.tried} tried: {t.killed} killed, {len(t.survived)} survived"
    return f"{t.file}: {counts}, {t.equivalent} equivalent; {t.share:.0%} in {t.seconds} s"


if __name__ == "__main__":
    main()
