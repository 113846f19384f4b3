"""People's win rate of policy over reference, from the blind comparison of ``web``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inversion_dpo.evaluation.metrics import share_text, wins
from inversion_dpo.run.config import Config
from inversion_dpo.run.disk import atomic_json, read_json
from inversion_dpo.run.words import counted

PEOPLE = "people.json"
PEOPLE_JUDGE = "people"  # the same in metrics.json


def policy_of(config: Config, adapter: Path) -> str:
    """Name the judged model: sixteen hex digits over its settings and files."""
    from inversion_dpo.evaluation.samples import model_digest  # slow: the page opens without it

    return hashlib.sha256(model_digest(config, adapter).encode()).hexdigest()[:16]


def write_people(
    run: Path, about: Mapping[str, Any], outcomes: Mapping[str, int], people: int
) -> dict[str, Any]:
    """Write ``people.json`` of a run.

    A comparison that nobody has judged does not replace another one of the same policy.

    Args:
        run: its folder.
        about: ``policy``, of :func:`policy_of`; ``comparison``, the name of its file of labels; and
            the ``guidance_scale`` of its images.
        outcomes: pairs by what people made of them: ``first`` is the policy, ``second`` the
            reference; any other outcome counts as half a win.
        people: how many judged.

    Returns:
        All that this comparison comes to; win_rate and its Wilson interval only if at least one
        pair is judged.
    """
    won, lost = outcomes.get("first", 0), outcomes.get("second", 0)
    even = sum(n for k, n in outcomes.items() if k not in ("first", "second", "unlabelled"))
    found: dict[str, Any] = {**about, "wins": won, "losses": lost, "even": even}
    if scores := [1.0] * won + [0.0] * lost + [0.5] * even:
        found |= wins([0.5] * len(scores), scores)
    found |= {"pairs": len(scores), "people": people}
    there = None if scores else read_people(run, about["policy"])
    if there is None or there.get("comparison") == about["comparison"]:
        atomic_json(found, run / PEOPLE, shared=True)
    return found


def read_people(run: Path, policy: str | None = None) -> dict[str, Any] | None:
    """Read ``people.json``; None if nobody has judged, or if they judged another ``policy``."""
    path = run / PEOPLE
    found = read_json(path) if path.is_file() else None
    return found if found and found["pairs"] and policy in (None, found["policy"]) else None


def judged_by(run: Path, config: Config) -> dict[str, Any] | None:
    """Read what people judged of the run's own policy as it is now; None if there is nothing."""
    adapter = run / "adapter"
    there = adapter.is_dir() and read_people(run)
    return read_people(run, policy_of(config, adapter)) if there else None


def people_text(found: Mapping[str, Any]) -> str:
    """Write people's judgement as two sentences."""
    people = counted(found["people"], "person", "people")
    at = f", at guidance {found['guidance_scale']:g}" if "guidance_scale" in found else ""
    return (
        f"{people} compared {counted(found['pairs'], 'pair')} of pictures{at}, without knowing the "
        f"models. The policy's is the better one in {share_text(found)}; ties, and pairs on which "
        "people differ, count half."
    )
