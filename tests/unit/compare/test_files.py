"""A comparison that goes on after a file has changed under its name."""

import shutil
from dataclasses import replace

import pytest

from inversion_dpo.compare.runs import FILES, digests, folder_of, refuse_other_files
from inversion_dpo.run.config import ConfigError
from inversion_dpo.run.disk import atomic_json


@pytest.fixture
def config(tiny_config, tiny_pipeline, pair_file, tmp_path):
    """Settings whose files lie in ``tmp_path``."""
    shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    shutil.copy(pair_file, tmp_path / "pairs.parquet")
    (tmp_path / "prompts.txt").write_text("a small red star\na large blue circle\n")
    return tiny_config(
        f"model.path={tmp_path / 'pipeline'}",
        f"data.pairs={tmp_path / 'pairs.parquet'}",
        f"evaluation.prompts={tmp_path / 'prompts.txt'}",
    )


def new_pairs(folder, write_pairs):
    write_pairs(folder / "pairs.parquet", 4)


def new_prompts(folder, write_pairs):
    (folder / "prompts.txt").write_text("a small red star\na large green circle\n")


def new_weights(folder, write_pairs):
    scheduler = folder / "pipeline/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")


CHANGES = {"data.pairs": new_pairs, "evaluation.prompts": new_prompts, "model.path": new_weights}


@pytest.mark.parametrize("key", CHANGES)
def test_finished_runs_of_files_that_changed_are_refused(config, tmp_path, write_pairs, key):
    result = folder_of(tmp_path, "x0-0") / "result.json"
    result.parent.mkdir(parents=True)
    atomic_json({FILES: digests(config)}, result)
    runs = [("x0-0", config), ("sft-0", replace(config))]
    refuse_other_files(tmp_path, runs)
    CHANGES[key](tmp_path, write_pairs)
    with pytest.raises(ConfigError, match=f"x0-0 holds a finished run, and what {key} names has c"):
        refuse_other_files(tmp_path, runs)
    atomic_json({}, result)  # of an earlier version
    refuse_other_files(tmp_path, runs)
