"""Seeded sampling through the pipeline itself: what users will get is what is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.base import OVERFLOW, DiffusionModel, ModelError
from inversion_dpo.models.graph_model import SceneGraphModel
from inversion_dpo.models.loading import adapt
from inversion_dpo.models.prompts import call_arguments
from inversion_dpo.models.schedules import grid_for
from inversion_dpo.run.config import Config

logger = logging.getLogger(__name__)
Prompt = str | SceneGraph  # a scene graph stands for its caption and itself


def no_graph(prompt: str) -> SceneGraph | None:
    """Know no scene graph of any prompt."""
    return None


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

    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, desc: str | None = None
    ) -> list[NDArray[np.uint8]]:
        """Sample one image for each prompt; its noise depends on its seed alone.

        Args:
            prompts: texts, or scene graphs with their captions.
            seeds: one for each prompt; the same seed gives the same noise under any weights.
            desc: name of a progress bar; without one there is no bar.

        Returns:
            Images [H, W, 3], uint8.

        Raises:
            ConfigError: the schedule has not so many steps.
            ValueError: there are not as many seeds as prompts.
            ModelError: an image has values that are not finite.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        e, side, images = self.config.evaluation, self.config.model.resolution, []
        grid_for(self.model.schedule, "evaluation.sample_steps", e.sample_steps)
        asked = [p if isinstance(p, SceneGraph) else SceneGraph((), (), p) for p in prompts]
        with tqdm(total=len(asked), desc=desc, unit="image", disable=desc is None) as bar:
            for start in range(0, len(asked), e.batch_size):
                part = slice(start, start + e.batch_size)
                output = self.pipeline(
                    **self._conditions(asked[part]),
                    generator=[torch.Generator().manual_seed(int(s)) for s in seeds[part]],
                    num_inference_steps=e.sample_steps,
                    **self.model.call(e.guidance_scale, len(asked[part])),
                    height=side,
                    width=side,
                    output_type="np",
                )
                drawn = output.images if hasattr(output, "images") else output.frames[:, 0]
                for graph, seed, image in zip(asked[part], seeds[part], drawn, strict=True):
                    if not np.isfinite(image).all():
                        raise ModelError(
                            f"{graph.caption!r}, seed {seed}: the sample has {OVERFLOW}"
                        )
                    images.append(np.round(image * 255).astype(np.uint8))
                bar.update(len(drawn))
        return images

    def _conditions(self, asked: list[SceneGraph]) -> dict[str, Any]:
        """Give the pipeline text to encode itself, or what the text is encoded to."""
        captions = [graph.caption for graph in asked]
        if not self.takes_graphs and self.config.model.prompt_chunks == 1:
            return {"prompt": captions}
        graphs = None
        if self.takes_graphs:
            graphs = [g if g.items else self.graph_of(g.caption) for g in asked]
            if missing := graphs.count(None):
                logger.warning(
                    "%d of %d prompts have no scene graph: the prompt alone conditions them",
                    missing,
                    len(asked),
                )
        both = self.model.empty(), self.model.condition(captions, graphs)
        if isinstance(self.model, SceneGraphModel):
            with torch.no_grad():
                both = self.model.embedded(both[0]), self.model.embedded(both[1])
        return dict(call_arguments(*both))
