"""Seeded sampling through the pipeline itself: what users will get is what is measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.graph_model import SceneGraphModel
from inversion_dpo.models.loading import adapt
from inversion_dpo.models.prompts import call_arguments
from inversion_dpo.world.captions import parse_caption

logger = logging.getLogger(__name__)


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    batch_size: int = 16,
    desc: str | None = "sample",
    resolution: int | None = None,
    prompt_chunks: int = 1,
    graphs: Sequence[SceneGraph | None] | None = None,
) -> list[NDArray[np.uint8]]:
    """One image [H, W, 3] per (prompt, seed); the noise depends on the seed alone.

    The same seed gives the same starting noise for any weights and any batch size. Images are
    squares of ``resolution`` pixels, or of the pipeline's own size. Prompts are read in
    ``prompt_chunks``, as they are for training. ``desc``: None shows no bar. With a scene-graph
    encoder installed, each prompt comes with its graph: the given one, or that which a caption of
    the embedded world says, or the empty one, of which a warning tells.
    ValueError if there are not as many seeds as prompts.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    graphs = graphs_of(pipeline, prompts, graphs)
    images: list[NDArray[np.uint8]] = []
    bar = tqdm(total=len(prompts), desc=desc, unit="image", mininterval=1.0, disable=desc is None)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds[part]]
        output = pipeline(
            **_prompts(pipeline, list(prompts[part]), prompt_chunks, graphs and graphs[part]),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            output_type="np",
        ).images
        images += [np.round(image * 255).astype(np.uint8) for image in output]
        bar.update(len(output))
    bar.close()
    return images


def graphs_of(
    pipeline: Any, prompts: Sequence[str], graphs: Sequence[SceneGraph | None] | None
) -> list[SceneGraph | None] | None:
    """The graph of each prompt if the pipeline has an encoder of them, else None."""
    if getattr(pipeline, "scene_graph", None) is None:
        return None
    given = graphs or [None] * len(prompts)
    found = [g or _said(p) for p, g in zip(prompts, given, strict=True)]
    if missing := found.count(None):
        logger.warning(
            "%d of %d prompts have no scene graph: the prompt alone conditions them",
            missing,
            len(prompts),
        )
    return found


def _said(prompt: str) -> SceneGraph | None:
    """What a caption of the embedded world says; None of any other."""
    try:
        return parse_caption(prompt)
    except ValueError:
        return None


def _prompts(
    pipeline: Any, prompts: list[str], chunks: int, graphs: list[SceneGraph | None] | None
) -> dict[str, Any]:
    """What the pipeline is called with: text that it encodes itself, or what it is encoded to."""
    if chunks == 1 and graphs is None:
        return {"prompt": prompts}
    model = adapt(pipeline, 2 * pipeline.vae_scale_factor, prompt_chunks=chunks)
    both = model.condition([""]), model.condition(prompts, graphs)
    if isinstance(model, SceneGraphModel):
        with torch.no_grad():
            return dict(call_arguments(*map(model.embedded, both)))
    return dict(call_arguments(*both))
