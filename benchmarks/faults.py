"""Break runs on purpose and see that nothing is lost: ``python benchmarks/faults.py``.

A tiny random pipeline and a few pairs go through ``pairs build``, ``invert``, ``train`` and
``evaluate`` undisturbed; then every command is killed at random moments and started again, files
are spoiled, disks fill. In the end the artefacts must be those of the undisturbed run, byte for
byte (measured seconds and memory aside). Prints the table of docs/explanation/reliability.md;
exits with 1 if anything was lost. Every command is the real one, run in a child forked from a
process that has the imports behind it, so that moments are spent on the work. Full disks and
read-only folders need
``mount``, that is root; where it is refused, the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    ARROW_DEFAULT_MEMORY_POOL="system",  # the server that children are forked from has no threads
)

from inversion_dpo.cli import main as cli

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["inversion_dpo.training.step", "inversion_dpo.making_pairs.build"])
Child = multiprocessing.context.ForkServerProcess

SETTINGS = (
    "data.limit=24",
    "data.holdout=0.25",
    "inversion.steps=4",
    "inversion.batch_size=4",
    "inversion.t_start=0",
    "objective.t_min=0.25",
    "objective.t_max=1",
    "policy.rank=4",
    "policy.alpha=4",
    "policy.target_modules=[to_v,to_out.0]",
    "training.steps=10",
    "training.batch_size=4",
    "training.eval_every=5",
    "training.checkpoint_every=2",
    "training.learning_rate=1e-3",
    "training.tracker=none",
    "evaluation.limit=12",
    "evaluation.batch_size=2",
    "evaluation.sample_steps=2",
)
SHARES = {"pairs build": 0.1, "invert": 0.35, "train": 0.35, "evaluate": 0.2}  # of the kills
VOLATILE = {"seconds", "peak_memory_mb"}
Row = tuple[str, int, str]


def command(words: list[str], log: str) -> None:
    """Run as a child: the command, its words into a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    cli.main(words)


def start(*words: object, log: Path | None = None) -> Child:
    """Begin the command in a process forked from a server that only has imported."""
    child = CONTEXT.Process(target=command, args=([str(w) for w in words], str(log or os.devnull)))
    child.start()
    return child


def finish(child: Child, limit: float = 120.0) -> int:
    """Exit code of a child; minus the signal that ended it."""
    child.join(limit)
    if child.exitcode is None:
        child.kill()
        raise RuntimeError(f"a command did not end within {limit:g} s")
    return child.exitcode


def run(*words: object, log: Path | None = None) -> int:
    """Run the command to its end."""
    return finish(start(*words, log=log))


def killed(seconds: float, *words: object) -> bool:
    """Start the command and kill it after so long; whether it was still running."""
    child = start(*words)
    child.join(seconds)
    child.kill()
    return finish(child) == -signal.SIGKILL


def steady(path: Path) -> bytes:
    """Read a file's bytes, without measured seconds and memory where it is a log."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    rows = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if (path.suffix == ".jsonl")
        else json.loads(path.read_text())
    )

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in VOLATILE | {"checksum"}}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return json.dumps(clean(rows)).encode()


def artefacts(folder: Path) -> dict[str, str]:
    """Relative path -> hash of everything that a run leaves."""
    own = (".lock", "seconds.json")
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in own]
    return {str(p.relative_to(folder)): hashlib.sha256(steady(p)).hexdigest() for p in files}


def differences(folder: Path, whole: Path) -> list[str]:
    """Files that differ between two runs, or that only one of them has."""
    a, b = artefacts(folder), artefacts(whole)
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def verdict(folder: Path, whole: Path) -> str:
    """Word the outcome for a table."""
    found = differences(folder, whole)
    return f"LOST: {', '.join(found[:3])}" if found else "same bytes"


class Bench:
    """The commands of one run and the undisturbed results."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.model = root / "model"
        words = [sys.executable, "-m", "tools.tiny", "sd15", str(self.model)]
        subprocess.run(words, cwd=Path(__file__).parents[1], check=True, capture_output=True)
        self.whole = root / "whole"
        self.settings = [f"model.path={self.model}", *SETTINGS]
        self.seconds: dict[str, float] = {}
        for stage in SHARES:
            begun = time.monotonic()
            if code := run(*self.command(stage, self.whole), log=root / "log"):
                raise SystemExit(f"{stage} failed ({code}):\n{(root / 'log').read_text()[-3000:]}")
            self.seconds[stage] = time.monotonic() - begun

    def command(self, stage: str, folder: Path) -> list[object]:
        """List the words of a stage on a folder."""
        if stage == "pairs build":
            preset = self.root / "preset.yaml"  # the embedded model: noise makes no pairs
            preset.write_text("evaluation:\n  sample_steps: 3\n  guidance_scale: 1.0\n")
            target = folder.with_name(folder.name + "-pairs")
            return ["pairs", "build", "-o", target, "-c", preset, "--prompts", 128, "--samples", 2]
        if stage == "evaluate":
            return ["evaluate", folder]
        return [stage, "-o", folder, *self.settings]

    def folder(self, name: str, until: str | None = None) -> Path:
        """Make a fresh folder: a copy of the undisturbed run up to a stage."""
        target = self.root / name
        shutil.rmtree(target, ignore_errors=True)
        if until:
            shutil.copytree(self.whole, target)
            shutil.rmtree(target / "samples", ignore_errors=True)
            for name_ in ("metrics.json", "per_prompt.parquet"):
                (target / name_).unlink(missing_ok=True)
            if until == "invert":
                for name_ in ("checkpoints", "adapter"):
                    shutil.rmtree(target / name_)
                (target / "metrics.jsonl").unlink()
        return target

    def kills(self, stage: str, count: int) -> Row:
        """Kill a stage at random moments until ``count`` kills struck, in runs of up to 8."""
        previous = {"train": "invert", "evaluate": "train"}.get(stage)
        struck = runs = 0
        outcome = "same bytes"
        while struck < count and outcome == "same bytes":
            runs += 1
            folder = self.folder(f"killed-{stage.replace(' ', '-')}", previous)
            extra = folder.with_name(folder.name + "-pairs")
            shutil.rmtree(extra, ignore_errors=True)
            for _ in range(min(8, count - struck)):
                moment = self.random.uniform(0.05, 0.8) * self.seconds[stage]
                struck += killed(moment, *self.command(stage, folder))
            code = run(*self.command(stage, folder), log=self.root / "log")
            if code:
                outcome = f"LOST: exit {code}: {(self.root / 'log').read_text()[-300:]}"
            elif stage == "pairs build":
                outcome = verdict(extra, self.whole.with_name("whole-pairs"))
            else:
                outcome = self._compare(stage, folder)
        return f"SIGKILL during {stage}", struck, f"{outcome} ({runs} runs completed)"

    def _compare(self, stage: str, folder: Path, stopped: bool = False) -> str:
        """Compare with the whole run; a stop may leave its own checkpoint as the best."""
        if stage == "invert":
            return verdict(folder / "cache", self.whole / "cache")
        if stage == "train":
            missing = {"metrics.json", "per_prompt.parquet"} | {
                str(p.relative_to(self.whole)) for p in self.whole.rglob("samples/*")
            }
            left = [d for d in differences(folder, self.whole) if d not in missing]
            if stopped:
                left = [d for d in left if not d.startswith("checkpoints") or "step-000010" in d]
            return f"LOST: {left[:3]}" if left else "same bytes"
        return verdict(folder, self.whole)


def spoil(path: Path, how: str) -> None:
    """Cut a file short, or flip one of its bits."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) * 2 // 3] ^= 1
    path.write_bytes(bytes(data))


def damage(bench: Bench) -> Iterator[Row]:
    """Cut and flip shards, checkpoints, samples: named, then rebuilt or passed over."""
    kinds = {
        "cache shard": "cache/*/shard-00002.safetensors",
        "checkpoint weights": "checkpoints/step-000010/policy.safetensors",
        "checkpoint moments": "checkpoints/step-000010/optimizer.safetensors",
        "checkpoint state": "checkpoints/step-000010/state.json",
        "samples": "samples/policy-*.parquet",
    }
    for kind, pattern in kinds.items():
        for how in ("truncated", "bit-flipped"):
            folder = bench.root / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(bench.whole, folder)
            path = next(folder.glob(pattern))
            spoil(path, how)
            stage, log = "evaluate" if kind == "samples" else "train", bench.root / "log"
            code = run(*bench.command(stage, folder), log=log)
            named = path.name in log.read_text() or path.parent.name in log.read_text()
            outcome = verdict(folder, bench.whole) if not code else f"LOST: exit {code}"
            yield f"{how} {kind}", 1, outcome + (", named" if named else ", NOT NAMED: LOST")


def terminated(bench: Bench, count: int) -> Row:
    """SIGTERM at random moments: exit code 0 within the grace time, then resumed."""
    slowest, struck, outcome = 0.0, 0, "same bytes"
    while struck < count and outcome == "same bytes":
        folder, log = bench.folder("terminated"), bench.root / "log"
        for _ in range(3):
            child = start(*bench.command("train", folder), log=log)
            time.sleep(bench.random.uniform(0.2, 0.8) * bench.seconds["train"])
            if child.exitcode is not None:
                break
            begun = time.monotonic()
            child.terminate()
            code = finish(child)
            slowest, struck = max(slowest, time.monotonic() - begun), struck + 1
            if code:
                text = f"LOST: exit {code}: {log.read_text()[-300:]}"
                return "SIGTERM during train", struck, text
        code = run(*bench.command("train", folder), log=log)
        outcome = bench._compare("train", folder, True) if not code else f"LOST: exit {code}"
    return "SIGTERM during train", struck, f"{outcome}, exit 0 within {slowest:.1f} s"


def two_runs(bench: Bench) -> Row:
    """Refuse a second run on a folder, the first unharmed; a stale lock holds nobody up."""
    folder, log = bench.folder("shared"), bench.root / "log2"
    first = start(*bench.command("train", folder))
    while not (folder / "config.yaml").exists():
        time.sleep(0.01)
    code = run(*bench.command("train", folder), log=log)
    refused = code == 2 and "in use by another run" in log.read_text()
    good = finish(first) == 0 and refused
    return (
        "two runs on one folder",
        1,
        (
            f"second refused, first: {bench._compare('train', folder)}"
            if good
            else "LOST: not refused"
        ),
    )


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """Mount a tmpfs on a folder, if this user may mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def disk_full(bench: Bench, stage: str, until: str | None, spare: int) -> Row:
    """Fill a disk while a stage writes: one line, exit 2; with room again, the same bytes."""
    name = {"invert": "a cache shard", "train": "a checkpoint"}[stage]
    with mounted(bench.root / "small", "size=64m") as possible:
        if not possible:
            return f"disk full during {name}", 0, "not tried: mounting is not allowed here"
        folder, log = bench.root / "small/run", bench.root / "log"
        if until:
            shutil.copytree(bench.folder("source", until), folder)
        filler = bench.root / "small/filler"
        room = shutil.disk_usage(bench.root / "small").free - spare
        filler.write_bytes(bytes(room))
        code, text = run(*bench.command(stage, folder), log=log), log.read_text()
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        clear = code == 2 and len(errors) == 1 and "No space left" in errors[0]
        filler.unlink()
        again = run(*bench.command(stage, folder), log=log)
        if not clear or again:
            return f"disk full during {name}", 1, f"LOST: exit {code}, {again}: {text[-300:]}"
        outcome = bench._compare(stage, folder)
        return f"disk full during {name}", 1, f"one line; with room again {outcome}"


def read_only(bench: Bench) -> Row:
    """Forbid writing to a folder: one line, exit 2, everything intact."""
    with mounted(bench.root / "locked", "size=64m") as possible:
        if not possible:
            return "read-only folder", 0, "not tried: mounting is not allowed here"
        folder, log = bench.root / "locked/run", bench.root / "log"
        shutil.copytree(bench.whole, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(bench.root / "locked")], check=True)
        code, text = run(*bench.command("train", folder), log=log), log.read_text()
        clear = code == 2 and "Read-only file system" in text and "Traceback" not in text
        outcome = verdict(folder, bench.whole) if clear else f"LOST: exit {code}: {text[-300:]}"
        return "read-only folder", 1, f"one line; {outcome}"


def main() -> None:
    """Print the table; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all, over four stages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seed)
        kills = {stage: round(share * arguments.kills) for stage, share in SHARES.items()}
        jobs: list[Callable[[], Row]] = [
            *((lambda s=s: bench.kills(s, kills[s])) for s in SHARES),
            lambda: terminated(bench, 10),
            lambda: two_runs(bench),
            lambda: disk_full(bench, "invert", None, 60_000),
            lambda: disk_full(bench, "train", "invert", 150_000),
            lambda: read_only(bench),
        ]
        taken = ", ".join(f"{stage} {s:.1f} s" for stage, s in bench.seconds.items())
        print(f"undisturbed: {taken}\n", flush=True)
        print("| fault | times | what happened |\n|---|---|---|", flush=True)
        lost = False
        for rows in (*(iter([job()]) for job in jobs), damage(bench)):
            for what, times, outcome in rows:
                print(f"| {what} | {times} | {outcome} |", flush=True)
                lost |= "LOST" in outcome
    raise SystemExit(int(lost))


if __name__ == "__main__":
    main()
