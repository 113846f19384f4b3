"""Which settings have an effect in a run: what its method uses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.run.config import Config, ConfigError, has_effect, load_given, without_effect
from inversion_dpo.trajectories.key import chosen_method

_PATHS: dict[str, frozenset[str]] = {
    "trajectory": frozenset({"inversion", "grid", "target"}),
    "policy": frozenset({"grid"}),
    "renoise": frozenset({"grid"}),
    "noise": frozenset(),
}


def active_tags(config: Config) -> frozenset[str]:
    """The tags of ``run.fields.TAGS`` that hold in a run."""
    method = chosen_method(config)
    return LOSSES[method.loss].uses | _PATHS[method.path]


def load_checked(preset: str | None, overrides: list[str]) -> Config:
    """Load a configuration; ConfigError also for a setting that was given and changes nothing."""
    config, given = load_given(preset, overrides)
    check_effects([config], given)
    return config


def check_effects(runs: Sequence[Config], given: Collection[str]) -> None:
    """ConfigError if a given setting has an effect in none of the runs.

    Args:
        runs: one configuration, or those of the methods that are compared.
        given: dotted keys that the user wrote.
    """
    useful = {key for key in given for run in runs if has_effect(key, run, active_tags(run))}
    idle = set(given) - useful
    complaints = [line for run in runs for line in without_effect(run, idle, active_tags(run))]
    if complaints:
        more = len({line.partition("=")[0] for line in complaints}) - 1
        raise ConfigError(complaints[0] + (f" (and {more} more such settings)" if more else ""))
