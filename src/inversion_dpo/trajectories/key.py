"""Derive from a configuration everything that a run's trajectories depend on."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from inversion_dpo.data.buckets import Resolution
from inversion_dpo.maths.methods import ENDPOINTS, STORED
from inversion_dpo.maths.records import Extent
from inversion_dpo.models.base import DiffusionModel, identity, identity_of
from inversion_dpo.run.fields import Config, ConfigError
from inversion_dpo.trajectories.method import chosen_method
from inversion_dpo.trajectories.storing import Form, endpoint_size, form_of

if TYPE_CHECKING:
    from inversion_dpo.data.source import PairSource

LAYOUT = 8  # of the cache's files
NOWHERE = Extent(last=0)  # of methods without trajectories, whose settings have no effect


@dataclass(frozen=True)
class CacheKey:
    """Everything that the cached numbers depend on; equal keys share a cache."""

    pairs: str  # fingerprint of the pairs' source
    fit: str  # how images come to their size
    flip_seed: int | None  # of the mirrored pairs; None: no pair is
    model: str  # identity of the frozen weights and of what turns prompts into their input
    schedule: str  # the scheduler's configuration
    resolution: Resolution
    guidance_embed: float
    steps: int
    spacing: str
    guidance_scale: float
    extent: Extent  # of the states that are made; last = 0: pairs are encoded only
    pairs_per_shard: int  # whose images are inverted at once
    keep: tuple[int, int, int] | None  # states per pair, lowest and highest index; None: all
    precision: str  # autocast of the network, the policy's own
    prompt_chunks: int
    scene_graph: str | None  # identity of the encoder, if there is one
    reference_guidance: float  # of the reference's stored predictions
    endpoint: str = ""  # the one noise of an image that is stored: recovered or known; or none
    mask: str = "given"  # which region counts
    single: bool = False  # a row is one image, which is inverted and stored once
    layout: int = LAYOUT

    @property
    def sides(self) -> int:
        """Images of a row."""
        return 2 - self.single

    @property
    def form(self) -> Form:
        """What is stored of each pair."""
        return form_of(self.extent, self.keep, self.guidance_scale, self.reference_guidance)

    def pair_size(self, latent: int, text: int) -> int:
        """Compute the bytes of a pair from the numbers of a latent and the bytes of its condition.

        A network in 16 bits predicts numbers of 16 bits; guidance mixes two of them in float32.
        """
        few = 16 if "16" in self.precision else 32
        bits = few if self.reference_guidance == 1 else 32, few if self.guidance_scale == 1 else 32
        whole = endpoint_size(latent) if self.endpoint else self.form.size(latent, bits)
        return whole * self.sides // 2 + text

    def smaller(self) -> dict[str, CacheKey]:
        """List settings that make the cache smaller, each with its key."""
        if self.endpoint:
            return {}
        first, last = self.extent.first, self.extent.last
        others = {}
        if self.keep is None and last - first >= 4:
            others["inversion.keep=4"] = replace(self, keep=(4, first, last))
        if "16" not in self.precision:
            others["training.mixed_precision=bf16"] = replace(self, precision="bf16")
        if self.guidance_scale != 1:
            others["inversion.guidance_scale=1"] = replace(self, guidance_scale=1.0)
        return others

    def name(self) -> str:
        """Return the cache's folder name: sixteen hex digits."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("endpoint", "single") or v}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def window(config: Config) -> tuple[int, int]:
    """Return the lowest and highest trained index on the inversion's grid."""
    o, n = config.objective, config.inversion.steps
    if chosen_method(config).path == "line":  # trains at any level, by the noise at the top
        return n, n
    if chosen_method(config).path == "released":
        if config.inversion.reconstruct:
            raise ConfigError(
                "inversion.reconstruct=true does not fit objective.path=released, where the "
                "network is told the next state's timestep: leave it out"
            )
        return 1, n
    low = max(1, math.ceil(o.t_min * n))
    return low, max(low, math.floor(o.t_max * n))


def extent_of(config: Config) -> Extent:
    """Say which states of an inversion are made; none where the method inverts nothing."""
    if not chosen_method(config).inverts:
        return NOWHERE
    low, high = window(config)
    return Extent(config.inversion.start, low, high, config.inversion.fixed_point_iterations)


def spacing_of(config: Config) -> str:
    """Name the grid of the inversion: the configured one, or that of the released script."""
    released = chosen_method(config).path == "released"
    return "released" if released else config.inversion.spacing


def key_of(config: Config, pairs: PairSource, model: DiffusionModel) -> CacheKey:
    """Collect from a configuration what the trajectories of its pairs depend on.

    Args:
        config: the run's settings.
        pairs: their fingerprint counts.
        model: its frozen weights and schedule count.
    """
    i, method = config.inversion, chosen_method(config)
    inverted, endpoint = method.inverts, ENDPOINTS.get(method.path, "")
    low, high = window(config)
    if endpoint == "known" and config.data.flip:
        raise ConfigError(
            "objective.path=known has noise of images as they were sampled: set data.flip=false"
        )
    along = i.guidance_scale if inverted else 1.0
    guidance = config.objective.guidance_scale if method.path in STORED else along
    graph, encoder = None, getattr(model.pipeline, "scene_graph", None)
    if encoder is not None:  # a new one only affects the number of tokens
        loaded = config.model.scene_graph
        graph = identity([encoder]) if loaded else f"new {encoder.shape.tokens}"
    return CacheKey(
        pairs=pairs.fingerprint,
        fit=config.data.fit,
        mask=config.data.mask,
        single=pairs.single,
        flip_seed=config.training.seed if config.data.flip else None,
        model=identity_of(model.pipeline),
        schedule=json.dumps(dict(model.pipeline.scheduler.config), sort_keys=True, default=str),
        resolution=config.model.resolution,
        guidance_embed=config.model.guidance_embed,
        steps=i.steps,
        spacing=spacing_of(config),
        guidance_scale=along,
        extent=extent_of(config),
        pairs_per_shard=max(1, i.batch_size // 2),
        keep=(i.keep, low, high) if method.path in STORED and i.keep else None,
        precision=f"{config.model.dtype} {config.training.mixed_precision}",
        prompt_chunks=config.model.prompt_chunks,
        scene_graph=graph,
        reference_guidance=guidance,
        endpoint=endpoint,
    )
