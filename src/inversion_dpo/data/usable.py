"""What is counted of raw rows, and of the rows that can be trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from PIL import Image

from inversion_dpo.data.buckets import Place, Resolution, buckets, place
from inversion_dpo.data.giveaways import Files
from inversion_dpo.data.images import DataError
from inversion_dpo.data.masks import mask_oddities, region
from inversion_dpo.data.rows import NO_ROWS, Fault, Raw, Row, inspect, number
from inversion_dpo.data.source import content
from inversion_dpo.data.traits import Tally, oddities, traits
from inversion_dpo.data.transforms import Size
from inversion_dpo.data.units import flat
from inversion_dpo.run.fields import DataConfig

MEASURED_PAIRS = 1000  # pairs whose pixels are measured for giveaways


class Told:
    """What raw rows tell before anything is made of them."""

    def __init__(self) -> None:
        self.idle, self.ratings = dict[str, None](), list[float]()  # number, least, most
        self.rows = 0

    def watch(self, raws: Iterable[Raw]) -> Iterator[Raw]:
        """Pass on rows; count them, note what is not read, and between what numbers ratings lie."""
        for raw in raws:
            stray = raw.fault and raw.fault.kind == "strays"
            self.rows += not (raw.fault and raw.fault.kind in NO_ROWS)
            self.idle |= dict.fromkeys([raw.where] if stray else raw.table.idle)
            scores = raw.values.get("scores") if raw.table.kind == "scored" else None
            for x in map(number, flat(scores)):
                if isinstance(x, float) and math.isfinite(x):
                    total, least, most = self.ratings or (0, x, x)
                    self.ratings = [total + 1, min(least, x), max(most, x)]
            yield raw


class Usable:
    """What is counted of the rows that can be trained on, one after another.

    length: of a caption.
    """

    def __init__(
        self, config: DataConfig, length: Callable[[str], int], resolution: Resolution
    ) -> None:
        self.fit, self.mask, self.length = config.fit, config.mask, length
        self.sizes_of_training = buckets(resolution)
        self.counts, self.lengths, self.example = Counter[str](), list[int](), ""
        self.sizes, self.trained_at = Counter[tuple[int, int]](), Counter[Size]()
        self.tally, self.files, self.marked = Tally(), Files(), list[float]()
        self.kinds = Counter[bool]()
        self._seen, self._thumbs = dict[bytes, int](), dict[object, set[object]]()

    def _place(self, row: Row, images: Sequence[Image.Image]) -> Place:
        shapes = [image.size[::-1] for image in images[: len(images) - (row.mask is not None)]]
        return place(self.sizes_of_training, shapes, self.fit)

    def look(self, row: Row) -> tuple[list[Fault], list[Image.Image]]:
        """List what is wrong with a row, as training would, and give its sound images."""
        found, images = inspect(row)
        return found or self._nowhere(row, images), images

    def _nowhere(self, row: Row, images: Sequence[Image.Image]) -> list[Fault]:
        """Measure which part of sound images counts; the fault is that none does."""
        mask = images[-1] if row.mask else None
        differ = self.mask == "differ" and not row.single
        at = self._place(row, images)
        if at.fit and (mask or differ):
            both = images[:2][:: 1 if row.label else -1]
            try:
                found = region(both, mask, at.size, at.fit, row.where)
            except DataError as error:
                return [Fault("broken_images", str(error))]
            self.marked.append(float(found.mean()))
        return []

    def add(self, row: Row, images: Sequence[Image.Image]) -> None:
        """Count a row and its images, those of a source and a mask among them."""
        counts, masked = self.counts, row.mask is not None
        at = self._place(row, images)
        counts.update(mask_oddities(images[-1]) if masked else ())
        images = images[: 2 - row.single]
        key, row_sizes = content(row), [image.size for image in images]
        won = row.label if row.single else row.encoded[:: 1 if row.label else -1][0]
        counts.update(pairs=1, duplicates=int(key in self._seen), labelled=int(row.labelled))
        counts.update(turned=int(self._seen.setdefault(key, hash(won)) != hash(won)))
        counts.update(mixed_sizes=len(set(row_sizes)) > 1, edits=row.source is not None)
        counts["masked"] += masked
        counts["single"] += row.single
        counts["first"] += int(row.labelled and row.label == 1.0)
        self.example = self.example or in_words(row)
        self.sizes.update(row_sizes)
        counts.update([at.odd] if at.odd else [])
        counts["enlarged"] += sum(4 * w * h < math.prod(at.size) for w, h in row_sizes)
        self.trained_at.update([at.size] if at.fit else [])
        self.lengths.append(self.length(row.caption or ""))
        if row.preference is not None and row.single:
            counts.update(["down" if row.label == 0.0 else "up"])
            self._thumbs.setdefault((row.caption, row.source), set()).add(row.label)
        if row.single:
            kind = row.label == 1.0
            self.kinds[kind] += 1
            measured = images[: self.kinds[kind] <= MEASURED_PAIRS]
            self.files.add_single(row.encoded[0], kind, *measured)
        else:
            order = 1 if row.label else -1
            self.tally.add(*map(traits, images[::order]))
            counts.update(oddities(images))
            few = self.tally.pairs <= MEASURED_PAIRS
            self.files.add(row.encoded[::order], images[::order][: 2 * few])

    @property
    def both(self) -> int:
        """Prompts that have a thumb up and a thumb down."""
        return sum(len(labels) == 2 for labels in self._thumbs.values())


def in_words(row: Row) -> str:
    """Say which image of a row is over which, so that reversed labels are seen."""
    prompt = " ".join((row.caption or "").split())[:80]
    first, second = row.called[:: 1 if row.label or row.single else -1]
    return f'prompt "{prompt}": {first}' + f" over {second}" * (not row.single)
