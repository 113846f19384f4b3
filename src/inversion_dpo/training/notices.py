"""What a run says about its pairs and its inversion: sentences with the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from inversion_dpo.data.buckets import named
from inversion_dpo.data.source import left_out_words
from inversion_dpo.data.transforms import Size
from inversion_dpo.run.fields import Config, TrainingConfig
from inversion_dpo.run.words import counted
from inversion_dpo.training.session import epoch_of_step
from inversion_dpo.trajectories.cache import TrajectoryCache

LEAST_NOISE, MOST_NOISE = 0.5, 2.0  # variance of x_T that is good enough
_LEAKS = (
    "of {1} held-out pairs have an image that is trained on too, in another pair: held-out "
    "accuracy flatters the policy. Judge by other prompts, or drop duplicates "
    "(data.ranking=best_worst has two images of each prompt)",
    "of {1} held-out images are trained on too, in another row: held-out accuracy flatters the "
    "policy. Drop duplicates",
)


def counts_text(cache: TrajectoryCache) -> str:
    """Say how many rows became pairs or single images, and what was left out."""
    left = left_out_words({k: n for k, n in cache.counts.items() if k != "skipped"})  # by reason
    units = counted(cache.pairs, "image" if cache.single else "pair")
    text = f"{units} of {counted(cache.counts.get('rows', 0), 'row')}"
    if cache.single and cache.counts.get("disliked"):
        liked = int(cache.liked(range(cache.pairs)).sum())
        text += f" ({liked} liked, {cache.pairs - liked} not)"
    return f"{text}; left out: {left}" if left else text


def rare_text(sizes: Mapping[Size, int], t: TrainingConfig) -> str:
    """Say that a batch repeats pairs, or how many have sizes too rare for one; empty if neither.

    Args:
        sizes: (height, width) in pixels, and how many pairs are trained on at each.
        t: says batches and steps.
    """
    counts = list(sizes.values())
    if sum(counts) < t.batch_size:
        return (
            f"training.batch_size={t.batch_size} is more than the {sum(counts)} pairs that are "
            "trained on: each step sees some of them several times. Lower it"
        )
    epochs = epoch_of_step(counts, t.batch_size, t.steps - 1)
    common = max(sizes, key=lambda size: sizes[size])
    rare = [n for n in counts if n * epochs < t.batch_size]
    text = (
        f"not trained on: {counted(sum(rare), 'pair')} of {counted(len(rare), 'size')}. A batch is "
        f"of one size, and in {t.steps} steps they do not fill one. Lower training.batch_size, "
        f"raise training.steps, or name one size: model.resolution={named(common)}"
    )
    return text if rare else ""


def unvisited_text(count: int | None, config: Config) -> str | None:
    """Say that pairs are prepared which no step will see; None if each is seen, or none counted.

    Args:
        count: of all pairs, as far as that is known beforehand.
        config: the run's settings.
    """
    t, share = config.training, 1 - config.data.holdout
    visits = t.steps * t.batch_size
    if count is None or count * share <= visits:
        return None
    return (
        f"{t.steps} steps of {t.batch_size} pairs see {visits:,} pairs, and all {count:,} would be "
        f"inverted or encoded for them. Set data.limit={math.ceil(visits / share)}, which takes "
        "the first ones, or raise training.steps"
    )


def leak_text(
    images: Sequence[Sequence[str]], trained: list[int], held: list[int], *, single: bool = False
) -> str:
    """Say how many held-out pairs have an image that is trained on too; empty if none has.

    Args:
        images: marks of each pair's images; none in a cache of an older version.
        trained: numbers of pairs.
        held: of those held out.
        single: whether each is one image.
    """
    seen = {mark for pair in trained for mark in (images and images[pair])}
    shared = sum(not seen.isdisjoint(images and images[pair]) for pair in held)
    return ("{0} " + _LEAKS[single]).format(shared, len(held)) if shared else ""


def known_prompts_text(
    texts: Sequence[tuple[int, int]],
    trained: list[int],
    held: list[int],
    *,
    single: bool = False,
) -> str:
    """Say how many held-out pairs have a prompt that is trained on too; empty if none has.

    Args:
        texts: what each pair's prompt is told by.
        trained: numbers of pairs.
        held: of those held out.
        single: whether each is one image.
    """
    seen = {texts[pair] for pair in trained}
    shared = sum(texts[pair] in seen for pair in held)
    units = "images" if single else "pairs"
    text = f"{shared} of {len(held)} held-out {units} have a prompt that is trained on too"
    return text if shared else ""


def guidance_text(scale: float, plain: float, guided: float) -> str:
    """Say what inverting under guidance costs, beside no guidance."""
    return (
        f"inversion.guidance_scale={scale:g}: inverting and sampling back misses the first pairs "
        f"by {guided:.4f} of their norm, and by {plain:.4f} at guidance 1, where it is exact in the"
        " limit of many steps; prefer 1 unless you have measured that this is better"
    )


def trained_guidance(config: Config) -> float:
    """Find the guidance that the policy is trained at.

    A distilled network, FLUX's, is told its guidance: objective.guidance_scale is 1 there.
    """
    scale = config.objective.guidance_scale
    return config.model.guidance_embed if scale == 1 else scale


def guidances_text(config: Config) -> str:
    """Say what is trained and what will be sampled, where the two are not the same."""
    trained, sampled = trained_guidance(config), config.evaluation.guidance_scale
    return (
        f"training at guidance {trained:g}, sampling at evaluation.guidance_scale={sampled:g}: "
        "`inversion-dpo evaluate` compares the models at both"
    )


def noise_text(variance: float, t_start: float, guidance_scale: float = 1.0) -> str:
    """Judge the recovered x_T beside the noise that sampling starts from.

    Args:
        variance: of the recovered x_T; sampling starts from 1.
        t_start: ``inversion.t_start``, the share of the path that is added noise.
        guidance_scale: of the inversion.

    Returns:
        A sentence; a remedy that is set already is not given again.
    """
    told = f"the noise recovered by inversion has variance {variance:.2f}, where sampling starts "
    if variance <= LEAST_NOISE:
        more = min(0.5, 2 * t_start or 0.1)
        remedy = f"inversion.t_start={more:g} adds the missing noise (it is {t_start:g})"
        if t_start >= more:
            remedy = "Look whether the autoencoder and the images fit the model"
        return f"{told}from 1: encoded images are smoother than sampled latents. {remedy}"
    if variance < MOST_NOISE:
        return f"{told}from 1: good"
    less = f"lower inversion.t_start (it is {t_start:g}), " if t_start else ""
    plain = "inversion.guidance_scale=1, " if guidance_scale != 1 else ""
    return (
        f"{told}from 1: the inversion leaves the paths that the model samples. "
        f"Try {less}{plain}more inversion.steps, and look whether the autoencoder and the images "
        "fit the model"
    )


def round_trip_text(error: float, guidance_scale: float) -> str:
    """Judge the relative error of inverting and sampling back; independent images have over 1."""
    remedy = "more inversion.steps or inversion.fixed_point_iterations=1 lower it"
    if error > 0.3:
        remedy += "; if they do not, the images are unlike what this model draws"
    return (
        f"relative error of inverting and sampling back, guidance {guidance_scale:g}: {error:.4f}: "
        + ("good" if error <= 0.1 else f"{'large' if error > 0.3 else 'fair'}; {remedy}")
    )
