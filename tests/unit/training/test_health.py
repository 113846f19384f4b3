"""Each known failure is recognised in made-up metrics, and a sound run is left alone."""

import logging
import math

import pytest

from inversion_dpo.maths.intervals import wilson
from inversion_dpo.training.health import (
    EARLY,
    WINDOW,
    Watch,
    accuracy_text,
    complaints,
    heldout_share,
    status,
)


def rows(count=WINDOW, first=20, **changes):
    """A sound run: the loss falls, winners gain, losers stay."""
    sound = {
        "loss": 0.6,
        "winner_error": 0.09,
        "winner_error_ref": 0.10,
        "loser_error": 0.10,
        "loser_error_ref": 0.12,
        "margin": 0.4,
        "pair_gap": 0.3,
        "drift": 0.01,
        "accuracy": 0.7,
        "grad_norm": 1.0,
    }
    return [{"step": first + k, **sound, **changes} for k in range(count)]


CASES = {
    "flat loss": {"loss": math.log(2) + 1e-3, "margin": 0.0},
    "loser only": {"winner_error": 0.21, "loser_error": 0.3},
    "drift": {"drift": 0.11},
    "same images": {"pair_gap": 0.012},
}


def test_a_sound_run_is_left_alone():
    assert complaints(rows()) == {}
    assert complaints(rows(winner_error=0.155)) == {}  # as in a run whose images got better


@pytest.mark.parametrize("name", CASES)
def test_each_failure_is_said_once_it_lasts(name):
    assert list(complaints(rows(**CASES[name]))) == [name]
    assert complaints(rows(WINDOW - 1, **CASES[name])) == {}


@pytest.mark.parametrize("start", [0.5, 0.25, 1.0, 1.6145])
def test_a_flat_loss_of_another_kind_is_one_too(start):
    """KTO's, IPO's, hinge's and DMPO's at the reference."""
    assert list(complaints(rows(loss=start - 1e-3))) == ["flat loss"]
    assert complaints(rows(loss=start + 3e-3)) == {}


def test_winners_and_losers_of_a_large_batch_may_have_the_same_mean_error():
    assert complaints(rows(loser_error_ref=0.1)) == {}


def test_a_drift_without_margins_is_a_beta_that_is_too_low():
    weak, strong = (
        complaints(rows(drift=0.2, gradient_factor=g))["drift"].change for g in (0.49, 0.2)
    )
    assert weak.startswith("Raise objective.beta") and strong.startswith("Lower training.learning")


def test_one_good_step_clears_the_flat_loss():
    assert complaints(rows(**CASES["flat loss"])[:-1] + rows(1)) == {}


def test_accuracy_of_one_is_suspect_only_at_once():
    assert "perfect at once" in complaints(rows(EARLY + 1, first=0, accuracy=1.0))
    assert complaints(rows(EARLY + 1, first=50, accuracy=1.0)) == {}
    early = rows(EARLY + 1, first=0, accuracy=1.0)
    early[4]["accuracy"] = 0.9
    assert complaints(early) == {}


def test_objectives_without_reference_and_broken_steps_are_passed_over():
    bare = [{"step": k, "loss": math.log(2), "winner_error": 1.0} for k in range(99)]
    assert complaints(bare) == {}
    assert complaints(rows(loss=math.nan, drift=5.0)) == {}


def test_watch_complains_once_and_reports_when_measured(caplog):
    with caplog.at_level(logging.INFO):
        watch = Watch()
        for row in rows(3 * WINDOW, drift=0.5):
            watch.see(row)
        watch.see({**rows(1)[0], "heldout_accuracy": 0.625, "heldout_pairs": 16})
    assert caplog.text.count("has drifted") == 1
    assert caplog.text.count("accuracy 0.62 of 16 pairs (95% interval 0.39 to 0.82)") == 1


def test_single_images_are_counted_by_kind():
    """Shares of 90 liked and 10 disliked vary as one of 36 trials: pq (1/90 + 1/10) / 4."""
    row = {"heldout_accuracy": 0.75, "heldout_pairs": 100.0, "heldout_liked": 90.0}
    assert heldout_share(row) == wilson(0.75, 36)
    low, high = wilson(0.75, 36)[1:]
    expected = f"held-out accuracy 0.75 of 100 images (95% interval {low:.2f} to {high:.2f})"
    assert accuracy_text(row) == expected
    assert "of 1 image (95%" in accuracy_text(row | {"heldout_pairs": 1.0, "heldout_liked": 1.0})
    assert heldout_share(row | {"heldout_liked": 100.0}) == wilson(0.75, 100)  # of one kind


def test_status_names_what_is_there():
    assert status({"step": 3, "loss": 0.5, "winner_error": 0.25}) == (
        "step 3: loss 0.5, winner error 0.25"
    )
