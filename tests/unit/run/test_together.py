"""Processes of one launch that write to folders of their own, or have other settings."""

from types import SimpleNamespace

import pytest

from inversion_dpo.run import together
from inversion_dpo.run.config import ConfigError

VALUES = {"training.steps": 4, "objective.beta": 2000.0}


def process(monkeypatch, rank, *answers):
    """Be one of two processes; ``answers`` are what collecting gives, None for both as this one."""
    given = iter(answers)
    collect = SimpleNamespace(
        rank=rank,
        size=2,
        main=rank == 0,
        collect=lambda found: next(given, None) or [*found, *found],
    )
    monkeypatch.setattr(together, "current_team", lambda: collect)
    monkeypatch.setattr(together, "PATIENCE", 0.3)


def test_one_process_is_not_asked(tmp_path):
    together.check_together(tmp_path / "none", VALUES)
    assert not (tmp_path / "none").exists()


def test_the_first_leaves_nothing_behind(tmp_path, monkeypatch):
    process(monkeypatch, 0)
    together.check_together(tmp_path / "run", VALUES)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_other_settings_are_named_in_every_process(tmp_path, monkeypatch, rank):
    process(monkeypatch, rank, [("a", VALUES), ("b", VALUES | {"objective.beta": 5.0})])
    with pytest.raises(ConfigError) as caught:
        together.check_together(tmp_path, VALUES)
    assert str(caught.value) == (
        "objective.beta is 2000.0 in the first process and 5.0 in process 1: start all by the same "
        "command, on the same files"
    )


@pytest.mark.parametrize("there", [None, "of another launch", "a"])
def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch, there):
    process(monkeypatch, 1, [("a", VALUES), ("b", VALUES)], there != "a" and [True, False])
    if there:
        (tmp_path / together.MARK).write_text(there)
    if there == "a":
        together.check_together(tmp_path, VALUES)
        return
    with pytest.raises(ConfigError, match=f"{tmp_path} is not the same folder .*: process 1 does"):
        together.check_together(tmp_path, VALUES)
