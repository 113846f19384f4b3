"""Pictures made on demand: samples of reference and policy, and the path of an inversion.

Everything here runs in one thread at a time, under a lock: the machine has one accelerator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from inversion_dpo.data.buckets import square
from inversion_dpo.data.images import DataError, png
from inversion_dpo.data.source import open_pairs
from inversion_dpo.data.transforms import Size
from inversion_dpo.labels.questions import questions
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.web.pictures import Pictures

if TYPE_CHECKING:
    from inversion_dpo.models.sampler import Sampler

LoadSampler = Callable[[Config, Path | None], "Sampler"]  # (configuration, adapter)
MOST_PROMPTS = 200
FEW_PROMPTS = 6  # of data without a run


def load_sampler(config: Config, adapter: Path | None) -> Sampler:
    """Load a model, and only now what loads models: the page opens at once."""
    from inversion_dpo.evaluation.sides import sampler_of
    from inversion_dpo.run.quiet import quieten_libraries

    quieten_libraries()
    return sampler_of(config, adapter)


@dataclass(frozen=True)
class How:
    """How to sample. side: of the images, in pixels; None for each prompt's own size."""

    steps: int
    guidance: float
    side: int | None = None


def state_of(folder: Path) -> object:
    """Tell a folder's files from later ones under the same names, without reading them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return folder, *((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


class Studio:
    """Pipelines, loaded when they are first needed; the latest policy replaces the one before."""

    def __init__(
        self, config: Config, run: Path | None = None, load: LoadSampler = load_sampler
    ) -> None:
        self.config, self.run, self.pictures = config, run, Pictures()
        self._load, self._lock = load, RLock()
        self._loaded: dict[object, Sampler] = {}  # state of a policy, None for the reference

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts that the run is evaluated on, or else the first captions of the data."""
        if self.run:
            from inversion_dpo.evaluation.defaults import evaluation_prompts

            try:
                return evaluation_prompts(self.config)[:MOST_PROMPTS]
            except ConfigError:  # no such file: the data has captions
                pass
        found = questions(self.config.data, 2 * FEW_PROMPTS, Counter(), alone=True)
        return list(dict.fromkeys(question.caption for question in found))

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The size of each of these prompts' images."""
        if not self.run:
            return {}
        from inversion_dpo.evaluation.defaults import evaluation_sizes

        try:
            sizes = evaluation_sizes(self.config, self.prompts)
        except ConfigError:
            return {}
        return dict(zip(self.prompts, sizes, strict=True))

    @cached_property
    def sources(self) -> dict[str, Path]:
        """The file of the image that each of these prompts edits; held-out ones go to the run."""
        from inversion_dpo.evaluation.defaults import with_sources
        from inversion_dpo.evaluation.sides import sources_for

        found = sources_for(with_sources(self.config, self.run), self.prompts) if self.run else []
        return {p: source for p, source in zip(self.prompts, found, strict=False) if source}

    @cached_property
    def _edits(self) -> bool:
        """Whether the pairs are edits, as far as they can be read."""
        with suppress(DataError):
            return open_pairs(self.config.data).edits
        return False

    def source(self, prompt: str) -> str | None:
        """Name the image that a prompt edits; None if it edits none."""
        return (
            self.pictures.add(self.sources[prompt].read_bytes()) if prompt in self.sources else None
        )

    def pair(self, number: int) -> tuple[str, list[str]] | None:
        """Read a pair of the data by its place: its caption and the names of its images."""
        found = next(islice(questions(self.config.data, None, Counter()), number, None), None)
        if found is None:
            return None
        return found.caption, [self.pictures.add(image) for image in found.images]

    def sampler(self, folder: Path | None) -> Sampler:
        """Load the reference, or the policy saved in a folder, as it is now."""
        if (state := state_of(folder) if folder else None) not in self._loaded:
            if folder:  # one policy at a time
                self._loaded = {k: v for k, v in self._loaded.items() if k is None}
            self._loaded[state] = self._load(self.config, folder)
        return self._loaded[state]

    def draw(
        self, folder: Path | None, prompts: list[str], seeds: list[int], how: How
    ) -> list[bytes]:
        """Sample a PNG image for each prompt, from the seed beside it."""
        if not self.run and self._edits and not {*self.prompts}.isdisjoint(prompts):
            from inversion_dpo.models.base import ModelError

            raise ModelError(
                "these prompts edit images, and without a run no source is at hand: train one, and "
                "open its folder by `inversion-dpo web`"
            )
        with self._lock:
            sampler = self.sampler(folder)
            sampler = sampler.under(sample_steps=how.steps, guidance_scale=how.guidance)
            usual = square(self.config.model.resolution)
            own = [self.sizes.get(prompt, usual) for prompt in prompts]
            sizes = [(how.side, how.side)] * len(prompts) if how.side else own
            from inversion_dpo.evaluation.sides import opened

            sources = [opened(self.sources.get(prompt)) for prompt in prompts]
            drawn = sampler.draw(prompts, seeds, sizes=sizes, sources=sources)
            return [png(image) for image in drawn]

    def inversion(self, data: bytes, caption: str) -> dict[str, Any]:
        """Invert an encoded image under the reference and sample back, see :func:`.film.film`."""
        from inversion_dpo.models.base import ModelError
        from inversion_dpo.web.film import film

        with self._lock:
            edits = self._edits or self.sampler(None).model.edits in ("must", "reads")
            if edits or self.sources:
                raise ModelError("no film strip of an edit: it would lack the source image")
            return film(self.sampler(None), self.config, (data, caption), self.pictures.add)
