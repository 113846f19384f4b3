"""The seconds of a run's stages, over interruptions."""

import pytest

from inversion_dpo.run import folder as module
from inversion_dpo.run.disk import DiskError
from inversion_dpo.run.folder import read_seconds, stage


def ticking(monkeypatch, *times):
    clock = iter(times)
    monkeypatch.setattr(module.time, "time", lambda: next(clock))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_stage_counts(tmp_path, monkeypatch, error):
    ticking(monkeypatch, 10.0, 70.0, 100.0, 130.5)
    with pytest.raises(error), stage(tmp_path, "invert"):
        raise error
    assert read_seconds(tmp_path) == {"invert": 60.0}
    with stage(tmp_path, "invert"):
        pass
    assert read_seconds(tmp_path) == {"invert": 90.5}


def test_the_first_error_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise DiskError("the disk is full")

    monkeypatch.setattr(module, "atomic_json", refuse)
    with pytest.raises(ValueError, match="first"), stage(tmp_path, "train"):
        raise ValueError("first")
    with pytest.raises(DiskError), stage(tmp_path, "train"):
        pass
