"""The page of a report: its result, good or bad, with the evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from inversion_dpo.data.images import png
from inversion_dpo.evaluation import figures
from inversion_dpo.evaluation.diversity import diversity_text
from inversion_dpo.evaluation.exports import write_tables
from inversion_dpo.evaluation.judges import doubts, independent, labellers
from inversion_dpo.evaluation.metrics import AGREEMENT, gain_text, metric_rows, share_text
from inversion_dpo.evaluation.page import Page, Picture, Section, Table, inlined
from inversion_dpo.evaluation.pairwise import pairwise_text
from inversion_dpo.evaluation.protocols import sections as protocol_sections
from inversion_dpo.evaluation.repairs import Kind, draw_repairs, repairs_text
from inversion_dpo.evaluation.report_tables import cells, other_guidance, read, structure, traits
from inversion_dpo.evaluation.wording import duration, halves, headline, remarks, statements
from inversion_dpo.run.disk import atomic_bytes, atomic_text
from inversion_dpo.training.health import accuracy_text

SIDES = ("reference", "policy")


@dataclass(frozen=True)
class ReportData:
    """The contents of a report; empty parts are left out of the page.

    metrics: from :func:`evaluate.evaluate`; without a scorer ``n_prompts`` alone. preference: the
    metric that decides wins. samples: caption, uint8 images [H, W, 3] of both models from the same
    noise, and any source, of the prompts shown; scores: theirs by the preference, under "reference"
    and "policy". largest: the same of the prompts that changed most. worst: of those that lost
    most. pairs: caption, winner, loser and any source of some training pairs. history: training
    rows, see :func:`figures.recorded`. config: as YAML. seconds: by stage. seeds: by purpose.
    setting: how prompts were compared, a fragment for the first sentence. run: the folder's name.
    selection, preference_note: sentences on the prompts shown, and on the pairs' preference.
    repairs: some of the pictures that were repaired or broken. people: sentences on what people
    judged.
    """

    title: str
    metrics: Mapping[str, Any]
    preference: str
    samples: Sequence[tuple[Any, ...]] = ()
    scores: Sequence[Mapping[str, float]] = ()
    pairs: Sequence[tuple[Any, ...]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    setting: str = "held-out prompts, with the same noise"
    selection: str = ""
    largest: Sequence[tuple[Any, ...]] = ()
    worst: Sequence[tuple[Any, ...]] = ()
    run: str = "RUN"
    preference_note: str = ""
    repairs: Sequence[Kind] = ()
    people: str = ""


def write_report(folder: Path, data: ReportData) -> Path:
    """Write ``report.html``, ``grid.png``, ``curves.png``, ``gains.png``; return the page's path.

    Their data lie beside them: ``grid.json``, ``curves.csv``, ``gains.csv``, ``categories.csv``.
    The page needs no other file and no network. Without images there is no grid, without
    training rows no curves, without scores no gains. ValueError if captions, images and scores do
    not match.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cards = _sample_cards(data)
    if cards:
        captions, pairs = [row[0] for row in data.samples], [row[1:3] for row in data.samples]
        atomic_bytes(png(np.asarray(figures.sheet(captions, pairs))), folder / "grid.png")
        rows = zip(captions, data.scores or [{}] * len(cards), strict=True)
        grid = [{"caption": caption, **scores} for caption, scores in rows]
        atomic_text(json.dumps(grid, indent=1, ensure_ascii=False), folder / "grid.json")
    if data.repairs:
        atomic_bytes(draw_repairs(data.repairs), folder / "repairs.png")
    panels = [(p, figures.panel_png(p, data.history)) for p in figures.recorded(data.history)]
    if panels:
        atomic_bytes(figures.small_multiples(panels), folder / "curves.png")
    plates = []
    if metric_rows(data.metrics):
        figures.gains(data.metrics, folder / "gains.png")
        plates = [(folder / "gains.png").read_bytes()]
    write_tables(folder, data.metrics, data.history)
    sections = [
        *_repairs(data),
        Section("Judged by people", data.people) if data.people else None,
        Section("Compared in pairs", text) if (text := pairwise_text(data.metrics)) else None,
        _samples(data, cards),
        _worst(data),
        _largest(data),
        _metrics(data, plates),
        *protocol_sections(folder),
        other_guidance(data.metrics),
        _categories(data),
        structure(data.metrics),
        traits(data.metrics),
        _training(data.history, panels),
        _pairs(data),
    ]
    page = Page(
        eyebrow="Inversion-DPO run report",
        title=data.title,
        sections=[section for section in sections if section],
        lede=headline(data.metrics, data.preference, data.setting, data.run),
        statements=[
            *(("loss", text) for text in doubts(data.metrics, data.run)),
            *statements(data.metrics, data.preference),
            *filter(None, [diversity_text(data.metrics)]),
        ],
        tiles=_tiles(data),
        closing="How to repeat this run",
        config=data.config,
        facts=_facts(data),
    )
    return page.write(folder / "report.html")


def _sample_cards(data: ReportData) -> list[tuple[str, list[Picture]]]:
    """Show the samples of each prompt with their scores; of two scores the higher one is bold."""
    largest = max((abs(x) for score in data.scores for x in score.values()), default=0.0)
    digits = max(0, 2 - floor(log10(largest))) if largest else 2
    cards = _pairs_of(data.samples)
    for (_, pictures), score in zip(cards, data.scores, strict=bool(data.scores)):
        best = max(score.values()) if len({*score.values()}) > 1 else None
        pictures[:] = [
            replace(p, score=f"{score[p.name]:.{digits}f}", strong=score[p.name] == best)
            if p.name in score
            else p
            for p in pictures
        ]
    return cards


def _repairs(data: ReportData) -> list[Section]:
    """Show pictures that training repaired and broke, a section each."""
    notes = [
        f"{repairs_text(data.metrics)} A tick marks a picture that shows what its prompt asks for, "
        "a cross one that does not.",
        "What the reference drew right, and the policy does not.",
    ]
    sections = []
    for kind, note in zip(data.repairs, notes, strict=False):
        marks = ["✓" if right else "✗" for right in kind.right]
        cards = [
            (
                caption,
                [
                    Picture(name, inlined(image), mark, mark == "✓")
                    for name, image, mark in zip(SIDES, pair, marks, strict=True)
                ],
            )
            for caption, pair in zip(kind.captions, kind.pairs, strict=True)
        ]
        sections.append(Section(kind.title, note, cards=cards))
    return sections


def _samples(data: ReportData, cards: Sequence[tuple[str, list[Picture]]]) -> Section | None:
    numbers = f"Numbers are `{data.preference}`; the higher one is bold. " if data.scores else ""
    sides = "The reference is on the left, the policy on the right, from the same noise."
    if any(len(row) > 3 for row in data.samples):
        sides = "From left to right: the source, the reference and the policy, from the same noise."
    note = f"{sides} {numbers}{data.selection}"
    return Section("Samples", note, cards=cards) if cards else None


def _largest(data: ReportData) -> Section | None:
    note = (
        "The prompts whose two images differ most, by the root mean square over pixels. They are "
        "not drawn at random: they show what training changed, not whether it is better."
    )
    return Section("Largest changes", note, cards=_pairs_of(data.largest)) if data.largest else None


def _worst(data: ReportData) -> Section | None:
    names = ", ".join(f"`{name}`" for name in independent(data.metrics))
    note = (
        f"The images that lose most, by the mean gain of {names}, each divided by its standard "
        "deviation. They are not drawn at random: look here for what the means hide."
    )
    return Section("Worst regressions", note, cards=_pairs_of(data.worst)) if data.worst else None


def _pairs_of(rows: Sequence[tuple[Any, ...]]) -> list[tuple[str, list[Picture]]]:
    return [
        (
            caption,
            [
                *(Picture("source", inlined(image)) for image in source),
                *(Picture(n, inlined(i)) for n, i in zip(SIDES, (before, after), strict=True)),
            ],
        )
        for caption, before, after, *source in rows
    ]


def _metrics(data: ReportData, plates: Sequence[bytes]) -> Section | None:
    """List the preferred metric first, then the others in their order."""
    metrics = metric_rows(data.metrics)
    names = sorted(metrics, key=lambda name: name != data.preference)
    labelled, same = labellers(data.metrics), data.metrics.get(AGREEMENT, {})
    rows = [
        {"metric": f"`{name}`" + " (labelled the pairs)" * (name in labelled)}
        | {**cells(metrics[name]), "reading": read(metrics[name], data.metrics["n_prompts"])}
        | ({"same side": share_text(same[name]) if name in same else "–"} if same else {})
        for name in names
    ]
    note = (
        "Means over the same prompts. The gain is policy minus reference, with its 95% bootstrap "
        "interval over prompts. The win rate has Wilson's interval. An interval that includes 0 "
        "shows no measurable change. The first row is `evaluation.preference`, the score that "
        "decides the win rate."
    )
    if same:
        note += " Same side: on so many prompts a score prefers the image that the first one does."
    if labelled:
        note += " A score that orders the pairs as their labels do is marked: it is no judge."
    note = " ".join([note, *remarks(names)])
    table = Table.of(rows, numbers=range(1, 5), strong=1)
    return Section("Metrics", note, table, plates=plates) if rows else None


def _categories(data: ReportData) -> Section | None:
    """List the preferred metric and the win rate, one row per category."""
    rows = [
        {"category": name, "prompts": str(part["n_prompts"]), **cells(part["preference"])}
        | {"win rate": share_text(part)}
        for name, part in data.metrics.get("categories", {}).items()
    ]
    note = (
        f"The same comparison within each category, by `{data.preference}`. An interval of "
        "fewer than 20 prompts is too narrow, and fewer than 6 prompts cannot tell. A category "
        "whose interval includes 0 shows no measurable change."
    )
    table = Table.of(rows, numbers=range(1, 7))
    return Section("By category of prompt", note, table) if rows else None


def _training(
    history: figures.History, drawn: Sequence[tuple[figures.Panel, bytes]]
) -> Section | None:
    panels = [(panel.title, panel.note, data) for panel, data in drawn]
    note = (
        "Faint lines are single batches, strong lines their running mean. Marked points are "
        "held out."
    )
    wanted = {"heldout_accuracy", "heldout_pairs"}
    if last := next((row for row in reversed(history) if wanted <= set(row)), None):
        note += f" At the end: {accuracy_text(last)}."
    return Section("Training", note, panels=panels) if panels else None


def _pairs(data: ReportData) -> Section | None:
    cards = [
        (
            caption,
            [
                Picture("preferred", inlined(w), strong=True),
                Picture("not preferred", inlined(l)),
                *(Picture("source", inlined(image)) for image in source),
            ],
        )
        for caption, w, l, *source in data.pairs
    ]
    note = f"The preferred image is on the left, as in the training data. {data.preference_note}"
    return Section("What the pairs prefer", note, cards=cards) if cards else None


def _tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """List the tiles under the headline: label, number, small print."""
    sizes = data.metrics.get("sizes", {})
    paired = f"paired, at {len(sizes)} sizes" if sizes else "paired"
    tiles = [("prompts", f"{data.metrics['n_prompts']:,}", paired)]
    if "preference" in data.metrics:
        change = gain_text(data.metrics["preference"])
        share, interval = halves(share_text(data.metrics))
        tiles[:0] = [
            ("win rate", share, f"{interval}, ties count half"),
            (f"mean `{data.preference}`", *halves(change)),
        ]
    if data.seconds:
        _, slowest = max((seconds, stage) for stage, seconds in data.seconds.items())
        total = duration(sum(data.seconds.values()))
        tiles.append(("wall-clock time", total, f"longest stage: {slowest}"))
    return tiles


def _facts(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the small tables at the end, (heading, rows), without the empty ones."""
    total = {"total": sum(data.seconds.values())} if len(data.seconds) > 1 else {}
    times = {stage: duration(s) for stage, s in {**data.seconds, **total}.items()}
    tables = {"Times": times, "Seeds": data.seeds, "Versions": data.versions}
    return [(name, [(k, str(v)) for k, v in t.items()]) for name, t in tables.items() if t]
