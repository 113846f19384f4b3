"""What is in the data, row by row, without stopping at a bad one."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from inversion_dpo.data.annotations import MAX_LISTED, listed
from inversion_dpo.data.buckets import Resolution, left_out_text, named
from inversion_dpo.data.formats import open_rows
from inversion_dpo.data.giveaways import Giveaway, refusal
from inversion_dpo.data.images import DataError
from inversion_dpo.data.masks import odd_masks_text
from inversion_dpo.data.rankings import rows_of
from inversion_dpo.data.rows import Fault, Row
from inversion_dpo.data.source import LEFT_OUT, left_out_words, mixed, no_pairs
from inversion_dpo.data.traits import Share, format_shares, oddities_text
from inversion_dpo.data.transforms import Size
from inversion_dpo.data.usable import Told, Usable
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.statistics import GraphStatistics, format_statistics, statistics_of
from inversion_dpo.run.fields import DataConfig
from inversion_dpo.run.words import counted

_PROBLEMS = {  # kinds of problems, by their counts
    "bad_labels": "label",
    "empty_captions": "caption",
    "broken_images": "image",
    "bad_paths": "path",
    "bad_rows": "row",
    "mixed": "mixture",
    "bad_shapes": "shape",
    "giveaways": "giveaway",
    "bad_graphs": "scene graph",
}
_ODD = {
    "mixed_shapes": "of two shapes",
    "odd_shapes": "far from every size",
}
SOON = 3.0  # seconds in which no progress is shown
ALIKE = 5  # problems of one kind that are spelled out
MAX_CAPTION_WORDS = 77  # CLIP reads 77 tokens: more words than that are certainly cut


@dataclass(frozen=True)
class Measure:
    """How captions are measured: words by default, or a tokenizer's tokens."""

    unit: str = "words"
    longest: int = MAX_CAPTION_WORDS
    length: Callable[[str], int] = lambda caption: len(caption.split())


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pairs` found.

    counts: of rows and images, as :class:`source.PairSource` counts them, but rows as the data have
    them, which rankings make more or fewer pairs of; also mixed_sizes (pairs of two image sizes),
    kinds of :data:`traits.ODDITIES`, enlarged (images), mixed_shapes and odd_shapes
    (:class:`buckets.Place`), up and down (thumbs), both (prompts that have the two) and bad_graphs
    (a scene graph that is none; its row can be trained on, without it). What follows speaks of the
    usable pairs: image_sizes {(width, height): images}, trained_at {(height, width): pairs} under
    ``resolution`` and ``fit``, captions (least, median, most in ``measure``'s unit), long_captions
    (longer than its longest), first_preferred (share of labelled rows with label_0 = 1), marked
    (median share of the pixels that masks count), ratings (their number, the least and the most, if
    there are any), idle (columns, folders and files that nothing is read from), traits (what else
    winners have more of), giveaways (what their files have), example (one pair in words), graphs.
    ``problems`` spells out the first 50 of ``problems_total``, of those alike the first 5.
    """

    path: str
    counts: Counter[str]
    image_sizes: Counter[tuple[int, int]]
    resolution: Resolution
    fit: str
    trained_at: Counter[Size]
    captions: tuple[int, float, int] | None
    measure: Measure
    long_captions: int
    first_preferred: float | None
    marked: float | None
    ratings: tuple[float, ...]
    idle: tuple[str, ...]
    traits: Mapping[str, Share]
    giveaways: tuple[Giveaway, ...]
    example: str
    graphs: GraphStatistics
    problems: tuple[str, ...]
    problems_total: int

    @property
    def ok(self) -> bool:
        """Whether :func:`open_pairs` takes this data, scene graphs included, row by row."""
        return self.problems_total == 0


def _keep(problem: str, alike: dict[str, list[str]]) -> None:
    """Keep the first few problems of a kind, and of the first kinds only: files may be long."""
    kind = re.sub(r"\d+", "", problem)
    if len(alike) < MAX_LISTED or kind in alike:
        texts = alike.setdefault(kind, [])
        texts += [problem] * (len(texts) < ALIKE)


def check_pairs(
    config: DataConfig, measure: Measure | None = None, resolution: Resolution = 1024
) -> PairReport:
    """Look at every row, or those up to the limit, and list what is wrong with each.

    Args:
        config: where the data is, and how it is read.
        measure: how captions are measured, words by default.
        resolution: of the training whose sizes are counted.

    Raises:
        DataError: for a whole file: missing, damaged, of no known format, a column missing.
    """
    measure = measure or Measure()
    usable, counts = Usable(config, measure.length, resolution), Counter[str]()
    graphs, total = list[SceneGraph](), 0
    alike = dict[str, list[str]]()  # problems that differ in their numbers alone
    told, opened = Told(), open_rows(config)
    rows = islice(rows_of(told.watch(opened.rows()), config.ranking, alone=True), config.limit)
    for row in _shown(rows, opened.count(), config.limit):
        if row.left_out:
            counts[row.left_out] += 1
            continue
        found, images = usable.look(row)
        graph = _graph(row)
        faults = [*found, graph] if isinstance(graph, Fault) else found
        counts.update(fault.kind for fault in faults)
        for fault in faults:
            _keep(fault.text, alike)
        total += len(faults)
        if not found:
            graphs += [graph] if isinstance(graph, SceneGraph) else []
            usable.add(row, images)
    counts.update(usable.counts, both=usable.both, rows=told.rows)
    giveaways, lengths = tuple(usable.files.found()), usable.lengths
    whole = _of_all(config, counts, giveaways, total)
    problems = [text for texts in alike.values() for text in texts][:MAX_LISTED]
    return PairReport(
        path=config.pairs,
        counts=counts,
        image_sizes=usable.sizes,
        resolution=resolution,
        fit=config.fit,
        trained_at=usable.trained_at,
        captions=(min(lengths), statistics.median(lengths), max(lengths)) if lengths else None,
        measure=measure,
        long_captions=sum(n > measure.longest for n in lengths),
        first_preferred=counts["first"] / counts["labelled"] if counts["labelled"] else None,
        marked=statistics.median(usable.marked) if usable.marked else None,
        ratings=tuple(told.ratings),
        idle=tuple(told.idle),
        traits=usable.tally.shares(),
        giveaways=giveaways,
        example=usable.example,
        graphs=statistics_of(graphs),
        problems=(*problems, *whole),
        problems_total=total + len(whole),
    )


def _of_all(
    config: DataConfig, counts: Counter[str], giveaways: Sequence[Giveaway], total: int
) -> list[str]:
    """List the problems of the data as a whole, beside ``total`` of single rows."""
    found = [] if counts["pairs"] or total else [no_pairs(config.pairs, counts)]
    if text := mixed(counts):
        counts["mixed"] = 1
        found.append(f"{config.pairs}: {text}")
    odd = counts["mixed_shapes"] + counts["odd_shapes"]
    if config.fit == "drop" and odd and odd == counts["pairs"]:
        counts["bad_shapes"] = 1
        found.append(f"{config.pairs}: {left_out_text(odd, odd)}")
    if any(g.refused for g in giveaways) and not config.allow_giveaways:
        counts["giveaways"] = 1
        found.append(refusal(config.pairs, giveaways))
    return found


def _shown(rows: Iterable[Row], count: int | None, limit: int | None) -> Iterator[Row]:
    """Give the rows one after another, and show how many of them are read, if it takes long."""
    total = limit if count is None else min(count, limit or count)
    with tqdm(desc="check", total=total, unit="row", mininterval=1.0, delay=SOON) as bar:
        for row in rows:
            yield row
            bar.update(not row.left_out)


def _sizes_table(report: PairReport) -> list[str]:
    """List the sizes of training with their pairs, and say how many pairs have other shapes."""
    rows = [f"    {named(size):>9} {n:>8}" for size, n in report.trained_at.most_common()]
    odd = [
        f"{counted(n, 'pair')} {text}" for kind, text in _ODD.items() if (n := report.counts[kind])
    ]
    units = "images" if report.counts["single"] else "pairs"
    lines = [
        f"  training sizes for model.resolution={report.resolution}, and their {units}:",
        *rows,
    ]
    if small := report.counts["enlarged"]:
        images = counted(small, "image is", "images are")
        lines.append(f"    {images} enlarged more than twice, and so blurred")
    what = {"drop": "left out", "pad": "padded", "crop": "cropped"}[report.fit]
    return [*lines, f"    {what} by data.fit={report.fit}: {' and '.join(odd)}"] if odd else lines


def _left_out_line(counts: Counter[str]) -> str:
    """Say how many rows make no pair, by reason."""
    always = [counted(counts[kind], *LEFT_OUT[kind]) for kind in ("ties", "identical")]
    more = left_out_words({kind: counts[kind] for kind in ("unpaired", "unlabelled", "hidden")})
    return f"  left out: {', '.join([*always, *[more] * bool(more)])}"


def _edits_line(edits: int, what: str) -> list[str]:
    """Say how many pairs or images are of edits."""
    having = counted(edits, f"{what} has", f"{what}s have")
    return [f"  edits: {having} a source image"] if edits else []


def _turned_line(counts: Counter[str]) -> list[str]:
    """Say how many rows contradict others, and how several people's opinions are written."""
    what, remedy = "pair", "keep one label, or write all votes in one row (votes_0, votes_1)"
    if counts["single"]:
        what, remedy = "image", "keep one thumb, or write all thumbs of an image as a list"
    saying = counted(counts["turned"], f"{what} contradicts", f"{what}s contradict")
    return [f"{saying} an earlier row: {remedy}"] * bool(counts["turned"])


def _masks_line(report: PairReport, what: str) -> list[str]:
    """Say where errors count, if that is not everywhere."""
    if report.marked is None:
        return []
    counts, share = report.counts, f"{report.marked:.1%} of the pixels (median)"
    if masked := counts["masked"]:
        having = counted(masked, f"{what} has a mask", f"{what}s have masks")
        return [f"  masks: {having}; errors count in {share}"]
    both = f"{counted(counts['pairs'], 'pair')}, errors count where the two images differ"
    return [f"  masks: in {both}: {share}"]


def _ratings_line(ratings: Sequence[float]) -> list[str]:
    """Say between what numbers ratings lie: one scale for all people, or not."""
    if not ratings:
        return []
    total, least, most = ratings
    return [
        f"  ratings: {total:,.0f} between {least:g} and {most:g}, taken for one scale, higher is "
        "better"
    ]


def thumbs_text(counts: Counter[str]) -> str:
    """Say how many thumbs there are, and which methods can take them."""
    return (
        f"  thumbs: {counts['up']} up, {counts['down']} down; objective.name=kto and nft take each "
        f"image by itself, other methods pairs of the "
        f"{counted(counts['both'], 'prompt that has', 'prompts that have')} both"
    )


def _graph(row: Row) -> SceneGraph | Fault | None:
    """Read a row's scene graph, or why it is none; None if it has none, or is unusable anyway."""
    if row.fault or not row.scene_graph:
        return None
    try:
        return SceneGraph.from_json(row.scene_graph)
    except ValueError as error:
        text = f"{row.where}: scene_graph: {error}; write LAION-SG's JSON or leave it empty"
        return Fault("bad_graphs", text)


def tokens_of(folder: str | Path) -> Measure:
    """Measure captions in tokens, special ones included, of a pipeline's or a tokenizer's folder.

    DataError says that it holds no tokenizer, or that this does not say how many tokens are read.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    remedy = "give a diffusers pipeline's folder or its tokenizer folder"
    if not path.is_dir():
        raise DataError(f"{path} is no folder; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as many kinds as there are tokenizers
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} holds no tokenizer ({reason}); {remedy}") from error
    longest = int(tokenizer.model_max_length)
    if longest > 2**20:  # what transformers puts where the tokenizer does not say
        raise DataError(f"{path}: no model_max_length in tokenizer_config.json; write it there")
    return Measure(
        "tokens", longest, lambda c: len(tokenizer(c, truncation=False, verbose=False).input_ids)
    )


def format_report(report: PairReport) -> str:
    """Write the report as lines of text, problems last."""
    unit, longest, counts = report.measure.unit, report.measure.longest, report.counts
    what = "image" if counts["single"] else "pair"
    lines = [
        f"{report.path}: {counted(counts['pairs'], f'usable {what}')} in "
        + counted(counts["rows"], "row"),
        _left_out_line(counts),
        f"  kept: {counted(counts['duplicates'], f'duplicate {what}')}"
        + (f" ({counts['turned']} with the other label)" if counts["turned"] else "")
        + ("" if counts["single"] else f", {counts['mixed_sizes']} of two image sizes"),
        *([f"  for example, {report.example}"] if report.example else []),
        *([thumbs_text(counts)] if counts["up"] + counts["down"] else []),
        *_ratings_line(report.ratings),
        *_edits_line(counts["edits"], what),
        *_masks_line(report, what),
    ]
    if report.image_sizes:
        common = report.image_sizes.most_common(5)
        others = len(report.image_sizes) - len(common)
        more = f" and {counted(others, 'other size')}" if others else ""
        sizes = ", ".join(f"{w}x{h} ({count})" for (w, h), count in common)
        lines.append(f"  image sizes (images): {sizes}{more}")
        lines += _sizes_table(report)
    if report.captions is not None:
        least, median, most = report.captions
        lines.append(
            f"  caption {unit}: {least} to {most}, median {median:g}; "
            f"{counted(report.long_captions, 'caption')} over {longest} {unit}"
        )
    if report.first_preferred is not None:
        lines.append(f"  image 0 preferred: {report.first_preferred:.1%} (near 50% is unbiased)")
    if report.idle:
        more = f" and {n} more" if (n := len(report.idle) - ALIKE) > 0 else ""
        lines.append(f"  not read: {', '.join(map(repr, report.idle[:ALIKE]))}{more}")
    lines += format_shares(report.traits)
    lines += [f"  ! by their files, {g.who} are {g}" for g in report.giveaways]
    marked = [*_turned_line(counts), *oddities_text(counts), *odd_masks_text(counts)]
    lines += [f"  ! {text}" for text in marked]
    lines += format_statistics(report.graphs)
    kinds = ", ".join(counted(counts[k], text) for k, text in _PROBLEMS.items() if counts[k])
    head = f"  problems: {report.problems_total}{f' ({kinds})' * bool(kinds)}; rows count from 0"
    if report.ok and (
        marked or report.giveaways or not all(s.chance for s in report.traits.values())
    ):
        return "\n".join([*lines, "  no broken rows; look at what is marked with !"])
    return "\n".join([*lines, *listed(head, report.problems, report.problems_total)])
