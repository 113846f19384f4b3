"""What files give away: a shape, size, format or compression that tells winners from losers.

A policy learns it in place of the preference. Each trait alone predicts the winner; how well it
does is bounded from below by Clopper and Pearson's exact interval (1934,
https://doi.org/10.1093/biomet/26.4.404).
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import betaincinv

from inversion_dpo.data.images import DataError, upright_size
from inversion_dpo.data.source import Pair, PairSource
from inversion_dpo.data.traits import oddities, oddities_text
from inversion_dpo.run.disk import read_json, writing

PAIRS, DECODED = 500, 128  # pairs looked at before a training: file headers, and pixels
MOST = 10_000  # single images that are looked at, or wait for one of the other kind
ALPHA = 0.001  # of the two-sided interval; small, as a dozen traits are looked at
LIMIT, MEASURED_LIMIT = 0.55, 0.75  # a larger bound is refused; content moves what is measured
SIDE = 512  # pixels of an image's top left corner that are measured
# trait -> the least difference, and winners in words that have more of it or less; the last three
# are measured, since content changes them, too
TRAITS = {
    "aspect": (0.0, "wider in shape", "narrower in shape"),
    "square": (0.0, "closer to a square", "further from a square"),
    "pixels": (0.0, "larger", "smaller"),
    "quantisation": (0.0, "JPEG of lower quality", "JPEG of higher quality"),
    "bytes": (0.4, "stored in more bytes a pixel", "stored in fewer bytes a pixel"),
    "sharpness": (1.0, "sharper in the finest detail", "blurred as by enlarging"),
    "blocks": (0.1, "fuller of JPEG blocks", "freer of JPEG blocks"),
}
MEASURED = ("bytes", "sharpness", "blocks")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Giveaway:
    """A trait that winners and losers differ in by more than chance.

    words: how winners are. hits: winners that are so, among ``differing`` of ``pairs``. least: how
    often the trait alone finds the winner, at least. refused: whether this is too often. single:
    whether a pair is an image that is liked, and another one that is not.
    """

    words: str
    hits: int
    differing: int
    pairs: int
    least: float
    refused: bool
    single: bool = False

    @property
    def who(self) -> str:
        """Name those that the words are about."""
        return "liked images" if self.single else "winners"

    def __str__(self) -> str:
        where = "" if self.differing == self.pairs else f" that differ, of {self.pairs}"
        return f"{self.words} in {self.hits} of {self.differing} pairs{where}"


class Files:
    """Counts, trait by trait, which of a pair's two files has more of it.

    Of single images one that is liked and one that is not make a pair, in their order.
    """

    def __init__(self) -> None:
        self.pairs = Counter[bool]()  # by whether pixels were measured
        self.more, self.less = Counter[str](), Counter[str]()
        self.single = False
        self._waiting: dict[bool, deque[dict[str, float]]] = {True: deque(), False: deque()}

    def add(self, encoded: Sequence[bytes], decoded: Sequence[Image.Image] = ()) -> None:
        """Count one pair, the winner first; what is measured only where images are decoded."""
        images = decoded or (None, None)
        first, second = (_all_traits(*each) for each in zip(encoded, images, strict=True))
        self._count(first, second)

    def add_single(self, encoded: bytes, liked: bool, decoded: Image.Image | None = None) -> None:
        """Count an image and an earlier one of the other kind, or let it wait for one."""
        self.single, found = True, _all_traits(encoded, decoded)
        if others := self._waiting[not liked]:
            self._count(*(found, others.popleft())[:: 1 if liked else -1])
        elif len(self._waiting[liked]) < MOST:
            self._waiting[liked].append(found)

    def _count(self, first: dict[str, float], second: dict[str, float]) -> None:
        decoded = "blocks" in first and "blocks" in second
        self.pairs.update([False, *[True] * decoded])
        for name in first.keys() | second.keys():
            if name in TRAITS and not (name in first and name in second):
                continue  # the quality of a JPEG beside a PNG
            if name in MEASURED and not decoded:
                continue
            gap = first.get(name, 0.0) - second.get(name, 0.0)
            if abs(gap) > TRAITS.get(name, (0.0,))[0]:
                (self.more if gap > 0 else self.less)[name] += 1

    def found(self) -> list[Giveaway]:
        """List what chance does not explain, the surest first."""
        found = []
        for name in self.more.keys() | self.less.keys():
            more, less, pairs = self.more[name], self.less[name], self.pairs[name in MEASURED]
            hits, differing = max(more, less), more + less
            low = float(betaincinv(hits, differing - hits + 1, ALPHA / 2))
            _, *words = TRAITS.get(name, (0.0, name, f"not {name}"))
            least = 0.5 + (low - 0.5) * differing / pairs
            warned, refused = (LIMIT, MEASURED_LIMIT) if name in MEASURED else (0.5, LIMIT)
            if least > warned:
                word = words[0] if more > less else words[1]
                sure = least > refused
                found.append(Giveaway(word, hits, differing, pairs, least, sure, self.single))
        return sorted(found, key=lambda g: (-g.least, g.words))


def _all_traits(data: bytes, image: Image.Image | None) -> dict[str, float]:
    measured = pixel_traits(np.asarray(image.convert("L"), np.float32)) if image else {}
    return traits_of(data) | measured


def traits_of(data: bytes) -> dict[str, float]:
    """Read a file's traits from its header; what it is, format or size, counts as 1."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = upright_size(image)
        tables = getattr(image, "quantization", None)
        aspect = round(math.log(width / height), 6)
        found = {
            f"{width}x{height}": 1.0,
            f"{image.format}": 1.0,
            "aspect": aspect,
            "square": -abs(aspect),
            "pixels": float(width * height),
            "bytes": math.log(len(data) / (width * height)),
        }
    if tables:
        found["quantisation"] = float(np.mean([v for table in tables.values() for v in table]))
    return found


def pixel_traits(luma: NDArray[np.float32]) -> dict[str, float]:
    """Measure what resizing and JPEG leave in grey pixels [H, W] of 0 to 255.

    sharpness: log of the power in the finest third of frequencies over that in the middle; without
    content, such as in a flat image, it is 0. blocks: log of the steps across the borders of 8x8
    blocks over the other steps.
    """
    luma = luma[:SIDE, :SIDE]
    h, w = luma.shape
    window = np.outer(np.hanning(h + 2)[1:-1], np.hanning(w + 2)[1:-1])
    power = np.abs(np.fft.rfft2((luma - luma.mean()) * window)) ** 2 / (window**2).sum()
    f = np.maximum(np.abs(np.fft.fftfreq(h))[:, None], np.fft.rfftfreq(w))
    high, middle = (power[(f > a) & (f <= b)] for a, b in ((1 / 3, 0.5), (0.1, 0.25)))
    bands = [math.log(band.mean() + 1.0) if band.size else 0.0 for band in (high, middle)]
    axes = [k for k in (0, 1) if luma.shape[k] > 8]
    blocks = 0.0
    if axes:
        steps = np.concatenate([np.abs(np.diff(luma, axis=k)).mean(1 - k) for k in axes])
        edge = np.concatenate([np.arange(1, luma.shape[k]) % 8 == 0 for k in axes])
        blocks = math.log((steps[edge].mean() + 0.1) / (steps[~edge].mean() + 0.1))
    return {"sharpness": bands[0] - bands[1], "blocks": blocks}


def refuse_giveaways(pairs: PairSource, memo: Path) -> None:
    """Look at the first pairs before hours are spent; warn, or stop, where files give labels away.

    Args:
        pairs: read only if ``memo`` is missing.
        memo: the file that keeps what was found.

    Raises:
        DataError: a trait finds the winner too often, and ``data.allow_giveaways`` is not set.
    """
    files, odd, name = Files(), Counter[str](), pairs.config.pairs
    if not memo.exists():
        for pair, images in _looked_at(pairs):
            if pair.single:
                files.add_single(pair.winner, pair.preference > 0.5, *images[:1])
            elif pair.winner != pair.loser:
                files.add((pair.winner, pair.loser), images)
                odd.update(oddities(images) if images else [])
        memo.parent.mkdir(parents=True, exist_ok=True)
        with writing(memo, shared=True) as partial:  # by every process of a launch
            partial.write_text(json.dumps([asdict(giveaway) for giveaway in files.found()]))
    for text in oddities_text(odd):
        _log.warning("%s: of the first pairs, %s", name, text)
    found = [Giveaway(**giveaway) for giveaway in read_json(memo, list)]
    if any(g.refused for g in found) and not pairs.config.allow_giveaways:
        raise DataError(refusal(name, found))
    if found:
        _log.warning(giveaways_text(name, found))


def _looked_at(pairs: PairSource) -> Iterator[tuple[Pair, Sequence[Image.Image]]]:
    """Give the first pairs, or the first single images of each kind; the very first decoded."""
    seen = Counter[bool]()  # pairs count as preferred
    for pair in pairs.read(0):
        kind = not pair.single or pair.preference > 0.5
        seen[kind] += 1
        if seen[kind] <= PAIRS:
            yield pair, pair.images if seen[kind] <= DECODED else ()
        if seen[True] >= PAIRS and not (
            pair.single and seen[False] < PAIRS and seen.total() < MOST
        ):
            return


def refusal(name: str, found: Sequence[Giveaway]) -> str:
    """Say what files give away and how to go on all the same."""
    return f"{giveaways_text(name, found)}, or set data.allow_giveaways=true"


def giveaways_text(name: str, found: Sequence[Giveaway]) -> str:
    """Say what files give away, and the remedy."""
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    one = found[0]
    others, what = ("the others", "all images") if one.single else ("losers", "both of a pair")
    return (
        f"{name}: the files tell {one.who} from {others}. {one.who.capitalize()} are "
        f"{'; '.join(map(str, found[:4]))}{more}. A policy learns this in place of the preference: "
        f"save {what} in one shape, size, format and quality"
    )
