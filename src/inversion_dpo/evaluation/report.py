"""One self-contained HTML page that says what a run did, good or bad, with its evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from inversion_dpo.data.images import data_uri, png
from inversion_dpo.data.traits import Share, shares_text
from inversion_dpo.evaluation import exports, figures
from inversion_dpo.evaluation.breakdown import ERRORS, table_rows
from inversion_dpo.evaluation.figures import Pixels
from inversion_dpo.evaluation.metrics import decimals, interval_text, metric_rows, verdict
from inversion_dpo.run.disk import atomic_text

FEW_PROMPTS = 20  # below this a percentile interval is noticeably too narrow
VERDICT_WORDS = {"gain": "gain", "loss": "loss", "none": "no measurable change"}
_SIDE = 320  # longest edge of an inlined image, pixels


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows; what is empty is left out of the page.

    Attributes:
        title: heading of the page, as plain text like every other string here.
        metrics: the result of :func:`inversion_dpo.evaluation.metrics.compare`; other keys are
            ignored. Without a scorer ``n_prompts`` alone.
        preference: name of the metric that the pairs were ordered by.
        captions: of the prompts shown.
        reference_images: uint8 [H, W, 3], one for each caption.
        policy_images: uint8 [H, W, 3], from the same prompts and noise.
        scores: {"reference": .., "policy": ..} by ``preference``, one for each caption.
        pairs: (caption, winner image, loser image) examples of the training data.
        history: training rows, see :func:`inversion_dpo.evaluation.figures.training_curves`.
        config: the resolved configuration as YAML.
        versions: package or hardware -> version.
        seconds: stage -> wall-clock seconds.
        seeds: purpose -> seed.
        setting: which prompts were compared and how; a fragment within the first sentence.
        selection: a sentence that says how the prompts shown were picked.
        preference_note: a sentence that says what the pairs prefer.
    """

    title: str
    metrics: Mapping[str, Any]
    preference: str
    captions: Sequence[str] = ()
    reference_images: Sequence[Pixels] = ()
    policy_images: Sequence[Pixels] = ()
    scores: Sequence[Mapping[str, float]] = ()
    pairs: Sequence[tuple[str, Pixels, Pixels]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    versions: Mapping[str, str] | None = None
    seconds: Mapping[str, float] | None = None
    seeds: Mapping[str, int] | None = None
    setting: str = "held-out prompts, with the same noise"
    selection: str = ""
    preference_note: str = ""


def write_report(folder: Path, data: ReportData) -> Path:
    """Write ``report.html``, ``grid.png``, ``curves.png``, ``gains.png``; return the page's path.

    Beside them lie their data: ``grid.json``, ``curves.csv``, ``gains.csv``, ``categories.csv``.

    The page needs no other file and no network. Without images there is no grid, without
    recorded training rows no curves, without scores no gains. ValueError if captions, images
    and scores do not match.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cards = _sample_cards(data)
    if data.captions:
        figures.image_grid(
            data.captions, data.reference_images, data.policy_images, folder / "grid.png"
        )
        exports.write_grid(data.captions, data.scores, folder / "grid.json")
    if panels := figures.recorded(data.history):
        figures.training_curves(data.history, folder / "curves.png")
        exports.write_history(data.history, folder / "curves.csv")
    if metric_rows(data.metrics):
        figures.gains(data.metrics, folder / "gains.png")
        exports.write_gains(data.metrics, folder / "gains.csv")
    if data.metrics.get("categories"):
        exports.write_categories(data.metrics, folder / "categories.csv")
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            data=data,
            headline=headline(data.metrics, data.preference, data.setting),
            statements=statements(data.metrics, data.preference),
            tiles=_tiles(data),
            rows=_table(data.metrics, data.preference),
            cards=cards,
            categories=_categories(data.metrics),
            structure=_structure(data.metrics),
            traits=_traits(data.metrics),
            gains=folder / "gains.png",
            panels=[
                (p.title, p.note, data_uri(figures.panel_png(p, data.history))) for p in panels
            ],
            pairs=[(caption, inlined(win), inlined(lose)) for caption, win, lose in data.pairs],
            facts=_facts(data),
        )
    )
    atomic_text(page, folder / "report.html")
    return folder / "report.html"


def headline(metrics: Mapping[str, Any], preference: str, setting: str) -> str:
    """The result by ``preference`` in one sentence; metric names stand in backticks.

    A win or a loss is only called so if the win rate's interval excludes one half.
    """
    if "preference" not in metrics:
        return f"{metrics['n_prompts']:,} {setting}, were sampled but not scored: no claim is made."
    where = f"On {metrics['n_prompts']:,} {setting}, the policy"
    share, by = _share_text(metrics), f"the reference by `{preference}`"
    outcome = {
        "gain": f"wins {share} against {by}",
        "loss": f"loses to {by}: it wins only {share}",
        "none": f"cannot be told apart from {by}: it wins {share}",
    }[verdict(metrics["win_rate_low"], metrics["win_rate_high"], null=0.5)]
    text = f"{where} {outcome}. {_statement(preference, metrics['preference'])}"
    if metrics["n_prompts"] < FEW_PROMPTS:
        text += " So few prompts make the intervals too narrow: read this as a trial, not a result."
    return text


def statements(metrics: Mapping[str, Any], preference: str) -> list[tuple[str, str]]:
    """(verdict, sentence) for every metric but the preferred one."""
    return [
        (verdict(row["gain_low"], row["gain_high"]), _statement(name, row))
        for name, row in metric_rows(metrics).items()
        if name != preference
    ]


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """The result for a terminal: every metric, the win rate, and the same by category."""
    out = [
        f"{name:14s} reference {row['reference']:.4f}  policy {row['policy']:.4f}  gain "
        f"{row['gain']:+.4f} [{row['gain_low']:+.4f}, {row['gain_high']:+.4f}]"
        for name, row in metric_rows(metrics).items()
    ]
    if "win_rate" in metrics:
        seeds = f" of {metrics['seeds']} images" if metrics.get("seeds", 1) > 1 else ""
        out.append(
            f"win rate {metrics['win_rate']:.4f} [{metrics['win_rate_low']:.4f}, "
            f"{metrics['win_rate_high']:.4f}] on {metrics['n_prompts']} prompts{seeds}"
        )
    for name, part in metrics.get("categories", {}).items():
        row = part["preference"]
        gain = interval_text(row["gain"], row["gain_low"], row["gain_high"])
        out.append(
            f"  {name}: gain {gain}, win rate {part['win_rate']:.3f}, {part['n_prompts']} prompts"
        )
    out = out or [f"{metrics['n_prompts']} prompts were sampled but not scored"]
    if found := _shares(metrics):
        out.append(f"  its images are, against the reference's: {shares_text(found)}")
    return out


def _statement(name: str, row: Mapping[str, float]) -> str:
    words = {"gain": "a gain", "loss": "a loss", "none": "no measurable change"}
    change = interval_text(row["gain"], row["gain_low"], row["gain_high"])
    outcome = words[verdict(row["gain_low"], row["gain_high"])]
    return f"Mean `{name}` changes by {change}: {outcome}."


def _share_text(metrics: Mapping[str, Any]) -> str:
    value, low, high = (100 * metrics[k] for k in ("win_rate", "win_rate_low", "win_rate_high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def duration(seconds: float) -> str:
    """Wall-clock time to read.

    >>> [duration(s) for s in (0.42, 12.34, 83, 4000)]
    ['0.4 s', '12.3 s', '1 min 23 s', '1 h 7 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def inlined(image: Pixels) -> str:
    """uint8 [H, W, 3] as a ``data:`` address, its longest edge near 320 pixels."""
    return data_uri(png(figures.thumbnail(image, _SIDE)))


def inline_text(text: str) -> Markup:
    """Escape text; backticks become code, minuses real ones, [intervals] stay on one line."""
    signed = re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", str(escape(text)))
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", signed)
    return Markup(re.sub(r"\[[^\[\]]{1,40}\]", r'<span class="whole">\g<0></span>', coded))


def environment(package: str = "inversion_dpo.evaluation") -> Environment:
    """Templates of a package, and those here; all text is escaped."""
    here = PackageLoader("inversion_dpo.evaluation", ".")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), here]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline_text
    environment.filters["data_uri"] = lambda path: data_uri(path.read_bytes())
    return environment


def _sample_cards(data: ReportData) -> list[dict[str, Any]]:
    """Caption, two inlined images and, if there are scores, their texts and the better side."""
    n = len(data.captions)
    if not len(data.reference_images) == len(data.policy_images) == n:
        raise ValueError(
            f"{n} captions need as many images, got {len(data.reference_images)} of the "
            f"reference and {len(data.policy_images)} of the policy"
        )
    if data.scores and len(data.scores) != n:
        raise ValueError(f"{n} captions need as many scores, got {len(data.scores)}")
    largest = max((abs(x) for score in data.scores for x in score.values()), default=0.0)
    digits = max(0, 2 - floor(log10(largest))) if largest else 2
    scores = data.scores or [{}] * n
    images = zip(data.reference_images, data.policy_images, strict=True)
    return [
        {"caption": caption, "sides": _sides(reference, policy, score, digits)}
        for caption, (reference, policy), score in zip(data.captions, images, scores, strict=True)
    ]


def _sides(
    reference: Pixels, policy: Pixels, score: Mapping[str, float], digits: int
) -> list[dict[str, Any]]:
    best, worst = max(score.values(), default=0.0), min(score.values(), default=0.0)
    return [
        {
            "name": name,
            "image": inlined(image),
            "score": f"{score[name]:.{digits}f}" if name in score else "",
            "better": name in score and score[name] == best > worst,
        }
        for name, image in (("reference", reference), ("policy", policy))
    ]


def _tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the strip under the headline."""
    tiles = [("prompts", f"{data.metrics['n_prompts']:,}", "paired")]
    if "preference" in data.metrics:
        row = data.metrics["preference"]
        change = interval_text(row["gain"], row["gain_low"], row["gain_high"])
        share, interval = _halves(_share_text(data.metrics))
        tiles[:0] = [
            ("win rate", share, f"{interval}, ties count half"),
            (f"mean `{data.preference}`", *_halves(change)),
        ]
    if data.seconds:
        _, slowest = max((seconds, stage) for stage, seconds in data.seconds.items())
        total = duration(sum(data.seconds.values()))
        tiles.append(("wall-clock time", total, f"longest stage: {slowest}"))
    return tiles


def _halves(text: str) -> tuple[str, str]:
    value, _, interval = text.partition(" ")
    return value, interval


def _table(metrics: Mapping[str, Any], preference: str) -> list[dict[str, Any]]:
    """The preferred metric first, then the others in their order."""
    rows = metric_rows(metrics)
    names = sorted(rows, key=lambda name: name != preference)
    return [_table_row(name, rows[name], name == preference) for name in names]


def _categories(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a category: the preferred metric there, and the win rate."""
    return [
        _table_row(name, part["preference"], False)
        | {"prompts": part["n_prompts"], "wins": _share_text(part)}
        for name, part in metrics.get("categories", {}).items()
    ]


def _structure(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a number of objects, a relation and a kind of error, which is better if lower."""
    rows = []
    for name, prompts, measure, row in table_rows(metrics.get("structure") or {}):
        shown = _table_row(name, row, False) | {"prompts": prompts, "measure": measure}
        if name in ERRORS.values():
            kind = verdict(-row["gain_high"], -row["gain_low"])
            shown |= {"verdict": kind, "words": VERDICT_WORDS[kind]}
        rows.append(shown)
    return rows


def _shares(metrics: Mapping[str, Any]) -> dict[str, Share]:
    return {name: Share(**row) for name, row in (metrics.get("traits") or {}).items()}


def _traits(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a trait: in which share of the images the policy's has more of it."""
    words = {"gain": "more", "loss": "less", "none": "no measurable change"}
    return [
        {
            "name": name,
            "share": f"{s.share:.1%}",
            "interval": f"[{100 * s.low:.1f}, {100 * s.high:.1f}]",
            "words": words[verdict(s.low, s.high, null=0.5)],
        }
        for name, s in _shares(metrics).items()
    ]


def _table_row(name: str, row: Mapping[str, float], preferred: bool) -> dict[str, Any]:
    digits = max(2, decimals((row["gain_high"] - row["gain_low"]) / 2))
    gain, interval = _halves(interval_text(row["gain"], row["gain_low"], row["gain_high"]))
    kind = verdict(row["gain_low"], row["gain_high"])
    return {
        "name": name,
        "preferred": preferred,
        "reference": f"{row['reference']:.{digits}f}",
        "policy": f"{row['policy']:.{digits}f}",
        "gain": gain,
        "interval": interval,
        "verdict": kind,
        "words": VERDICT_WORDS[kind],
    }


def _facts(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, rows) of the small tables at the end; empty ones are left out."""
    times = [(stage, duration(s)) for stage, s in (data.seconds or {}).items()]
    if len(times) > 1:
        times.append(("total", duration(sum((data.seconds or {}).values()))))
    seeds = [(purpose, str(seed)) for purpose, seed in (data.seeds or {}).items()]
    versions = [(name, str(version)) for name, version in (data.versions or {}).items()]
    tables = [("Times", times), ("Seeds", seeds), ("Versions", versions)]
    return [(heading, rows) for heading, rows in tables if rows]
