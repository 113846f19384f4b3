"""The configuration of a run: a preset or YAML file, then ``key=value`` overrides, checked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from inversion_dpo.run.fields import Config as Config
from inversion_dpo.run.fields import ConfigError as ConfigError
from inversion_dpo.run.limits import MOST
from inversion_dpo.run.settings import every_setting, groups, written

PACKAGE = Path(__file__).parents[1]
PRESETS = PACKAGE / "presets"
Tree = dict[str, Any]


def resolve(path: str) -> str:
    """Turn ``asset:NAME`` into the packaged file's path, and ``~`` into the home folder's."""
    packaged = path.startswith("asset:")
    return str(PACKAGE / "assets" / path[6:]) if packaged else os.path.expanduser(path)


def preset_names() -> list[str]:
    """List the names of the packaged presets."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_config(preset: str | None, overrides: list[str]) -> Config:
    """Load defaults, preset and ``key=value`` overrides; ConfigError names what is wrong."""
    return load_given(preset, overrides)[0]


def load_given(preset: str | None, overrides: list[str]) -> tuple[Config, frozenset[str]]:
    """Load a configuration and the keys that the user wrote, in overrides or an own YAML file.

    A packaged preset is not the user's own, nor is what a program wrote: a run's ``config.yaml``,
    and any file that states every setting.
    """
    tree: Tree = {}
    keys: set[str] = set()
    if preset is not None:
        path = Path(os.path.expanduser(preset))
        path = path if path.is_file() else PRESETS / f"{preset}.yaml"
        if not path.is_file():
            of_run = str(Path(preset) / "config.yaml")
            known = [of_run] if Path(of_run).is_file() else preset_names()
            raise ConfigError(
                f"no configuration {preset!r}: give a YAML file or one of: "
                f"{', '.join(preset_names())}{_near(preset, known)}"
            )
        with _of_a_run(path):
            tree = _read(str(path), lambda: OmegaConf.load(path))
            _made(tree, f"{path}: ")
        chosen = _keys_of(tree)
        packaged = path.resolve().parent == PRESETS.resolve()
        if not packaged and path.name != "config.yaml" and chosen != set(every_setting()):
            keys |= chosen
    for override in overrides:
        source = f"override {override!r}"
        if "=" not in override:
            hint = f"; a preset goes with --config {override}" * (override in preset_names())
            raise ConfigError(f"{source}: write it as key=value, e.g. training.steps=200{hint}")
        own = _read(source, lambda text=override: OmegaConf.from_dotlist([text]))
        keys |= _keys_of(own)
        tree = _merged(tree, own)
    config = _made(tree)
    check_combinations(config)
    return config, frozenset(keys)


def _merged(tree: Tree, own: Tree) -> Tree:
    """Lay nested settings over others."""
    return tree | {
        name: _merged(tree[name], value)
        if isinstance(value, dict) and isinstance(tree.get(name), dict)
        else value
        for name, value in own.items()
    }


@contextmanager
def _of_a_run(path: Path) -> Iterator[None]:
    """Add to an error in the settings of a run that another version may have written them."""
    try:
        yield
    except ConfigError as error:
        if path.name != "config.yaml":
            raise
        text = f"{error}; if another version of inversion-dpo wrote this run, use that version"
        raise ConfigError(text) from error


def _near(word: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    names, plain = list(known), word.lower()
    near = sorted((name for name in names if len(plain) > 2 and plain in name), key=len)[:2]
    near = near or difflib.get_close_matches(plain, names, n=1, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _made(tree: Tree, before: str = "") -> Config:
    try:
        return Config(**tree)
    except ValidationError as error:
        raise ConfigError(before + _explain(error)) from None


def _read(source: str, load: Any) -> Tree:
    """Read settings as written and check that every key is known; ConfigError names the source.

    OmegaConf's ``${...}`` is refused: it would copy the environment, and with it tokens, into a
    run's files.
    """
    try:
        tree: Any = OmegaConf.to_container(load(), resolve=False)
        if not isinstance(tree, dict):
            raise ConfigError("a configuration is keys and values, e.g. training: {steps: 200}")
        if "${" in str(tree):
            raise ConfigError(
                "${...} is not taken in a configuration: write the value itself "
                "(interpolation would copy the environment into the run)"
            )
        _keys_of(tree)
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    except (YAMLError, OSError, UnicodeError, RecursionError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{source} is no YAML that can be read ({first})") from error
    return tree


def _keys_of(tree: Tree, before: str = "") -> set[str]:
    """List the dotted keys in nested settings; ConfigError for a key that is none."""
    known, named, found = every_setting(), groups(), set[str]()
    for name, value in tree.items():
        key = f"{before}{name}"
        if "." in str(name):
            group, _, rest = str(name).rpartition(".")
            raise ConfigError(f"{name} is one word: write it as {group}: {{{rest}: {value}}}")
        if key in known:
            found.add(key)
        elif key not in named:
            candidates = known if "." in key else named
            raise ConfigError(f"unknown key {key!r}{_near(key, candidates, 0.3)}")
        elif value is None:  # every setting of the group is commented out
            continue
        elif not isinstance(value, dict):
            example = next(k for k in known if k.startswith(f"{key}."))
            raise ConfigError(f"{key}={value!r}: {key} is a group of settings, e.g. {example}")
        else:
            found |= _keys_of(value, f"{key}.")
    return found


def _explain(error: ValidationError) -> str:
    """Say in one line the key, its value and what may stand there."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    known = every_setting()
    key = next(k for n in range(2, 4) if (k := ".".join(path[:n])) in known)
    setting, value = known[key], first["input"]
    allowed, hint = setting.range, ""
    if first["type"] == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    if isinstance(setting.default, dict) and len(path) > 2:
        key, allowed = ".".join(path[:3]), allowed.removeprefix("names, each with ")
    if value is None and ":" in key:
        hint = ", after a colon and a space"
    if isinstance(value, str) and setting.choices:
        hint = _near(value, setting.choices)
    if isinstance(value, float) and value.is_integer() and "whole number" in allowed:
        hint = f", written {value:.0f}" if abs(value) <= MOST else f", at most {MOST:,}"
    elif first["type"] == "less_than_equal" and first["ctx"]["le"] == MOST:
        hint = f", at most {MOST:,}"
    return f"{key}={written(value)[:100]}: give {allowed}{hint}"


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def check_combinations(config: Config) -> None:
    """Refuse settings that exclude or need each other; ConfigError names key and remedy."""
    objective, inversion, training = config.objective, config.inversion, config.training
    build = config.build
    _check_policy(config)
    if objective.target == "transition" and inversion.fixed_point_iterations:
        raise ConfigError(
            "objective.target=transition vanishes under exact inversion: its signal is the "
            "inversion's own error. Set inversion.fixed_point_iterations=0 or objective.target=x0"
        )
    if objective.target == "transition" and inversion.keep is not None:
        raise ConfigError(
            "objective.target=transition needs the neighbour of every state: set "
            "inversion.keep=null, or objective.target=x0"
        )
    if inversion.max_error is not None and not inversion.reconstruct:
        raise ConfigError("inversion.max_error needs inversion.reconstruct=true, which measures it")
    if objective.name == "inversion_dpo_released" and objective.target not in (None, "reference"):
        raise ConfigError(
            "objective.name=inversion_dpo_released reproduces the released script's sign and is "
            "defined for objective.target=reference only: leave objective.target out"
        )
    if (objective.loss or objective.name) == "smpo" and not objective.soft_labels:
        raise ConfigError(
            "objective.name=smpo scales each pair by its soft label, and without them is another "
            "method: set objective.soft_labels=true, or objective.name=inpo"
        )
    if objective.t_min >= objective.t_max:
        raise ConfigError(
            f"objective.t_min={objective.t_min} must be below objective.t_max={objective.t_max}"
        )
    if inversion.t_start and not inversion.start:
        raise ConfigError(
            f"inversion.t_start={inversion.t_start} must be 0, to invert from the clean image, or "
            f"at least {1 / inversion.steps:g} (one of inversion.steps={inversion.steps})"
        )
    if training.batch_size % training.gradient_accumulation:
        raise ConfigError(
            f"training.batch_size={training.batch_size} must be a multiple of "
            f"training.gradient_accumulation={training.gradient_accumulation}"
        )
    if build.splits and not build.once and build.mining not in ("best_worst", "majority"):
        raise ConfigError(
            f"build.mining={build.mining} may put an image into several pairs; in a dataset each "
            "stands in one: set build.once=true"
        )
    if build.prompts == "scenes" and not (build.mix and build.splits):
        raise ConfigError(
            "build.prompts=scenes needs build.mix and build.splits: take --config scenes-pairs"
        )


def _check_policy(config: Config) -> None:
    """Refuse what cannot be trained or merged."""
    if config.policy.kind == "scene_graph" and config.policy.merge:
        raise ConfigError("policy.kind=scene_graph has no LoRA to merge: set policy.merge=false")
    compiled, graphs = config.training.compile, config.model.scene_graph
    if compiled != "no" and (graphs or config.policy.kind == "scene_graph"):
        raise ConfigError(
            f"training.compile={compiled} is not made for a scene-graph encoder, which the blocks "
            "ask for its graph at each use: set training.compile=no"
        )
    rows = {"quantize": "trained", "quantize_text": "saved in a pipeline", "offload": "trained"}
    for key, verb in rows.items():
        if not (bits := getattr(config.model, key)):
            continue
        where, off = ("in main memory", "false") if key == "offload" else ("in few bits", "null")
        how = f"model.{key}={str(bits).lower()} keeps the weights {where}"
        if config.policy.kind == "full":
            raise ConfigError(
                f"{how}, which cannot be {verb}: set policy.kind=lora, or model.{key}={off}"
            )
        if config.policy.merge:
            raise ConfigError(
                f"{how}, to which no LoRA can be added: set policy.merge=false, and fuse "
                "OUTPUT/adapter with diffusers afterwards (docs/how-to/several-gpus.md)"
            )
