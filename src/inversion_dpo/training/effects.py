"""Which settings have an effect in a run: what its method uses."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from operator import attrgetter

from inversion_dpo.maths.methods import BETAS, USES, carried_beta
from inversion_dpo.run.config import Config, ConfigError, load_given
from inversion_dpo.run.fields import EvaluationConfig
from inversion_dpo.run.settings import every_setting, written
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)
_PATHS: dict[str, frozenset[str]] = {
    "trajectory": frozenset(
        {"inversion", "refined", "inverts", "grid", "steps", "target", "draws", "kept"}
    ),
    "released": frozenset({"inverts", "steps"}),
    "policy": frozenset({"grid", "steps", "draws", "anew"}),
    "renoise": frozenset({"grid", "steps", "draws", "anew"}),
    "stepped": frozenset({"refined", "grid", "steps", "draws", "anew"}),
    "noise": frozenset({"draws", "anew"}),
    "line": frozenset(
        {"inversion", "refined", "inverts", "grid", "steps", "draws", "coupled", "anew"}
    ),
    "known": frozenset({"draws", "coupled", "anew"}),
}

GROUPS = tuple(dict.fromkeys(key.partition(".")[0] for key in every_setting()))
_RUN = tuple(group for group in GROUPS if group != "build")  # of train, invert and demo
_DRAWS = tuple(f"evaluation.{name}" for name in ("sample_steps", "guidance_scale", "batch_size"))
READS = {  # command -> groups or settings that it reads; any other reads the groups of a run
    "config": GROUPS,
    "compare": GROUPS,
    "pairs check": ("data",),
    "pairs build": ("model", "evaluation", "build"),
    "pairs sample": ("model", *_DRAWS),
    "sample": ("model", *_DRAWS),
    "evaluate": ("model", "data", "evaluation"),
    "fid": ("model", "evaluation"),
    "web": ("model", "data", "inversion", "evaluation"),
}


def without_effect(config: Config) -> set[str]:
    """List the settings that change nothing in a run."""
    method = chosen_method(config)
    active = USES[method.loss] | _PATHS[method.path]  # tags of ``run.limits.TAGS``

    def holds(condition: str) -> bool:
        key, equals, pattern = condition.partition("=")
        if not equals:
            return key in active
        value = attrgetter(key.rstrip("!"))(config)
        text = ",".join(value) if isinstance(value, list) else value
        matches = re.fullmatch(pattern, text if isinstance(text, str) else written(text))
        return bool(matches) is not key.endswith("!")

    return {
        key
        for key, setting in every_setting().items()
        if setting.effect
        and not any(all(map(holds, s.split(" and "))) for s in setting.effect.when.split(" or "))
    }


def load_checked(preset: str | None, overrides: Sequence[str], command: str = "config") -> Config:
    """Load a configuration for a command.

    Args:
        preset: a packaged preset or a YAML file.
        overrides: ``key=value`` settings.
        command: a key of ``READS``, or any other command of a run.

    Raises:
        ConfigError: also for a setting that is given twice, or that changes nothing in the run or
            is not read by the command.
    """
    check_command(overrides, command)
    config, given = load_given(preset, list(overrides))
    check_effects([config], given)
    if {"objective.name", "objective.loss"} & given and "objective.beta" not in given:
        warn_of_beta(load_given(preset, [])[0], config)
    if command != "fid":  # which has features of its own
        check_checkpoints(overrides, config.evaluation)
    return config


def warn_of_beta(preset: Config, config: Config) -> None:
    """Warn of a beta that a preset chose for another loss than the one that is set now."""
    before, loss = chosen_method(preset).loss, chosen_method(config).loss
    beta = config.objective.beta
    carried = carried_beta(beta, before, loss) if isinstance(beta, float) else None
    if carried not in (None, beta):
        logger.warning(
            "objective.beta=%g was chosen for the loss %s, which usually has %g; %s usually has "
            "%g: set objective.beta, for example to %g",
            beta,
            before,
            BETAS[before],
            loss,
            BETAS[loss],
            carried,
        )


def check_checkpoints(overrides: Sequence[str], e: EvaluationConfig) -> None:
    """Refuse weights that are typed for a scorer that is not used; a file may name many."""
    names = {*e.scorers, *["clip"] * ("geneval" in e.scorers)}  # by which it names colours
    for text in overrides:
        key = text.partition("=")[0]
        name = key.removeprefix("evaluation.checkpoints.")
        if name != key and name not in names:
            raise ConfigError(
                f"{key} has no effect: evaluation.scorer is {written(e.scorer)}. Leave it out"
            )


def check_command(overrides: Sequence[str], command: str) -> None:
    """Refuse a setting that is typed twice, or that the command does not read."""
    values: dict[str, str] = {}
    for key, _, value in (text.partition("=") for text in overrides):
        if values.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {values[key]} and {value}: give it once")
        read = READS.get(command, _RUN)
        group = key.partition(".")[0]
        if group in GROUPS and not {key, group}.intersection(read):
            named = ", ".join(f"{name}.*" if name in GROUPS else name for name in read)
            hint = (
                " (--seed is the seed)" if (command, key) == ("sample", "evaluation.seed") else ""
            )
            raise ConfigError(
                f"{key} has no effect in `{command}`, which reads {named}{hint}: leave it out"
            )


def method_text(config: Config) -> str:
    """Name the method by its settings: its name, or the loss and path that replace its own."""
    o, method = config.objective, chosen_method(config)
    if o.loss or o.path:
        return f"objective.loss={method.loss} objective.path={method.path}"
    return f"objective.name={o.name}"


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
            value = attrgetter(key)(run)
            if key in idle and value != setting.default:
                unlike = f" (not {method_text(run)})" if setting.by_method else ""
                complaints.setdefault(
                    key,
                    f"{key}={written(value)} has no effect in this run: it needs {setting.needs}"
                    f"{unlike}. Leave it out",
                )
    if complaints:
        more = len(complaints) - 1
        first = next(iter(complaints.values()))
        raise ConfigError(first + (f" (and {more} more such settings)" if more else ""))
