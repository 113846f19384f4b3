"""Whether what an evaluation left is of a run's policy as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inversion_dpo.run.disk import digest_of
from inversion_dpo.run.folder import going_on

WEIGHTS = "policy_weights"  # in what an evaluation left: a hash of the files that were judged


def trained_since(run: Path, found: Mapping[str, Any]) -> bool:
    """Tell whether a run's policy was judged before it was trained further, as far as is known.

    Args:
        run: its folder.
        found: what an evaluation of that policy left.
    """
    own, known = run / "adapter", found.get(WEIGHTS)
    other = known is not None and own.is_dir() and known != digest_of([own])
    return other or bool(going_on(run))
