"""List the methods to compare, and the trials that tuning spends on each."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inversion_dpo.run.config import PRESETS, ConfigError, load_config, load_given
from inversion_dpo.run.disk import read_json
from inversion_dpo.run.settings import every_setting
from inversion_dpo.training.effects import check_effects

TUNED = PRESETS / "tuned.json"  # preset -> method -> settings, see docs/results/index.md


@dataclass(frozen=True)
class Method:
    """The settings that make a method, and the values that tuning tries; no betas if it has none.

    Methods that are mostly denoising on the winners need small rates. Each has six
    combinations, so that tuning spends as much on every method.
    """

    settings: tuple[str, ...]
    betas: tuple[float, ...] = (300.0, 1000.0, 3000.0)
    rates: tuple[float, ...] = (1e-4, 3e-4)

    def trials(self) -> list[tuple[str, ...]]:
        """List the combinations of settings that tuning tries."""
        rates: list[tuple[str, ...]] = [(f"training.learning_rate={rate}",) for rate in self.rates]
        if not self.betas:
            return list(rates)
        return [(*rate, f"objective.beta={b}") for rate, b in itertools.product(rates, self.betas)]


def _trajectory(target: str) -> tuple[str, ...]:
    return ("objective.name=inversion_dpo", f"objective.target={target}")


METHODS: dict[str, Method] = {
    "x0": Method(_trajectory("x0")),
    "transition": Method(_trajectory("transition")),
    "reference": Method(_trajectory("reference")),
    "released": Method(("objective.name=inversion_dpo_released",)),
    "diffusion_dpo": Method(("objective.name=diffusion_dpo",)),
    "inpo": Method(("objective.name=inpo",)),
    "smpo": Method(("objective.name=smpo", "objective.soft_labels=true")),
    "dspo": Method(("objective.name=dspo",), (0.001, 0.1, 1.0), (1e-5, 1e-4)),
    "mapo": Method(("objective.name=mapo",), (0.1, 1.0, 10.0), (1e-5, 1e-4)),
    "dmpo": Method(("objective.name=dmpo",)),
    "nft": Method(("objective.name=nft",), (0.1, 0.3, 1.0)),
    "kto": Method(("objective.name=kto",), (30.0, 100.0, 300.0)),
    "sft": Method(("objective.name=sft",), (), (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)),
    "x0_ipo": Method((*_trajectory("x0"), "objective.link=ipo")),
    "x0_hinge": Method((*_trajectory("x0"), "objective.link=hinge")),
    "x0_smoothed": Method((*_trajectory("x0"), "objective.label_smoothing=0.1")),
    "x0_soft": Method((*_trajectory("x0"), "objective.soft_labels=true")),
    "x0_safeguard": Method((*_trajectory("x0"), "objective.safeguard=true")),
}


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: a method, or a method with one setting varied.

    ``settings`` are those of the method and the varied one. ``varied`` is the key and value of an
    ablation, or None for the method alone.
    """

    name: str
    method: str
    settings: tuple[str, ...]
    varied: tuple[str, str] | None = None


def parse_methods(text: str) -> list[str]:
    """Split a comma-separated list of methods; ConfigError names an unknown or repeated one."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--methods: no method {name!r}; one of {', '.join(METHODS)}{hint}")
    if not names:
        raise ConfigError(f"--methods names none; one of {', '.join(METHODS)}")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--methods names {name} twice: give each method once")
    return names


def parse_vary(text: str) -> tuple[str, list[str]]:
    """Split ``KEY=V1,V2,...`` into key and values; ConfigError for any other form."""
    key, equals, values = text.partition("=")
    listed = [v.strip() for v in values.split(",") if v.strip()]
    if not equals or not key.strip() or not listed:
        raise ConfigError(
            f"--vary {text!r}: write KEY=VALUE,VALUE,..., e.g. objective.beta=300,1000"
        )
    return key.strip(), listed


def variants(methods: Sequence[str], vary: Sequence[str] = ()) -> list[Variant]:
    """List the methods, then each with every value of every ``KEY=V1,V2,...``.

    One key varies at a time. ConfigError if two lines would have one name.
    """
    rows = [Variant(m, m, METHODS[m].settings) for m in methods]
    rows += [
        Variant(
            f"{m} {key.rpartition('.')[2]}={v}", m, (*METHODS[m].settings, f"{key}={v}"), (key, v)
        )
        for key, values in map(parse_vary, vary)
        for m in methods
        for v in values
    ]
    names = [variant.name for variant in rows]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--vary gives {name!r} twice: give each key and value once")
    return rows


def tuned_settings(config: str, file: Path) -> Mapping[str, Sequence[str]]:
    """Read method -> settings from this comparison's own tuning or the package's; may be empty."""
    if file.exists():
        return dict(read_json(file))
    return dict(json.loads(TUNED.read_text()).get(config, {})) if TUNED.exists() else {}


def overrides_of(
    variant: Variant, tuned: Mapping[str, Sequence[str]], extra: Sequence[str], seed: int
) -> list[str]:
    """List the overrides of a run: tuned values, the user's own, the variant's; later ones win.

    Args:
        variant: a method with further settings.
        tuned: the best settings of each method.
        extra: the user's own.
        seed: of the run.
    """
    return [*tuned.get(variant.method, ()), *extra, *variant.settings, f"training.seed={seed}"]


def check(
    config: str, plans: Sequence[Sequence[str]], extra: Sequence[str] = (), vary: Sequence[str] = ()
) -> None:
    """Load every run's configuration, so that a mistake is reported before the first run.

    Args:
        config: preset or YAML file.
        plans: the overrides of each run.
        extra: the user's own overrides; each must have an effect in at least one run.
        vary: the settings that the user varies; the same holds for them.

    Raises:
        ConfigError: also for a loss or path that would stand in the place of every method's own.
    """
    runs = [load_config(config, list(overrides)) for overrides in plans]
    (base, given), varied = load_given(config, list(extra)), [parse_vary(text)[0] for text in vary]
    for key in ("loss", "path"):
        if value := getattr(base.objective, key):
            raise ConfigError(
                f"objective.{key}={value}, typed or in the file, would replace that of every "
                "method, under the methods' names: remove it, or try it beside them with "
                f"--vary objective.{key}={value}"
            )
    given |= {k for k in every_setting() for v in varied if f"{v}.".startswith(f"{k}.")}
    check_effects(runs, given)
