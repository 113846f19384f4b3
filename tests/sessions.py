"""Short ways to what many tests need."""

from pathlib import Path

from inversion_dpo.maths.losses import LOSSES, METHODS
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


def loss_of(name):
    """The loss function of a method."""
    return LOSSES[METHODS[name].loss].function
