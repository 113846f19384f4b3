"""What an inversion is said to have taken, also where a kill came in between."""

import os
from types import SimpleNamespace

import pytest

from inversion_dpo.compare import experiment
from inversion_dpo.run.config import load_config


@pytest.mark.parametrize(
    ("there", "seconds", "warned"),
    [([], 30, False), ([0, 5], 60, True), ([0, 10, 20, 30], 30 + 40, True)],
)
def test_a_killed_inversion_is_not_said_to_be_quick(
    tmp_path, monkeypatch, caplog, there, seconds, warned
):
    """Of four shards none, two or all were written before the 30 seconds that are timed."""
    folder = tmp_path / "cache" / "of-these"
    folder.mkdir(parents=True)
    for number, at in enumerate(there):
        file = folder / f"shard-{number:05d}.json"
        file.touch()
        os.utime(file, (at, at))
    clock = iter([100.0, 130.0] * 2)
    cache = SimpleNamespace(folder=folder, sizes=[(64, 64)] * 4)
    monkeypatch.setattr(experiment, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(experiment, "prepare", lambda *_: SimpleNamespace(cache=cache))
    monkeypatch.setattr(experiment, "inversion_evaluations", lambda *_: 7.0)
    for _ in range(2):  # measured once
        found = experiment.inversion_cost(tmp_path, load_config("taste", []))
        assert found == {"evaluations": 7.0, "seconds": seconds}
    assert (caplog.text.count("what its inversion took is estimated") == 1) == warned
