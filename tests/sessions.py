"""Short ways to what many tests need."""

from pathlib import Path

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from inversion_dpo.evaluation.samples import pictures, read_scores, sampled_file
from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.training import recipe
from inversion_dpo.trajectories.fill import predictions


def set_up(config, cache_root):
    """A training's session, from a cache that is made if need be."""
    return recipe.set_up(config, recipe.prepare(config, Path(cache_root)))


def under_guidance(model, condition, scale):
    """The prediction at (x_t, t) of the model's network under a fixed condition and guidance."""
    return predictions(model, condition, scale, scale)[0]


def conditional(model, condition):
    """The prediction without guidance."""
    return under_guidance(model, condition, 1.0)


def sampled(config, adapter, memo, prompts, desc, repeats=1):
    """One model's images and scores on the prompts."""
    file = sampled_file(config, adapter, memo, prompts, desc, repeats)
    return [np.array(image) for image in pictures(file)], read_scores(file)


def loss_of(name):
    """The loss function of a method."""
    return LOSSES[METHODS[name].loss].function


def small_sources():
    """Have Qwen-Image-Edit bring its sources to 128, not 1024, pixels; to be undone."""
    patch, whole = pytest.MonkeyPatch(), pipeline_qwenimage_edit.calculate_dimensions
    for module, parts in ((pipeline_qwenimage_edit, 3), (pipeline_qwenimage_edit_plus, 2)):
        small = lambda area, ratio, parts=parts: whole(area // 64, ratio)[:parts]  # noqa: E731
        patch.setattr(module, "calculate_dimensions", small)
    return patch
