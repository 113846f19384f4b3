"""A run whose config.yaml was edited by hand, and goes on."""

import json
import shutil

import pytest
import torch

from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.disk import CHECKSUM, checksum_of
from inversion_dpo.run.folder import check_output, read_rows
from inversion_dpo.training import recipe
from inversion_dpo.training.checkpoint import CheckpointError

NEWEST = "checkpoints/step-000008"


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ({"  beta: null": "  beta: 7.0"}, "objective.beta=null, and it is 7.0 now"),
        ({"  learning_rate: 0.001": "  learning_rate: 0.1"}, "training.learning_rate=0.001"),
        ({"  holdout: 0.25": "  holdout: 0.5"}, "data.holdout=0.25, and it is 0.5 now"),
        ({"  tracker: auto": "  tracker: none"}, None),
        ({"  steps: 8": "  steps: 9"}, None),
    ],
)
def test_settings_that_were_edited_in_the_run_are_refused(
    tiny_run, tiny_config, tmp_path, monkeypatch, edits, told
):
    monkeypatch.setattr(recipe, "prepare", lambda *_, **__: pytest.fail("begun"))
    run = shutil.copytree(tiny_run, tmp_path / "run")
    text = to_yaml(tiny_config("training.snapshot_every=4"))
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    (run / "config.yaml").write_text(text)
    edited = load_config(str(run / "config.yaml"), [])
    if told is None:
        with pytest.raises(pytest.fail.Exception, match="begun"):
            recipe.train(edited, run)
        return
    with pytest.raises(CheckpointError, match=f"step-000008 was trained with {told}") as caught:
        recipe.train(edited, run)
    assert f"put it back, also in {run / 'config.yaml'}" in str(caught.value)
    newest = run / "checkpoints/step-000008/state.json"  # as an earlier version wrote it
    state = json.loads(newest.read_text())
    state = {k: v for k, v in state.items() if k not in ("settings", CHECKSUM)}
    newest.write_text(json.dumps(state | {CHECKSUM: checksum_of(state)}))
    with pytest.raises(pytest.fail.Exception, match="begun"):
        recipe.train(edited, run)


def copy_with(run, folder, key, value):
    """Copy a run, with another setting in its newest checkpoint; its settings, too."""
    copy = shutil.copytree(run, folder / "run")
    state = json.loads((copy / NEWEST / "state.json").read_text())
    state["settings"][key] = value
    assert state.pop(CHECKSUM)
    (copy / NEWEST / "state.json").write_text(json.dumps(state | {CHECKSUM: checksum_of(state)}))
    return copy, state["settings"]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_more_steps_under_a_rate_that_falls_are_warned_of(
    tiny_run, tiny_config, tmp_path, monkeypatch, caplog, schedule
):
    """The rate rises again, so that the policy is not that of one longer training."""
    monkeypatch.setattr(recipe, "prepare", lambda *_, **__: pytest.fail("begun"))
    run, settings = copy_with(tiny_run, tmp_path, "training.lr_scheduler", schedule)
    assert settings["training.steps"] == 8
    for steps in (8, 9):
        more = ["training.snapshot_every=4", f"training.lr_scheduler={schedule}"]
        with pytest.raises(pytest.fail.Exception, match="begun"):
            recipe.train(tiny_config(*more, f"training.steps={steps}"), run)
        warned = "is of a training to step 8, whose rate fell towards 0" in caplog.text
        assert warned == (schedule == "linear" and steps == 9)


def test_what_out_of_memory_advises_may_change_when_a_run_goes_on(tiny_run, tiny_config, tmp_path):
    """A step in parts, recomputed, is the same step: only sums round otherwise."""
    less = ["training.gradient_accumulation=2", "training.gradient_checkpointing=true"]
    found = []
    for more in ([], less):
        run = shutil.copytree(tiny_run, tmp_path / str(len(more)))
        config = tiny_config("training.snapshot_every=4", "training.steps=9", *more)
        (run / "config.yaml").write_text(to_yaml(tiny_config("training.snapshot_every=4")))
        check_output(run, config)
        session = recipe.train(config, run)
        assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [*range(9), 9]
        found.append(session.policy.trainable())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "warned"), [("kto", True), ("inversion_dpo", False)])
def test_other_parts_are_warned_of_where_a_baseline_is_a_mean_over_them(
    tiny_run, tiny_config, tmp_path, monkeypatch, caplog, name, warned
):
    monkeypatch.setattr(recipe, "prepare", lambda *_, **__: pytest.fail("begun"))
    run, settings = copy_with(tiny_run, tmp_path, "objective.name", name)
    assert settings["training.gradient_accumulation"] == 1
    for parts in (1, 2):
        more = [f"objective.name={name}", f"training.gradient_accumulation={parts}"]
        with pytest.raises(pytest.fail.Exception, match="begun"):
            recipe.train(tiny_config("training.snapshot_every=4", *more), run)
        text = f"{run / NEWEST} was trained with training.gradient_accumulation=1. With 2 "
        assert (text in caplog.text) == (warned and parts == 2)
