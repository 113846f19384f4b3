"""Kill launches of two processes: ``python benchmarks/faults_launched.py``.

``accelerate launch`` with two processes on CPUs (gloo) inverts and trains a tiny random pipeline.
At random moments of the work one of its processes, the launcher, or all of them at once get
SIGKILL; the launcher gets SIGTERM. Then the same launch is made again, and what it leaves must be,
byte for byte, what an undisturbed launch of two processes left (measured seconds and memory aside).
Prints the table of docs/explanation/reliability.md; exits with 1 if anything was lost. A launch
spends some ten seconds on imports: --stage, --who and --repeats cut the work into pieces.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from faults import SETTINGS, differences

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--num_processes",
    "2",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
    "-m",
    "inversion_dpo",
]
MORE = ("data.limit=64", "inversion.steps=40", "training.steps=80")
BEGUN = {"invert": "cache/*/shard-00001.json", "train": "metrics.jsonl"}
DONE = {"invert": "variance of the recovered", "train": "policy: "}  # said at the end
VICTIMS = ("process 0", "process 1", "launcher", "all three")
STOP = "stop"  # SIGTERM to the launcher
GRACE = 40.0  # seconds that a launch may take to end; torch's own patience is 30


class Launch:
    """A launch that has been started."""

    def __init__(self, words: list[str], log: Path) -> None:
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as out:
            self.launcher = psutil.Popen(
                [*LAUNCH, *words], env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.workers: list[psutil.Process] = []

    def see(self) -> None:
        """Note the two processes, by rank."""
        children = {c.environ().get("RANK"): c for c in self.launcher.children()}
        self.workers = [children["0"], children["1"]]

    def victims(self, name: str) -> list[psutil.Process]:
        """Who gets the signal."""
        everyone = [*self.workers, self.launcher]
        if name.startswith("process"):
            return [self.workers[int(name[-1])]]
        return [self.launcher] if name == "launcher" else everyone

    def end(self, limit: float = GRACE) -> tuple[int | None, bool]:
        """Exit code of the launcher, and whether its processes ended by themselves."""
        _, alive = psutil.wait_procs([self.launcher, *self.workers], timeout=limit)
        for process in alive:
            process.kill()
        return self.launcher.wait(GRACE), not alive


class Bench:
    """The undisturbed launch, and its copies to be broken."""

    def __init__(self, root: Path, seed: int, last: str) -> None:
        self.root, self.random, self.whole = root, random.Random(seed), root / "whole"
        model = root / "model"
        words = [sys.executable, "-m", "tools.tiny", "sd15", str(model)]
        subprocess.run(words, cwd=Path(__file__).parents[1], check=True, capture_output=True)
        self.settings = [f"model.path={model}", *SETTINGS, *MORE]
        self.work: dict[str, float] = {}  # seconds of work after its beginning
        for stage in BEGUN:
            launch = self.start(stage, self.whole)
            self.wait_for(stage, self.whole, launch)
            begun = time.monotonic()
            if launch.end(120.0)[0]:
                raise SystemExit(f"{stage} failed:\n{launch.log.read_text()[-3000:]}")
            self.work[stage] = time.monotonic() - begun
            shutil.copytree(self.whole, root / f"after-{stage}")
            if stage == last:
                break

    def start(self, stage: str, folder: Path) -> Launch:
        """Launch a stage on a folder."""
        return Launch([stage, "-o", str(folder), *self.settings], self.root / "log")

    def wait_for(self, stage: str, folder: Path, launch: Launch) -> None:
        """Return once the first work is on disk."""
        while not any(folder.glob(BEGUN[stage])) and launch.launcher.poll() is None:
            time.sleep(0.01)
        if launch.launcher.poll() is None:
            launch.see()

    def fresh(self, stage: str) -> Path:
        """Make a folder in which everything before the stage is done."""
        folder = self.root / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        if stage == "train":
            shutil.copytree(self.root / "after-invert", folder)
        return folder

    def strike(self, stage: str, folder: Path, who: str, number: int) -> tuple[int | None, bool]:
        """Send a signal at a random moment of a stage's work; how the launch ended."""
        launch = self.start(stage, folder)
        self.wait_for(stage, folder, launch)
        time.sleep(self.random.uniform(0.0, 0.7) * self.work[stage])
        for process in launch.victims(who):
            process.send_signal(number)
        return launch.end()

    def again(self, stage: str, folder: Path, stopped: bool = False) -> str:
        """Launch once more to the end, and compare."""
        code, _ = self.start(stage, folder).end(120.0)
        if code:
            return f"LOST: exit {code}: {(self.root / 'log').read_text()[-300:]}"
        left = differences(folder, self.root / f"after-{stage}")
        if stopped:  # a stop saves a checkpoint of its own, which may stay as the best
            left = [d for d in left if not d.startswith("checkpoints") or "step-000080" in d]
        return f"LOST: {left[:3]}" if left else "same bytes"


def killed(bench: Bench, stage: str, who: str, repeats: int) -> tuple[str, str]:
    """SIGKILL, then the same launch again; what became of those that were not killed."""
    outcome, alone, done = "same bytes", 0, 0
    for _ in range(repeats):
        folder = bench.fresh(stage)
        _, ended = bench.strike(stage, folder, who, signal.SIGKILL)
        alone += not ended
        done += DONE[stage] in (bench.root / "log").read_text()
        outcome = bench.again(stage, folder)
        if outcome != "same bytes":
            break
    others = "" if who == "all three" else f"; the others ended, {done} of {repeats} the work done"
    text = f"{outcome}{others}" + (f" (LOST: {alone} had to be killed)" if alone else "")
    return f"SIGKILL to {who} of a launch of two, {stage}", text


def terminated(bench: Bench, stage: str, repeats: int) -> tuple[str, str]:
    """SIGTERM to the launcher: what it exits with, whether training was saved."""
    outcome, codes, saved = "same bytes", set(), 0
    for _ in range(repeats):
        folder = bench.fresh(stage)
        code, ended = bench.strike(stage, folder, "launcher", signal.SIGTERM)
        codes.add(code)
        saved += "all saved" in (bench.root / "log").read_text()
        outcome = bench.again(stage, folder, True) if ended else "LOST: did not end"
        if outcome != "same bytes":
            break
    text = f"{outcome}; launcher's exit code {', '.join(map(str, sorted(codes, key=str)))}"
    if stage == "train":
        text += f"; saved at once {saved} of {repeats}"
    return f"SIGTERM to the launcher of two, {stage}", text


def main() -> None:
    """Print the table; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1, help="of each row")
    parser.add_argument("--stage", choices=list(BEGUN), action="append", help="default: both")
    parser.add_argument("--who", choices=[*VICTIMS, STOP], action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lost, stages, n = False, arguments.stage or list(BEGUN), arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seed, stages[-1])
        print("| fault | times | what happened |\n|---|---|---|", flush=True)
        for stage in stages:
            for who in arguments.who or [*VICTIMS, STOP]:
                stopped = who == STOP
                what, outcome = (
                    terminated(bench, stage, n) if stopped else killed(bench, stage, who, n)
                )
                print(f"| {what} | {n} | {outcome} |", flush=True)
                lost |= "LOST" in outcome
    raise SystemExit(int(lost))


if __name__ == "__main__":
    main()
