"""Read the method from a configuration, without torch."""

from __future__ import annotations

from inversion_dpo.maths.methods import ALONE, Method, method_of
from inversion_dpo.run.fields import Config, ConfigError


def takes_images(config: Config) -> bool:
    """Tell whether the loss takes images with a thumb one by one, and needs no pairs of them."""
    return chosen_method(config).loss in ALONE


def chosen_method(config: Config) -> Method:
    """Return the configured loss, path and target; ConfigError if they do not fit together."""
    o = config.objective
    try:
        return method_of(o.name, loss=o.loss, path=o.path, target=o.target)
    except ValueError as error:
        raise ConfigError(str(error)) from error
