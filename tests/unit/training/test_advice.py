"""Advice on made-up runs: each sickness is named with its remedy, a sound run is left alone."""

import json

import pytest

from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.disk import DiskError, digest_of
from inversion_dpo.training.advice import advise, text

SOUND = {
    "loss": 0.6,
    "winner_error": 0.09,
    "winner_error_ref": 0.10,
    "loser_error": 0.10,
    "loser_error_ref": 0.12,
    "margin": 0.4,
    "pair_gap": 0.3,
    "gradient_factor": 0.4,
    "drift": 0.01,
    "accuracy": 0.7,
    "grad_norm": 1.0,
}
HELD = {"accuracy": 0.7, "margin": 0.4, "pairs": 100.0, "winner_error": 0.09}
HELD |= {"winner_error_ref": 0.1}


def run_of(folder, *settings, steps=60, held=(), images=None, **changes):
    """Write a run of so many steps; ``held`` changes the held-out rows, one after the other."""
    row = {k: v for k, v in {**SOUND, **changes}.items() if v is not None}
    rows = [{"step": k, **row} for k in range(steps)]
    for k, row in enumerate(held or [{}]):
        looked = HELD | row
        rows.append({"step": 10 * (k + 1)} | {f"heldout_{n}": v for n, v in looked.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(to_yaml(load_config("taste", list(settings))))
    if images:
        (folder / "metrics.json").write_text(json.dumps(images))
    return folder


def win(share, low, high):
    return {"win_rate": share, "win_rate_low": low, "win_rate_high": high}


CASES = {
    "coin": ({"held": [{"accuracy": 0.53}]}, "no better than chance", "pairs check"),
    "reversed": ({"held": [{"accuracy": 0.2}]}, "worse than chance", "pairs check"),
    "few": ({"held": [{"pairs": 8.0}]}, "8 held-out pairs cannot say", "data.holdout"),
    "one": ({"held": [{"pairs": 1.0}]}, "1 held-out pair cannot say", "data.holdout"),
    "memorised": ({"accuracy": 0.99}, "memorised", "policy.rank"),
    "fell": ({"held": [{"accuracy": 0.9}, {"accuracy": 0.65}]}, "0.90 at step 10", "steps=10"),
    "decided": ({"gradient_factor": 0.02}, "factor of the last 30 steps is 0.02", "objective.beta"),
    "skipped": ({"skipped": 1.0}, "60 of 60 steps were left out", "mixed_precision=bf16"),
    "ties": ({"pair_gap": 0.012}, "the same: the reference's errors on", "pairs check"),
    "drift": ({"drift": 0.2}, "From step 29 on: the policy has drifted", "learning_rate"),
    "images": ({"images": win(0.5, 0.4, 0.6)}, "although the policy tells", "guidance"),
    "worse images": ({"images": win(0.3, 0.2, 0.4)}, "a loss, although", "snapshots"),
    "unscored": ({"images": {"n_prompts": 4}}, "not scored", "evaluation.scorer"),
    "stale": ({"images": win(0.7, 0.6, 0.8) | {"steps": 5}}, "are of step 5", "evaluate"),
    "others": (
        {"images": win(0.7, 0.6, 0.8) | {"models": [None, "some/other"]}},
        "compares other models: some/other with the base model",
        "compare other models in a new folder",
    ),
    "not finite": ({"held": [{"accuracy": float("nan")}]}, "are not finite", "bf16"),
    "rising": (
        {"held": [{"accuracy": 0.6 + k / 50, "margin": k / 10} for k in range(4)]},
        "still rise after 60 steps",
        "training.steps",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sickness_is_named_with_its_remedy(tmp_path, name):
    changes, seen, change = CASES[name]
    (one,) = [advice for advice in advise(run_of(tmp_path, **changes)) if advice.change]
    assert seen in one.seen and change in one.change


def test_a_sound_run_needs_no_change(tmp_path):
    found = advise(run_of(tmp_path, images=win(0.7, 0.6, 0.8)))
    assert not [advice for advice in found if advice.change]
    assert text(found).endswith("Nothing to change.")
    assert "better than chance" in text(found) and "a gain" in text(found)


def test_what_follows_from_a_cause_needs_no_remedy_of_its_own(tmp_path):
    sick = {"drift": 0.9, "winner_error": 0.5, "held": [{"accuracy": 0.2}]}
    found = advise(run_of(tmp_path, **sick, images=win(0.1, 0.05, 0.2)))
    (one,) = [advice for advice in found if advice.change]
    assert "drifted" in one.seen
    assert "worse than chance" in text(found) and "a loss" in text(found)


def test_what_was_feared_asks_for_no_change_once_the_images_gained(tmp_path):
    found = advise(run_of(tmp_path, drift=0.9, images=win(0.64, 0.6, 0.68)))
    assert not [advice for advice in found if advice.change]
    assert "drifted" in text(found) and "gained all the same" in text(found)
    ties = advise(run_of(tmp_path, pair_gap=0.01, images=win(0.64, 0.6, 0.68)))
    assert "Leave out pairs that look alike" in text(ties)
    left = advise(run_of(tmp_path, skipped=1.0, images=win(0.64, 0.6, 0.68)))
    assert "were left out" in text(left) and "mixed_precision" in text(left)


def test_a_loss_without_reference_is_judged_by_its_error(tmp_path):
    sft = run_of(tmp_path, "objective.name=sft", margin=None)
    assert "winners are predicted better" in text(advise(sft))
    worse = run_of(tmp_path, "objective.name=sft", margin=None, held=[{"winner_error": 0.2}])
    assert "1. Held-out error on winners 0.2, the reference's 0.1" in text(advise(worse))


def test_decided_pairs_say_nothing_about_a_loss_without_sigmoid(tmp_path):
    kto = run_of(tmp_path, "objective.name=kto", gradient_factor=0.02)
    assert "Nothing to change." in text(advise(kto))


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"drift": 0.2}, "or set objective.beta to a number above auto's 200"),
        ({"drift": 0.2, "gradient_factor": 0.49}, "Set objective.beta to a number above auto's"),
        ({"gradient_factor": 0.02}, "or set objective.beta to a number below auto's 200"),
    ],
)
def test_a_beta_that_adapts_is_replaced_by_a_number(tmp_path, changes, change):
    """It cannot be raised, and has been lowered to this one."""
    (one,) = [a for a in advise(run_of(tmp_path, **changes, beta=200.0)) if a.change]
    assert change in one.change


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run"):
        advise(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("taste", [])))
    with pytest.raises(ConfigError, match="no training step"):
        advise(tmp_path)


def test_images_of_a_later_round_are_the_runs_own(tmp_path):
    run = run_of(tmp_path, images=win(0.7, 0.6, 0.8) | {"models": [None, str(tmp_path)]})
    assert any(advice.seen.endswith("a gain") for advice in advise(run))


@pytest.mark.parametrize("when", ["while it goes on", "afterwards"])
def test_images_of_an_earlier_policy_are_called_so(tmp_path, when):
    """The settings, and so ``steps``, are those of the longer training from its begin on."""
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter/pytorch_lora_weights.safetensors"
    weights.write_bytes(b"first")
    judged = win(0.7, 0.6, 0.8) | {"steps": 70, "policy_weights": digest_of([weights.parent])}

    def trained(steps, last):
        run_of(tmp_path, f"training.steps={60 if steps == 60 else 70}", steps=steps, images=judged)
        with (tmp_path / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": steps} | last) + "\n")
        return advise(tmp_path)

    end = {"pairs": 100.0}
    assert any(advice.seen.endswith("a gain") for advice in trained(60, end))
    if when == "afterwards":
        weights.write_bytes(b"then")
    found = trained(70, end) if when == "afterwards" else trained(65, {})
    told = [advice for advice in found if "before it was trained further" in advice.seen]
    assert len(told) == 1 and f"evaluate {tmp_path}` again, once" in told[0].change
    assert not any(advice.seen.endswith("a gain") for advice in found)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_chance_alone_may_do_to_few_images_is_no_gain_and_no_loss(tmp_path, share):
    few = {"n_prompts": 5} | win(share, max(0.0, share - 0.44), min(1.0, share + 0.44))
    found = [advice.seen for advice in advise(run_of(tmp_path, images=few))]
    assert any(seen.endswith("too few prompts to tell") for seen in found)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"win_rate": None}, "win_rate None"),
        ({"win_rate_low": float("inf")}, "win_rate_low inf"),
        ({"win_rate_high": "0.8"}, "win_rate_high 0.8"),
        ({"steps": None}, "steps None"),
        ({"models": "runs/x"}, "models runs/x"),
        ({"models": [None, 5]}, r"models \[None, 5\]"),
        ({"warmth": {"gain": 0.1, "gain_low": None}}, "gain_low None"),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path, change, fault):
    run = run_of(tmp_path, images=win(0.7, 0.6, 0.8) | change)
    message = rf"metrics.json is damaged \({fault}\): run `inversion-dpo evaluate .* again"
    with pytest.raises(DiskError, match=message):
        advise(run)


def test_an_evaluation_that_lacks_an_end_of_its_interval_is_named(tmp_path):
    with pytest.raises(DiskError, match=r"metrics.json is damaged \(no win_rate_low\)"):
        advise(run_of(tmp_path, images={"win_rate": 0.7, "win_rate_high": 0.8}))


@pytest.mark.parametrize(
    ("changes", "step", "part"),
    [
        ({"drift": None}, 0, "drift"),
        ({"winner_error_ref": None}, 0, "winner_error_ref"),
        ({"held": [{"pairs": float("nan")}]}, 10, "possible held-out accuracy"),
        ({"held": [{"pairs": 0.0}]}, 10, "possible held-out accuracy"),
        ({"held": [{"accuracy": -1.0}]}, 10, "possible held-out accuracy"),
    ],
)
def test_a_row_that_lacks_a_part_is_named(tmp_path, changes, step, part):
    message = rf"metrics.jsonl: the line of step {step} is damaged \(it has no {part}\): take that"
    with pytest.raises(DiskError, match=message):
        advise(run_of(tmp_path, **changes))


def test_a_row_of_something_else_than_numbers_is_left_out_and_counted(tmp_path, caplog):
    run = run_of(tmp_path, loss="0.6")
    with pytest.raises(ConfigError, match="holds no training step"):
        advise(run)
    assert "metrics.jsonl: 60 damaged lines left out, the first is line 1" in caplog.text
