"""Which settings have an effect in a run: what its method uses."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.run.config import Config, ConfigError, load_given
from inversion_dpo.run.settings import every_setting, value_of, written
from inversion_dpo.trajectories.key import chosen_method

_PATHS: dict[str, frozenset[str]] = {
    "trajectory": frozenset({"inversion", "grid", "target"}),
    "policy": frozenset({"grid"}),
    "renoise": frozenset({"grid"}),
    "noise": frozenset(),
}


def active_tags(config: Config) -> frozenset[str]:
    """List the tags of ``run.fields.TAGS`` that hold in a run."""
    method = chosen_method(config)
    return LOSSES[method.loss].uses | _PATHS[method.path]


def without_effect(config: Config) -> set[str]:
    """List the settings that change nothing in a run."""
    active = active_tags(config)

    def holds(condition: str) -> bool:
        key, equals, pattern = condition.partition("=")
        if not equals:
            return key in active
        value = value_of(config, key.rstrip("!"))
        text = ",".join(value) if isinstance(value, list) else value
        matches = re.fullmatch(pattern, text if isinstance(text, str) else written(text))
        return bool(matches) is not key.endswith("!")

    return {
        key
        for key, setting in every_setting().items()
        if setting.effect
        and not any(all(map(holds, s.split(" and "))) for s in setting.effect.when.split(" or "))
    }


def load_checked(preset: str | None, overrides: list[str]) -> Config:
    """Load a configuration; ConfigError also for a setting that was given and changes nothing."""
    config, given = load_given(preset, overrides)
    check_effects([config], given)
    return config


def check_effects(runs: Sequence[Config], given: Collection[str]) -> None:
    """Refuse a setting that was given, differs from its default and has no effect in any run.

    Args:
        runs: one configuration, or those of the methods that are compared.
        given: dotted keys that the user wrote.

    Raises:
        ConfigError: names the first such setting and what it needs.
    """
    idle, complaints = set(given).intersection(*map(without_effect, runs)), dict[str, str]()
    for run in runs:
        for key, setting in every_setting().items():
            value = value_of(run, key)
            if key in idle and value != setting.default:
                unlike = f" (not objective.name={run.objective.name})" if setting.by_method else ""
                complaints.setdefault(
                    key,
                    f"{key}={written(value)} has no effect in this run: it needs {setting.needs}"
                    f"{unlike}. Leave it out",
                )
    if complaints:
        more = len(complaints) - 1
        first = next(iter(complaints.values()))
        raise ConfigError(first + (f" (and {more} more such settings)" if more else ""))
