"""The configuration's group ``build``: how ``pairs build`` makes pairs."""

from __future__ import annotations

from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the remedy."""


@dataclass
class BuildConfig:
    """How ``pairs build`` makes pairs (docs/how-to/compositional.md); samples: evaluation.*."""

    prompts: str = "3000"  # a number: captions of the scenes; scenes: by mix and splits; a file or
    # folder of scene graphs; or a prompt set as evaluation.prompts
    mix: dict[str, float] = field(default_factory=dict)  # of scenes: OBJECTS/LEAST_RELATIONS: share
    splits: dict[str, int] = field(default_factory=dict)  # split: pairs; {}: one file, no splits
    samples: int = 4  # of each prompt
    guidance_scales: list[float] = field(default_factory=list)  # in turn; []: evaluation's
    models: list[str] = field(default_factory=list)  # beside the reference: runs, LoRAs, pipelines
    by: list[str] = field(default_factory=list)  # scores that decide; []: all of the scorer
    mining: str = "majority"  # best_worst, margin, pareto, majority, all
    least: float = 0.0  # difference of a pair's scores; of majority: share of votes
    once: bool = False  # each image in one pair at most
    near: int = -1  # bits of 64 in which two images of a caption may differ and count as one
    limit: int | None = None  # the most pairs
    quality: int = 95  # of the JPEGs
    seed: int = 0  # of prompts and samples
    name: str = "pairs"  # of the dataset, in its card
    licence: str = "other"  # of the dataset: an SPDX id in lower case, as Hugging Face writes it


def check_build(build: BuildConfig) -> None:
    """Refuse what cannot work before anything is loaded; ConfigError names key and remedy."""
    from inversion_dpo.making_pairs.mining import MINERS
    from inversion_dpo.world.complexity import parse_kind

    if build.mining not in MINERS:
        raise ConfigError(f"build.mining={build.mining!r} is not one of {', '.join(MINERS)}")
    if build.splits and not build.once and build.mining not in ("best_worst", "majority"):
        raise ConfigError(
            f"build.mining={build.mining} may put an image into several pairs; in a dataset each "
            "stands in one: set build.once=true"
        )
    if build.samples < 2:
        raise ConfigError("build.samples must be at least 2: a pair needs two images")
    if not 1 <= build.quality <= 100 or build.near > 64 or build.least < 0:
        raise ConfigError("need 1 <= build.quality <= 100, build.near <= 64 and build.least >= 0")
    for name, value in {**build.mix, **build.splits}.items():
        if value <= 0:
            raise ConfigError(f"build.mix and build.splits: {name} must be positive, got {value}")
    for kind in build.mix:
        try:
            parse_kind(kind)
        except ValueError as error:
            raise ConfigError(f"build.mix: {error}") from error
    if build.prompts == "scenes" and not (build.mix and build.splits):
        raise ConfigError("build.prompts=scenes needs build.mix and build.splits")
