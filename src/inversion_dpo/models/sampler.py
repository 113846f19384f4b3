"""Seeded sampling through the pipeline itself: what users will get is what is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from inversion_dpo.data.buckets import buckets, named, nearest, square
from inversion_dpo.data.transforms import Size, fit
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.base import OVERFLOW, DiffusionModel, ModelError, is_told_guidance
from inversion_dpo.models.graph_model import SceneGraphModel
from inversion_dpo.models.loading import adapt
from inversion_dpo.models.prompts import call_arguments, overlong, overlong_text
from inversion_dpo.models.schedules import grid_for
from inversion_dpo.run.config import Config
from inversion_dpo.run.words import counted

logger = logging.getLogger(__name__)
Prompt = str | SceneGraph  # a scene graph stands for its caption and itself


def no_graph(prompt: str) -> SceneGraph | None:
    """Know no scene graph of any prompt."""
    return None


def check_sources(model: DiffusionModel, sources: Sequence[object]) -> None:
    """Refuse prompts without the image that the model edits, and images where it edits none."""
    kind = type(model.pipeline).__name__
    if model.edits in ("must", "reads") and not all(sources):
        raise ModelError(
            f"{kind} edits images: give each prompt its source image (docs/how-to/edits.md)"
        )
    if model.edits == "never" and any(sources):
        raise ModelError(f"{kind} draws from text alone: leave the source images out")


def check_sizes(model: DiffusionModel, sizes: Iterable[Size]) -> None:
    """Refuse a size of images that the model does not draw."""
    for size in sizes:
        if any(side % model.multiple for side in size):
            raise ModelError(
                f"images of {named(size)}: both sides must be multiples of {model.multiple} here"
            )


def check_guidance(model: DiffusionModel, scale: float, key: str) -> None:
    """Refuse a guidance below 1, where pipelines draw as at 1: they do not guide.

    Args:
        model: that is sampled.
        scale: of its samples.
        key: the setting that has it.

    Raises:
        ModelError: names the setting.
    """
    if scale < 1 and not is_told_guidance(model):
        raise ModelError(
            f"{key}={scale:g} is below 1, and {type(model.pipeline).__name__} draws every value "
            "below 1 as 1, which is no guidance. Set it to 1; where a model card says 0, that is "
            "meant"
        )


@dataclass(frozen=True)
class Sampler:
    """A pipeline with its settings: the page, the evaluation and the commands draw alike.

    pipeline: of diffusers, with the policy on it. config: of it ``model`` and ``evaluation``.
    graph_of: the scene graph that a bare prompt asks for, where a model takes graphs.
    """

    pipeline: Any
    config: Config
    graph_of: Callable[[str], SceneGraph | None] = no_graph

    @cached_property
    def model(self) -> DiffusionModel:
        """The pipeline's adapter, which reads prompts as training does."""
        m = self.config.model
        return adapt(self.pipeline, m.resolution, m.guidance_embed, m.prompt_chunks)

    @property
    def takes_graphs(self) -> bool:
        """Say whether a scene-graph encoder is installed."""
        return getattr(self.pipeline, "scene_graph", None) is not None

    def under(self, **evaluation: Any) -> Sampler:
        """Return the same pipeline under other settings of ``evaluation``."""
        changed = replace(self.config.evaluation, **evaluation)
        return replace(self, config=replace(self.config, evaluation=changed))

    def warn_of_cut(self, prompts: Sequence[Prompt]) -> None:
        """Warn of prompts that lose their end, each counted once."""
        texts = [*{p if isinstance(p, str) else p.caption for p in prompts}]
        cut = overlong(self.model, texts)
        if text := overlong_text(cut, self.model, None, counted(len(texts), "prompt")):
            logger.warning(text)

    def draw(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        sizes: Sequence[Size] | None = None,
        sources: Sequence[Image.Image | None] = (),
        desc: str | None = None,
    ) -> list[NDArray[np.uint8]]:
        """Sample one image for each prompt; its noise depends on its seed alone.

        Args:
            prompts: texts, or scene graphs with their captions.
            seeds: one for each prompt; the same seed gives the same noise under any weights.
            sizes: (height, width) of each image in pixels; by default ``model.resolution``, and
                near the shape of its source.
            sources: the image that each prompt edits, where the model edits.
            desc: name of a progress bar; without one there is no bar.

        Returns:
            Images [H, W, 3], uint8.

        Raises:
            ConfigError: the schedule has not so many steps.
            ValueError: there are not as many seeds as prompts.
            ModelError: values of an image that are not finite, or a size, a guidance or a source
                that the model does not take, or no source where it edits one.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        e, images = self.config.evaluation, dict[int, NDArray[np.uint8]]()
        check_guidance(self.model, e.guidance_scale, "evaluation.guidance_scale")
        grid_for(self.model.schedule, "evaluation.sample_steps", e.sample_steps)
        check_sources(self.model, sources := list(sources) or [None] * len(prompts))
        sizes = sizes or [self._size_for(source) for source in sources]
        check_sizes(self.model, sizes)
        asked = [p if isinstance(p, SceneGraph) else SceneGraph((), (), p) for p in prompts]
        with tqdm(total=len(asked), desc=desc, unit="image", disable=desc is None) as bar:
            for size, part in self._batches(sizes, alone=any(sources)):
                here, source = [asked[k] for k in part], sources[part[0]]
                edited = self._edited(source, size) if source else {}
                output = self.pipeline(
                    **self._conditions(here),
                    generator=[torch.Generator().manual_seed(int(seeds[k])) for k in part],
                    num_inference_steps=e.sample_steps,
                    **self.model.call(e.guidance_scale, len(here)),
                    **edited,
                    height=size[0],
                    width=size[1],
                    output_type="np",
                )
                drawn = output.images if hasattr(output, "images") else output.frames[:, 0]
                for k, image in zip(part, drawn, strict=True):
                    if not np.isfinite(image).all():
                        raise ModelError(
                            f"{asked[k].caption!r}, seed {seeds[k]}: the sample has {OVERFLOW}"
                        )
                    images[k] = np.round(image * 255).astype(np.uint8)
                bar.update(len(drawn))
        return [images[k] for k in range(len(asked))]

    def _size_for(self, source: Image.Image | None) -> Size:
        """Choose the size of an image that edits a source, or of any other."""
        resolution = self.config.model.resolution
        if source is None:
            return square(resolution)
        return nearest(buckets(resolution), (source.height, source.width))

    def _edited(self, source: Image.Image, size: Size) -> dict[str, Any]:
        """Bring a source to its size, and give it to the pipeline."""
        return self.model.edit(fit(source, self.model.source_size(size), "crop").image)

    def _batches(
        self, sizes: Sequence[Size], *, alone: bool = False
    ) -> Iterator[tuple[Size, list[int]]]:
        """Divide images into batches of one size.

        ``alone``: one image a batch, as a pipeline takes one source.
        """
        most = 1 if alone else self.config.evaluation.batch_size
        for size in dict.fromkeys(sizes):
            places = [k for k, other in enumerate(sizes) if other == size]
            yield from ((size, places[k : k + most]) for k in range(0, len(places), most))

    def _conditions(self, asked: list[SceneGraph]) -> dict[str, Any]:
        """Give the pipeline text to encode itself, or what the text is encoded to."""
        captions, model = [graph.caption for graph in asked], self.model
        if not isinstance(model, SceneGraphModel):
            if self.config.model.prompt_chunks == 1:
                return {"prompt": captions}
            return dict(call_arguments(model.empty(), model.condition(captions)))
        graphs = [g if g.items else self.graph_of(g.caption) for g in asked]
        if missing := graphs.count(None):
            logger.warning(
                "%d of %d prompts have no scene graph: the prompt alone conditions them",
                missing,
                len(asked),
            )
        both = model.empty(), model.condition(captions, graphs)
        with torch.no_grad():
            return dict(call_arguments(*map(model.embedded, both)))
