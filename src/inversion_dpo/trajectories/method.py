"""Read the method from a configuration, without torch."""

from __future__ import annotations

from inversion_dpo.maths.methods import Method, method_of
from inversion_dpo.run.fields import Config, ConfigError


def chosen_method(config: Config) -> Method:
    """Return the configured loss, path and target; ConfigError if they do not fit together."""
    o = config.objective
    try:
        return method_of(o.name, loss=o.loss, path=o.path, target=o.target)
    except ValueError as error:
        raise ConfigError(str(error)) from error
