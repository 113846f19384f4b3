"""The methods that are compared, and the trials that tuning spends on each."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inversion_dpo.run.config import PRESETS, ConfigError, load_config, load_given
from inversion_dpo.run.settings import every_setting
from inversion_dpo.training.effects import check_effects

TUNED = PRESETS / "tuned.json"  # preset -> method -> settings; how found: docs/results/index.md
TRIALS = 6  # that tuning spends on every method


@dataclass(frozen=True)
class Method:
    """Settings that make the method, and what tuning may choose from; no betas if it has none.

    Methods that are mostly denoising on the winners stand only small rates. There are ``TRIALS``
    combinations for each.
    """

    settings: tuple[str, ...]
    betas: tuple[float, ...] = (300.0, 1000.0, 3000.0)
    rates: tuple[float, ...] = (1e-4, 3e-4)

    def trials(self) -> list[tuple[str, ...]]:
        """The settings that tuning tries."""
        rates: list[tuple[str, ...]] = [(f"training.learning_rate={rate}",) for rate in self.rates]
        if not self.betas:
            return list(rates)
        return [(*rate, f"objective.beta={b}") for rate, b in itertools.product(rates, self.betas)]


def _trajectory(target: str, name: str = "inversion_dpo") -> tuple[str, ...]:
    return (f"objective.name={name}", f"objective.target={target}")


METHODS: dict[str, Method] = {
    "x0": Method(_trajectory("x0")),
    "transition": Method(_trajectory("transition")),
    "reference": Method(_trajectory("reference")),
    "released": Method(_trajectory("reference", "inversion_dpo_released")),
    "diffusion_dpo": Method(("objective.name=diffusion_dpo",)),
    "inpo": Method(("objective.name=inpo",)),
    "smpo": Method(("objective.name=smpo", "objective.soft_labels=true")),
    "dspo": Method(("objective.name=dspo",), (0.001, 0.1, 1.0), (1e-5, 1e-4)),
    "mapo": Method(("objective.name=mapo",), (0.1, 1.0, 10.0), (1e-5, 1e-4)),
    "kto": Method(("objective.name=kto",)),
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

    ``settings`` are those of the method and the varied one; tuned values come between. ``varied``
    is the key and the value of an ablation, None of the method as it is.
    """

    name: str
    method: str
    settings: tuple[str, ...]
    varied: tuple[str, str] | None = None


def parse_methods(text: str) -> list[str]:
    """Names from a comma-separated list; ConfigError names an unknown one."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--methods: no method {name!r}; one of {', '.join(METHODS)}{hint}")
    if not names:
        raise ConfigError(f"--methods names none; one of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def parse_vary(text: str) -> tuple[str, list[str]]:
    """``KEY=V1,V2,...`` -> key and values; ConfigError if it is not of that form."""
    key, equals, values = text.partition("=")
    found = [v.strip() for v in values.split(",") if v.strip()]
    if not equals or not key.strip() or not found:
        raise ConfigError(
            f"--vary {text!r}: write KEY=VALUE,VALUE,..., e.g. objective.beta=300,1000"
        )
    return key.strip(), found


def variants(methods: Sequence[str], vary: Sequence[str] = ()) -> list[Variant]:
    """The methods, then each with every value of every ``KEY=V1,V2,...``.

    One key is varied at a time. ConfigError if two lines would have one name.
    """
    found = [Variant(m, m, METHODS[m].settings) for m in methods]
    found += [
        Variant(
            f"{m} {key.rpartition('.')[2]}={v}", m, (*METHODS[m].settings, f"{key}={v}"), (key, v)
        )
        for key, values in map(parse_vary, vary)
        for m in methods
        for v in values
    ]
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--vary gives {name!r} twice: give each key and value once")
    return found


def tuned_settings(config: str, file: Path) -> Mapping[str, Sequence[str]]:
    """Method -> settings, from this comparison's own tuning or the package's; may be empty."""
    if file.exists():
        return dict(json.loads(file.read_text()))
    return dict(json.loads(TUNED.read_text()).get(config, {})) if TUNED.exists() else {}


def overrides_of(
    variant: Variant, tuned: Mapping[str, Sequence[str]], extra: Sequence[str], seed: int
) -> list[str]:
    """Everything that makes one run of a variant: tuned values, then the user's own, which win over
    them, then the method's and what is varied.
    """  # noqa: D205
    return [*tuned.get(variant.method, ()), *extra, *variant.settings, f"training.seed={seed}"]


def check(
    config: str, plans: Sequence[Sequence[str]], extra: Sequence[str] = (), vary: Sequence[str] = ()
) -> None:
    """Load every run's configuration, so that a mistake is found before the first run.

    Args:
        config: preset or YAML file.
        plans: the overrides of each run.
        extra: the user's own among them; each must have an effect in one of the runs at least.
        vary: the settings that the user varies, for which the same holds.
    """
    runs = [load_config(config, list(overrides)) for overrides in plans]
    given, varied = load_given(config, list(extra))[1], [parse_vary(text)[0] for text in vary]
    given |= {k for k in every_setting() for v in varied if f"{v}.".startswith(f"{k}.")}
    check_effects(runs, given)
