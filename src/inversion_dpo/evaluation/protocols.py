"""Judge a policy and published checkpoints as papers do; ``assets/protocols.yaml`` lists how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from inversion_dpo.evaluation.defaults import settled
from inversion_dpo.evaluation.evaluate import check, measure, pairs_agree, write_metrics
from inversion_dpo.evaluation.metrics import PAIRS_AGREE, gain_text, metric_rows, share_text
from inversion_dpo.evaluation.named_sets import named_sets
from inversion_dpo.evaluation.page import Section, Table
from inversion_dpo.evaluation.scorers.asked import GENEVAL
from inversion_dpo.evaluation.wording import few_text, remarks
from inversion_dpo.run.config import Config, ConfigError, resolve
from inversion_dpo.run.disk import atomic_json, digest_of, read_json
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.judged import WEIGHTS, trained_since
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.settings import written

SHAPING = ("network", "lora", "scene_graph", "quantize", "quantize_text", "t5", "prompt_chunks")
FOLDER = "protocols"  # of a run: one JSON a protocol, and a folder of its comparisons
OURS, BASE = "this run", "the reference"


@dataclass(frozen=True)
class Protocol:
    """One row of the list.

    model, resolution: what the papers train. prompts: names of sets. settings: evaluation.*.
    published: ``rows`` (name -> scores in the order of ``columns``) on the set ``prompts``, and
    their ``source``.
    """

    name: str
    source: str
    model: str
    resolution: int
    prompts: list[str]
    settings: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)

    def overrides(self, given: Sequence[str] = ()) -> list[str]:
        """Write the settings as KEY=VALUE, the user's over them; one prompt set stands for all."""
        pairs = {"prompts": self.prompts[0], **self.settings}.items()
        ours = {f"evaluation.{key}": written(value) for key, value in pairs}
        keys = {text.partition("=")[0] for text in given}
        keys |= {"evaluation.preference"} if "evaluation.scorer=null" in given else set()
        return [f"{key}={value}" for key, value in ours.items() if key not in keys] + [*given]

    def chosen(self, overrides: Sequence[str], config: Config) -> Protocol:
        """Return the protocol on one prompt set, if the user's overrides name one."""
        given = any(text.startswith("evaluation.prompts=") for text in overrides)
        return replace(self, prompts=[config.evaluation.prompts]) if given else self

    def departures(self, config: Config, reference: str | None = None) -> list[str]:
        """List where an evaluation is not the protocol's, so that numbers do not compare."""
        e, m, usual = config.evaluation, config.model, ModelConfig()
        both = [(f"evaluation.{k}", getattr(e, k), v) for k, v in self.settings.items()]
        both += [("model.path", m.path, self.model)]
        both += [("model.resolution", m.resolution, self.resolution)]
        both += [(f"model.{k}", getattr(m, k), getattr(usual, k)) for k in SHAPING]
        both += [("--reference", reference, self.model)] if reference else []
        if not {*self.prompts} <= {*(whole := protocols()[self.name].prompts)}:
            both += [("evaluation.prompts", e.prompts, whole)]
        return [f"{k}={written(is_)}, not {written(v)}" for k, is_, v in both if is_ != v]


@cache
def protocols() -> dict[str, Protocol]:
    """Return the list by name."""
    rows = yaml.safe_load(Path(resolve("asset:protocols.yaml")).read_text(encoding="utf-8"))
    return {name: Protocol(name, **row) for name, row in rows.items()}


def protocol_of(name: str) -> Protocol:
    """Find a protocol; ConfigError lists the known ones."""
    if name not in protocols():
        raise ConfigError(f"--protocol {name} is unknown: one of {', '.join(protocols())}")
    return protocols()[name]


def judge_by(
    protocol: Protocol,
    folder: Path,
    config: Config,
    policy: str,
    against: Sequence[str] = (),
    reference: str | None = None,
) -> dict[str, Any]:
    """Compare a policy and other models with the reference, on every prompt set.

    The table is written after each comparison, so that a fault of a later one loses nothing. What
    was sampled is not sampled again. Every process must call this.

    Args:
        protocol: what is compared on.
        folder: of the run; ``protocols/NAME.json`` is written there, and the files of
            :func:`evaluate.evaluate` for the policy on the first set.
        config: the run's, with the protocol's settings and the user's.
        policy: as :func:`sides.side` takes it.
        against: further models in the same form, such as published checkpoints.
        reference: the same; None for the configuration's model.

    Returns:
        What ``protocols/NAME.json`` holds: ``departures``, and ``sets``: for each prompt set
        ``n_prompts`` and ``models``, :func:`metrics.compare`'s rows by model and score.
    """
    configs = {
        name: settled(replace(config, evaluation=replace(config.evaluation, prompts=name)), folder)
        for name in protocol.prompts
    }
    models = list(dict.fromkeys((policy, *against)))
    for one in configs.values():
        check(one, folder, [reference, *models])
    sets: dict[str, Any] = {}
    found = {
        "protocol": protocol.name,
        "departures": protocol.departures(config, reference),
        "preference": next(iter(configs.values())).evaluation.preference,
        "sets": sets,
        "finished": False,
    } | ({WEIGHTS: digest_of([folder / "adapter"])} if str(folder) in models else {})
    for name, one in configs.items():
        for model in models:
            first, own = not sets, model == str(folder)
            place = folder if first else folder / FOLDER / protocol.name / plain(name, model)
            if current_team().main:
                place.mkdir(parents=True, exist_ok=True)
            current_team().wait()
            both = None if first and own and reference is None else (reference, model)
            metrics = measure(place, one, folder / "samples", both)
            if both is None and metrics.get("win_rate") is not None:
                metrics[PAIRS_AGREE] = pairs_agree(one, folder / "samples")
                write_metrics(folder, metrics)
            part = sets.setdefault(name, {"n_prompts": metrics["n_prompts"], "models": {}})
            part["models"][OURS if own else model] = rows_of(metrics)
            found["finished"] = len(sets) == len(configs) and len(part["models"]) == len(models)
            if current_team().main:
                (folder / FOLDER).mkdir(exist_ok=True)
                atomic_json(found, folder / FOLDER / f"{protocol.name}.json")
    return found


def rows_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Select the scores, and of GenEval each task's beside the others."""
    tasks = metrics.get("categories", {}).items()
    by_task = {f"{GENEVAL}_{task}": rows[GENEVAL] for task, rows in tasks if GENEVAL in rows}
    return metric_rows(metrics) | by_task


def plain(*names: str) -> Path:
    """Make a folder's name of each text, without signs that a path could read otherwise.

    Two texts have two names: a part of the text's hash stands in place of other signs than ``/``.
    """
    made = []
    for name in names:
        bare = re.sub(r"[^\w.-]+", "--", name).strip(".-")
        lost = bare != name.replace("/", "--")
        made.append(f"{bare}-{sha256(name.encode()).hexdigest()[:6]}" if lost else bare)
    return Path(*made)


def table_of(found: Mapping[str, Any], prompts: str) -> list[dict[str, str]]:
    """List a prompt set's rows: the reference, each model's mean, gain and win rate, the papers'.

    A published number stands in the column of its scorer, if that one was asked.
    """
    models = found["sets"][prompts]["models"]
    scores = list(next(iter(models.values())))

    def row(model: str, what: str, cells: Mapping[str, str]) -> dict[str, str]:
        return {"model": model, "": what} | {name: cells.get(name, "–") for name in scores}

    base = {k: f"{v['reference']:.4g}" for k, v in next(iter(models.values())).items()}
    rows = [row(BASE, "mean", base)] if scores else []
    for model, measured in models.items() if scores else ():
        rows += [
            row(model, "mean", {k: f"{v['policy']:.4g}" for k, v in measured.items()}),
            row(model, "gain", {k: gain_text(v) for k, v in measured.items()}),
            row(model, "win rate", {k: share_text(v) for k, v in measured.items()}),
        ]
    known = protocols().get(found["protocol"])
    paper = known.published if known else {}
    if scores and paper and prompts == paper["prompts"]:
        for name, numbers in paper["rows"].items():
            cells = zip(paper["columns"], numbers, strict=True)
            said = {k: f"{v:.4g}" for k, v in cells if v is not None}
            rows.append(row(f"{name}, published", "mean", said))
    return rows


def notes(found: Mapping[str, Any], prompts: str) -> list[str]:
    """Say where a table's settings and published numbers come from, and what departs from them."""
    known = protocols().get(found["protocol"])
    n = found["sets"][prompts]["n_prompts"]
    texts = [f"{n:,} prompts of {prompts}; gains and win rates are against the reference."]
    if known:
        texts.append(f"Settings: {known.source}.")
        if known.published and prompts == known.published["prompts"]:
            texts.append(f"Published: {known.published['source']}.")
    texts += few_text(n)
    texts += remarks(next(iter(found["sets"][prompts]["models"].values())))
    if not found.get("finished", True):
        texts.append("Unfinished: type the command again, and it goes on.")
    departures = list(found["departures"])
    if prompts in named_sets() and n != (whole := named_sets()[prompts].prompts):
        departures.append(f"{n:,} prompts of {prompts}, not {whole:,}")
    if departures:
        texts.append(f"Do not compare with published numbers: {'; '.join(departures)}.")
    return texts


def lines(found: Mapping[str, Any]) -> list[str]:
    """Write the tables for a terminal."""
    out = []
    for prompts in found["sets"]:
        rows = table_of(found, prompts)
        table = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        out += [f"protocol {found['protocol']}, {prompts}"]
        out += [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table
        ]
        out += [f"  {text}" for text in notes(found, prompts)]
    return out


def sections(folder: Path) -> list[Section]:
    """Make a section of the report for each protocol and prompt set that a run was judged by."""
    out = list[Section]()
    for found in map(read_json, sorted((folder / FOLDER).glob("*.json"))):
        before = WEIGHTS in found and trained_since(folder, found)
        stale = [f"{OURS} is as it was before it was trained further."] if before else []
        for prompts in found["sets"]:
            rows = table_of(found, prompts)
            table = Table.of(rows, numbers=range(2, len(rows[0]))) if rows else None
            name = f"Protocol {found['protocol']}: {prompts}"
            out.append(Section(name, " ".join(stale + notes(found, prompts)), table))
    return out
