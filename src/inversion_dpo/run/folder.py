"""The folder of one run: who owns it, and how long its stages took."""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inversion_dpo.run.config import Config, ConfigError, load_config, to_yaml
from inversion_dpo.run.disk import (
    DiskError,
    atomic_json,
    atomic_text,
    check_writable,
    mark_of,
    read_json,
)
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.settings import every_setting, groups
from inversion_dpo.run.together import MARK, check_together
from inversion_dpo.run.words import counted, typed

# What may differ when a run is continued: it changes how far or how it is looked at, where weights
# wait or how much memory a step takes, not what the steps done so far would have been.
FREE = (
    "model.offload",
    "inversion.cache",
    "training.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.snapshot_every",
    "training.max_skipped",
    "training.tracker",
    "training.gradient_accumulation",  # what "out of memory" advises; sums round otherwise
    "training.gradient_checkpointing",
)


logger = logging.getLogger(__name__)
REFERENCE = "reference.json"  # of a run's folder: a sketch of the model that it was trained on
LOCK = ".lock"
BEGUN = {LOCK, MARK, "config.yaml.partial"}  # all that a kill in a run's first moment leaves
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems without flock


class BusyError(RuntimeError):
    """Another run works on the same folder; says what to do."""


@contextmanager
def occupied(folder: Path, run: bool = True) -> Iterator[None]:
    """Make a folder if need be and keep other runs out of it.

    The lock belongs to the first process of a launch and ends with it, however it ends: the file
    that stays behind holds nobody up.

    Args:
        folder: of a run, or of a command that makes several.
        run: whether to refuse a folder that holds anything but a run.

    Raises:
        BusyError: another run works there, or the file system knows no locks.
        ConfigError: a file, or a folder of other files.
    """
    if not current_team().main:
        yield
        return
    _make_own(folder, run)
    with _locked(folder / LOCK, f"{folder} is in use by another run"):
        yield


@contextmanager
def sole_writer(output: Path, command: str = "") -> Iterator[None]:
    """Keep other commands from writing a Parquet file until this one has.

    Args:
        output: the file.
        command: whose files it may replace, see :func:`disk.mark_of`; without one the caller says
            what becomes of a file that is there.

    Raises:
        BusyError: another command writes it, or the file system knows no locks.
        ConfigError: a folder, a name by which the file would be read as something else, or a file
            that another command or person made.
    """
    check_parquet(output)
    if command and output.exists() and mark_of(output) != command:
        raise ConfigError(
            f"{output} is there, and `{command}` did not write it: choose another --output, or "
            "delete it"
        )
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone_at(output):
        yield


@contextmanager
def alone_at(output: Path) -> Iterator[None]:
    """Keep other commands from a file or folder; BusyError if one writes it.

    The lock lies beside it, in a folder that must be there.
    """
    with _locked(output.with_name(f".{output.name}{LOCK}"), f"{output} is being written already"):
        yield


def check_parquet(output: Path) -> None:
    """Refuse a folder, and a name by which a Parquet file would be read as something else."""
    if output.suffix.lower() != ".parquet" or output.is_dir():
        raise ConfigError(f"--output {output}: give a file whose name ends in .parquet")


@contextmanager
def _locked(path: Path, busy: str) -> Iterator[None]:
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{busy}: wait for it, stop it, or write to another place") from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in UNLOCKABLE:
            raise
        raise BusyError(
            f"{path.parent} cannot be locked ({error}), so that nothing would keep a second run "
            "out: work on a file system with flock"
        ) from error
    try:
        yield
    finally:
        lock.release()


def flat(config: Config) -> dict[str, Any]:
    """Map the dotted key of every setting to its value."""
    return {key: attrgetter(key)(config) for key in every_setting()}


def differences(folder: Path, config: Config) -> dict[str, str]:
    """Compare with the run in ``folder``: each key that differs, with a text of both values."""
    theirs, ours = flat(read_config(folder)), flat(config)
    return {
        k: f"{k} is {theirs[k]!r} there and {v!r} here" for k, v in ours.items() if v != theirs[k]
    }


def claim(folder: Path, config: Config, remedy: str = "") -> None:
    """Make ``folder`` this run's; ConfigError if it holds another run or other files.

    The first process of a launch does, and the others wait for it; they must see the same folder
    and settings. A folder in which nothing was trained yet may change hands: its cache is kept by
    content.
    """
    if current_team().main:
        _make_own(folder)
        refuse_other_run(folder, config, remedy)
    check_together(folder, flat(config))
    if current_team().main:
        atomic_text(to_yaml(config), folder / "config.yaml")
    current_team().wait()


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Do :func:`claim` to evaluate; after an error the folder has the settings of before."""
    owner = folder / "config.yaml"
    before = owner.read_text() if owner.exists() else None
    claim(
        folder,
        config,
        "Leave it out, or judge in a new folder: `inversion-dpo evaluate NEW --policy "
        f"{typed(folder / 'adapter')} --config {typed(owner)}`, and the setting",
    )
    try:
        yield
    except Exception:
        if before is not None and current_team().main:
            atomic_text(before, owner)
        raise


def check_output(folder: Path, config: Config) -> None:
    """Refuse, without making it, a folder that :func:`claim` would refuse or cannot make."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there == folder or not there.is_dir():
        refuse_others(there)
        refuse_other_run(folder, config)
        refuse_fewer_steps(folder, config.training.steps)
    check_writable(folder)


def refuse_other_run(folder: Path, config: Config, remedy: str = "") -> None:
    """Refuse a folder in which another run was trained; the usual remedy is that of a training."""
    owner = folder / "config.yaml"
    changed = [
        text
        for key, text in (differences(folder, config) if owner.exists() else {}).items()
        if key not in FREE and not key.startswith(("evaluation.", "build."))
    ]
    more = f" (and {counted(len(changed) - 1, 'more key differs', 'more keys differ')})"
    if changed and (folder / "checkpoints").exists():
        raise ConfigError(
            f"{folder} holds another run: {changed[0]}"
            f"{more if len(changed) > 1 else ''}. "
            + (
                remedy
                or "Repeat that run's settings to resume it, or choose another --output. To train "
                f"anew with its inverted pairs, delete {folder / 'checkpoints'}"
            )
        )


def refuse_fewer_steps(folder: Path, steps: int) -> None:
    """Refuse to end before a step that is trained already: nothing would change."""
    if (done := max(steps_in(folder / "checkpoints"), default=0)) > steps:
        raise ConfigError(
            f"training.steps={steps}, but {folder} is trained for {counted(done, 'step')}. Raise "
            "it, or choose another --output. To go back, delete the later ones in "
            f"{folder / 'checkpoints'}"
        )


def steps_in(folder: Path) -> dict[int, Path]:
    """Find what was kept of steps, in their order: whole folders step-NNNNNN."""
    return dict(sorted((int(n), p) for p in folder.glob("step-*") if (n := p.name[5:]).isdecimal()))


def _make_own(folder: Path, run: bool = True) -> None:
    """Make a folder; ConfigError for a file and, if a run's, for a folder of other files."""
    if not folder.is_file():
        folder.mkdir(parents=True, exist_ok=True)
    refuse_others(folder, run)


def refuse_others(folder: Path, run: bool = True) -> None:
    """Refuse a file and, if a run's, a folder of other files."""
    if not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file: give a folder")
    names = {p.name for p in folder.iterdir()}
    if run and names - BEGUN and "config.yaml" not in names:
        raise ConfigError(
            f"{folder} is not empty and holds no run of ours (no config.yaml): choose another "
            "--output"
        )


def run_file(folder: Path) -> str:
    """Return the path of a run's settings; ConfigError if the folder holds no run."""
    if not (folder / "config.yaml").is_file():
        if "=" in folder.name:  # unlike a run of `compare --vary`, whose folder is named by one
            raise ConfigError(f"{folder} is a setting: name the run's folder before it")
        remedy = f"Train one with `inversion-dpo train --output {typed(folder)}`"
        if (folder.absolute().parent / "config.yaml").is_file():
            remedy = f"It lies in a run: give {folder.parent}"
        elif folder.is_file() and folder.suffix != ".safetensors":
            remedy = "It is a file: give the folder of a run"
        elif (folder / "metrics.jsonl").is_file():
            remedy = "A training left metrics.jsonl there: put its config.yaml back from a copy"
        elif runs := [
            f.parent for way in ("", "runs/") for f in folder.glob(f"{way}*/config.yaml")
        ]:
            remedy = f"It holds {counted(len(runs), 'run')}: give one, such as {typed(min(runs))}"
        elif folder.is_file() or [*folder.glob("*.safetensors"), *folder.glob("model_index.json")]:
            remedy = (
                "It is a model: `evaluate NEW_FOLDER --policy` takes it; `sample` takes it as "
                "model.path, model.network or model.lora"
            )
        raise ConfigError(f"{folder} is not a run: it has no config.yaml. {remedy}")
    return whole(folder / "config.yaml")


def whole(written: Path) -> str:
    """Return the path of settings that a command wrote; ConfigError if a part of them is gone.

    A file that is cut short can be read all the same, and what is gone would be the default.
    """
    text = "\n" + written.read_text(encoding="utf-8", errors="replace")
    if lost := [name for name in groups() if "." not in name and f"\n{name}:" not in text]:
        raise ConfigError(
            f"{written} has no {', no '.join(lost)}: it is damaged, or of another version. Put the "
            "file back from a copy, or run the command again that wrote it"
        )
    return str(written)


def read_config(folder: Path) -> Config:
    """Load the configuration of a run's folder; ConfigError if it is none."""
    return load_config(run_file(folder), [])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the metrics rows of a run.

    A torn last line, as a kill leaves it, is left out. Other damaged lines are counted.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows, damaged = list[dict[str, Any]](), list[int]()
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line or "{}")
        except ValueError:
            row = None
        if row and isinstance(row, dict) and "step" in row and all(map(_is_number, row.values())):
            rows.append(row)
        elif line:
            damaged.append(number)
    if damaged and (len(damaged) > 1 or text.endswith("\n")):
        lines = counted(len(damaged), "damaged line")
        logger.warning("%s: %s left out, the first is line %d", path, lines, damaged[0])
    return rows


def read_metrics(run: Path) -> dict[str, Any]:
    """Read what ``evaluate`` measured in a run's folder; empty if it was not evaluated.

    DiskError if the file is damaged, or has something else where others read numbers.
    """
    file, shares = run / "metrics.json", ("win_rate", "win_rate_low", "win_rate_high")
    found = read_json(file) if file.is_file() else {}
    models, rows = found.get("models"), [found]
    rows += [row for row in found.values() if isinstance(row, dict) and "gain" in row]
    numbers = [(f"steps {found.get('steps')}", _is_number(found.get("steps", 0)))]
    for row in rows:
        given = [name for name in (*shares, "gain", "gain_low", "gain_high") if name in row]
        numbers += [(f"{k} {row[k]}", _is_number(row[k]) and math.isfinite(row[k])) for k in given]
        lost = [name for name in shares if "win_rate" in row and name not in row]
        numbers += [(f"no {name}", False) for name in lost]
    named = models is None or (
        isinstance(models, list)
        and len(models) == 2
        and all(model is None or isinstance(model, str) for model in models)
    )
    if wrong := [text for text, sound in [(f"models {models}", named), *numbers] if not sound]:
        raise DiskError(
            f"{file} is damaged ({wrong[0]}): run `inversion-dpo evaluate {typed(run)}` again; "
            "kept samples are not drawn anew"
        )
    return dict(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def going_on(run: Path) -> str:
    """Say that a run's policy is from before its training was continued; empty if it is not."""
    log = run / "metrics.jsonl"
    if not (run / "adapter").is_dir() or not log.is_file():
        return ""
    last = (read_rows(log) or [{"step": -1}])[-1]  # none: it began anew
    done, steps = last["step"] + ("pairs" not in last), read_config(run).training.steps
    if "pairs" in last and done >= steps:  # which the last row of a training has
        return ""
    return (
        f"{run} is trained to step {done} of {steps}, and adapter/ is from before it was "
        "continued: finish it first, by its `train` command"
    )


def read_seconds(folder: Path) -> dict[str, float]:
    """Read the wall-clock seconds of each stage, summed over interruptions."""
    path = folder / "seconds.json"
    try:
        found = read_json(path) if path.exists() else {}
        return {name: float(spent) for name, spent in found.items()}
    except (DiskError, TypeError, ValueError) as error:  # no reason to stop a run
        named = error if isinstance(error, DiskError) else f"{path} is damaged ({error})"
        logger.warning("%s. Earlier times are lost", named)
        return {}


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Add the time spent inside to the run's ``seconds.json``, also if it is interrupted."""
    start = time.time()
    try:
        yield
    except BaseException:
        with suppress(OSError, DiskError):  # the first error is the one to tell
            _add_seconds(folder, name, time.time() - start)
        raise
    _add_seconds(folder, name, time.time() - start)


def _add_seconds(folder: Path, name: str, spent: float) -> None:
    """Add seconds to those of a stage; the first process writes."""
    if current_team().main:
        seconds = read_seconds(folder)
        seconds[name] = round(seconds.get(name, 0.0) + spent, 2)
        atomic_json(seconds, folder / "seconds.json")
