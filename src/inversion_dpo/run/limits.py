"""What settings are made of: number types with their limits, when one has an effect, the error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, Strict


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the remedy."""


@dataclass(frozen=True)
class Effect:
    """When a setting has an effect.

    when: alternatives parted by " or ", each of conditions parted by " and ". A condition is
        ``KEY=PATTERN`` or ``KEY!=PATTERN`` with a regular expression, or a tag of the run
        (``TAGS``).
    """

    when: str


TAGS = {  # what a method may use: tag -> what a setting with this effect needs
    "target": "a method whose target can be chosen",
    "beta": "a method with a beta",
    "link": "the loss dpo, dpo_bounded or dpo_released",
    "label_smoothing": "a method that smooths labels",
    "liked_share": "KTO's loss",
    "soft_labels": "a method that takes soft labels",
    "gap": "the loss dpo, dpo_bounded, dpo_released, dmpo or kto",
    "reference": "a loss with a reference",
    "anew": "a path that is not trajectory or released",
    "safeguard": "the loss dpo, dpo_bounded, dpo_released, smpo, dmpo, kto or dspo",
    "terms": "the loss dpo, dpo_bounded, dpo_released, smpo, dmpo or kto",
    "labels": "a method that tells winner from loser",
    "inversion": "a method that trains on inverted trajectories",
    "refined": "a method with inversion steps under the reference",
    "inverts": "a method that inverts the pairs beforehand",
    "grid": "a method that inverts on a grid of your choice",
    "steps": "a method that inverts",
    "draws": "a method that draws its states",
    "kept": "a method that stores states",
    "coupled": "objective.path=line or known",
}

MOST = 10**9  # of whatever is counted: more is a slip of the finger
Count = Annotated[int, Strict(), Field(ge=1, le=MOST)]
Few = Annotated[int, Strict(), Field(ge=1, le=10_000)]  # of what each takes memory or time
Side = Annotated[int, Strict(), Field(ge=1, le=9999)]  # in pixels, as in a shape
Natural = Annotated[int, Strict(), Field(ge=0, le=MOST)]
Positive = Annotated[float, Strict(), Field(gt=0, le=MOST)]
NotNegative = Annotated[float, Strict(), Field(ge=0, le=MOST)]
Guidance = Annotated[float, Strict(), Field(gt=0, le=100)]
GuidanceOr0 = Annotated[float, Strict(), Field(ge=0, le=100)]  # 0 is none of FLUX's
Weight = Annotated[float, Strict(), Field(ge=0, le=1_000_000)]  # of a term beside the loss
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Fraction = Annotated[float, Strict(), Field(gt=0, lt=1)]
Minority = Annotated[float, Strict(), Field(ge=0, lt=0.5)]
Switch = Annotated[bool, Strict()]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]

Shape = Annotated[str, Field(pattern="^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$", examples=["832x1216"])]

T = TypeVar("T")
Group = Annotated[T, BeforeValidator(lambda v: {} if v is None else v)]  # may be left empty


@dataclass_transform(field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """Make a dataclass whose values are checked when it is made."""
    how = ConfigDict(
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        extra="forbid",
    )
    return cast("type[T]", pydantic.dataclasses.dataclass(cls, config=how))
