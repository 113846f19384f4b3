"""Make sure that the processes of one launch see the same folders, settings and files."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from inversion_dpo.run.fields import ConfigError
from inversion_dpo.run.processes import current_team

MARK = ".together"  # a file that the first process writes and all look for
PATIENCE = 60.0  # seconds in which a network's disk shows it on other machines


def check_together(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse processes that do not share a folder, or that have other values than the first.

    Otherwise each would work for hours on pairs or settings of its own. All must call this.

    Args:
        folder: in which all will write; the first process makes it.
        values: by the name that a message gives them.

    Raises:
        ConfigError: in every process.
    """
    team = current_team()
    if team.size == 1:
        return
    everyone = team.collect([(secrets.token_hex(8), dict(values))])
    token, first = everyone[0]
    for rank, (_, own) in enumerate(everyone):
        if other := [name for name in first if own[name] != first[name]]:
            raise ConfigError(
                f"{other[0]} is {first[other[0]]!r} in the first process and {own[other[0]]!r} in "
                f"process {rank}: start all by the same command, on the same files"
            )
    mark, seen, until = folder / MARK, False, time.monotonic() + PATIENCE
    if team.main:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(token)
    while not seen and time.monotonic() < until:
        with suppress(OSError):
            seen = mark.read_text() == token
        time.sleep(0 if seen else 0.1)
    sights = team.collect([seen])
    if team.main:
        mark.unlink(missing_ok=True)
    if not all(sights):
        raise ConfigError(
            f"{folder} is not the same folder in all processes: process {sights.index(False)} does "
            "not see what the first one writes there. Give it by its whole path, on a file system "
            "that all machines share"
        )
