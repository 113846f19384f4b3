"""Labels to pairs that ``train`` reads: Parquet in Pick-a-Pic's columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.columns import WRITTEN
from inversion_dpo.labels.questions import Question, WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.votes import CHOICES, UNSURE, outcome, share
from inversion_dpo.run.disk import MARK, writing
from inversion_dpo.run.words import counted

LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5, "split": 0.5}
KEPT = (*LABELS, "up", "down", "rated")  # outcomes that are written
_WRITE_ROWS = 64  # rows in memory at a time
_OPINIONS = {"thumbs": "thumbs", "ratings": "scores"}  # kind of single images -> their column
_MORE = {  # table of the store -> the column that some data have
    "sources": ("source_image", pa.binary()),
    "masks": ("mask", pa.binary()),
    "prompts": ("prompt_id", pa.string()),
}
_PAIRS = pa.schema(
    [
        *WRITTEN,
        ("preference_0", pa.float64()),
        ("scene_graph", pa.string()),
        ("seed_0", pa.int64()),
        ("seed_1", pa.int64()),
        *((f"votes_{choice}", pa.int64()) for choice in CHOICES),
    ]
)


def _schema(store: LabelStore) -> pa.Schema:
    """Give the columns that are written; each labeller's thumb or score is in the list."""
    kind, more = store.kind, [column for table, column in _MORE.items() if store.has(table)]
    if kind not in _OPINIONS:
        return pa.schema([*_PAIRS, *more])
    fields = [("image", pa.binary()), (_OPINIONS[kind], pa.list_(pa.float64()))]
    return pa.schema([*fields, ("caption", pa.string()), ("scene_graph", pa.string()), *more])


def export(store: LabelStore, path: Path, labeller: str | None = None) -> Counter[str]:
    """Write the labelled pairs; an old file is replaced only once all is written.

    Several labellers: the choice with the most votes; without a single one the pair is a tie
    ("split"). ``preference_0`` is the share of votes for image 0. Pairs whose outcome is "both bad"
    are left out. Of single images each one's thumb or
    rating is written.

    Args:
        store: the labels.
        path: of the Parquet file.
        labeller: take only this one's labels.

    Returns:
        Outcome -> pairs: first, second, tie, split, bad, unlabelled; of single images up, down,
        split, rated, unsure, unlabelled.

    Raises:
        WebError: nothing is labelled with a preference, a tie, a thumb or a rating.
    """
    counts = Counter[str]()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(store, labeller, counts)
    schema = _schema(store).with_metadata({MARK: "pairs export"})
    with writing(path, shared=True) as partial:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            while part := list(islice(rows, _WRITE_ROWS)):
                writer.write_table(pa.Table.from_pylist(part, schema))
        if not any(counts[name] for name in KEPT):
            text = summary(counts, store.kind)
            raise WebError(f"{store.path}: nothing to export ({text}); label some {store.kind}")
    return counts


def _rows(
    store: LabelStore, labeller: str | None, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Give the rows to be written; count every pair's outcome in ``counts``."""
    votes = store.votes()
    known = sorted({name for by in votes.values() for name in by})
    if labeller is not None and labeller not in known:
        raise WebError(
            f"{store.path}: no label is of {labeller!r}; they are of {', '.join(known) or 'nobody'}"
        )
    for question in store.pairs():
        by = votes.get(question.pair, {})
        chosen = [c for name, c in by.items() if labeller in (None, name)]
        if store.kind in _OPINIONS:
            yield from _opinion(store.kind, question, chosen, counts)
            continue
        found = outcome(chosen)
        counts[found] += 1
        if found in LABELS:
            yield {
                "jpg_0": question.images[0],
                "jpg_1": question.images[1],
                "label_0": LABELS[found],
                "preference_0": share(chosen),
                "caption": question.caption,
                "scene_graph": question.scene_graph,
                **{f"seed_{k}": seed for k, seed in enumerate(question.seeds)},
                **_more(question),
                **{f"votes_{choice}": chosen.count(choice) for choice in CHOICES},
            }


def _opinion(
    kind: str, question: Question, chosen: list[str], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Give the row of a single image, unless nobody has an opinion on it."""
    sure = [choice for choice in chosen if choice != UNSURE]
    counts[("rated" if kind == "ratings" else outcome(sure)) if sure else outcome(chosen)] += 1
    if sure:
        yield {
            "image": question.images[0],
            _OPINIONS[kind]: [float(c == "up") if kind == "thumbs" else float(c) for c in sure],
            "caption": question.caption,
            "scene_graph": question.scene_graph,
            **_more(question),
        }


def _more(question: Question) -> dict[str, Any]:
    """Give what only some data have."""
    return {"source_image": question.source, "mask": question.mask, "prompt_id": question.group}


def summary(counts: Mapping[str, int], kind: str = "pairs") -> str:
    """Say what an export holds, in one line."""
    if kind in _OPINIONS:
        written = {k: counts[k] for k in ("up", "down", "split", "rated") if counts.get(k)}
        detail = "".join(f", {n} {k}" for k, n in written.items() if k != "rated")
        left = f"{counts.get(UNSURE, 0)} unsure, {counts.get('unlabelled', 0)} not labelled"
        return f"{counted(sum(written.values()), 'image')}{detail}; left out: {left}"
    kept = sum(counts.get(name, 0) for name in LABELS)
    ties, split = counts.get("tie", 0), counts.get("split", 0)
    return (
        f"{counted(kept, 'pair')}: {counted(kept - ties - split, 'preference')}, "
        f"{counted(ties, 'tie')}, {split} contradicted "
        "without a majority (written as ties; training leaves ties out); left out: "
        f"{counts.get('bad', 0)} both bad, {counts.get('unlabelled', 0)} not labelled"
    )
