"""A training step on numbers that are known: single images, and what each part is given."""

import math
from contextlib import contextmanager

import pytest
import torch

from inversion_dpo.maths.losses import as_pair_errors
from inversion_dpo.maths.records import LossOutput, NoisyStates
from inversion_dpo.training import step as module
from inversion_dpo.training.checks import StartupError, check_is_log_2
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.step import (
    adapt,
    backward,
    heldout,
    losses,
    measurements,
    of_sides,
    pair_errors,
    part_of_step,
    step,
)
from tests.by_hand import make_plan, make_session, write_cache


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


# ---- single images

# One image of two elements. Target 0: the policy misses by (1, 3), a mean square of 5, the
# reference by (1, 1); they differ by (0, 2). The scale halves all.
STATE = NoisyStates(
    level=torch.tensor([2]),
    x_t=torch.zeros(1, 2),
    timesteps=torch.tensor([20]),
    scale=torch.tensor([0.5]),
    target=torch.zeros(1, 2),
    reference=torch.tensor([[1.0, 1.0]]),
)
PREDICTION = torch.tensor([[1.0, 3.0]])


def alone(cache, monkeypatch, preference=0.8, region=None):
    """Let the rows of a cache be single images."""
    monkeypatch.setattr(cache, "single", True)
    monkeypatch.setattr(cache, "preference", lambda pairs: torch.tensor([preference] * len(pairs)))
    monkeypatch.setattr(cache, "region", lambda pairs: region)
    return cache


@pytest.mark.parametrize(
    ("name", "chance", "region", "winner", "loser", "sure"),
    [
        ("kto", 0.8, None, (2.5, 0.5, 1.0), (0.0, 0.0, 0.0), 0.8),
        ("kto", 0.3, None, (0.0, 0.0, 0.0), (2.5, 0.5, 1.0), 0.7),
        ("kto", 0.8, [0.0, 2.0], (4.5, 0.5, 2.0), (0.0, 0.0, 0.0), 0.8),
        ("denoising", 0.3, None, (2.5, 0.5, 1.0), (0.0, 0.0, 0.0), 0.7),
    ],
)
def test_errors_of_an_image_by_hand(cache, monkeypatch, name, chance, region, winner, loser, sure):
    """They are the winner's if it is liked, or if the loss has no labels."""
    given = None if region is None else torch.tensor([region])
    alone(cache, monkeypatch, chance, given)
    session = make_session(cache, make_plan(name, soft_labels=True))
    e = pair_errors(session, STATE, PREDICTION, [3])
    assert (e.winner.item(), e.winner_ref.item(), e.winner_moved.item()) == winner
    assert (e.loser.item(), e.loser_ref.item(), e.loser_moved.item()) == loser
    assert e.preference.item() == pytest.approx(sure)
    liked = float(winner[0] > 0)
    assert (e.winner_share.item(), e.loser_share.item()) == (liked, 1 - liked)


def test_errors_of_both_images_in_a_region_by_hand(cache, monkeypatch):
    monkeypatch.setattr(cache, "region", lambda pairs: torch.tensor([[0.0, 2.0]]))
    twice = NoisyStates(
        **{k: torch.cat([v, v]) for k, v in vars(STATE).items() if k != "evaluations"}
    )
    second = torch.cat([PREDICTION, torch.tensor([[9.0, 2.0]])])
    e = pair_errors(make_session(cache), twice, second, [3])
    assert (e.winner.item(), e.loser.item()) == (4.5, 2.0)  # of the second element alone


LIKED = torch.tensor([True, False, True])


def errors_of_three():
    policy, reference, moved = torch.tensor([[2.0, 4, 6], [3.0, 5, 9], [1.0, 2, 3]])
    return as_pair_errors(policy, reference, moved=moved, liked=LIKED)


def test_measurements_of_single_images_by_hand():
    """Margins of 1 and 0 for the liked ones, so 1.5 are right; 2 for the other, which is right."""
    output = LossOutput(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 0.0]))
    row = measurements(output, errors_of_three(), compared=True, single=True)
    third = {"winner_error": 8, "loser_error": 4, "winner_error_ref": 12, "loser_error_ref": 5}
    third |= {"winners": 2, "losers": 1, "winner_right": 1.5, "loser_right": 1, "accuracy": 2.5}
    third |= {"loss": 6, "margin": 3, "drift": 6}
    factor = sum(1 / (1 + math.exp(m)) for m in (1, 2, 0)) / 3
    wanted = {k: v / 3 for k, v in third.items()} | {"gradient_factor": factor}
    assert {k: v.item() for k, v in row.items()} == pytest.approx(wanted)
    sides = of_sides({k: v.item() for k, v in row.items()})
    assert sides["winner_error"] == pytest.approx(4) and sides["loser_error"] == pytest.approx(4)
    assert sides["accuracy"] == pytest.approx((0.75 + 1) / 2) and "winners" not in sides
    plain = measurements(output, errors_of_three(), compared=False, single=True)
    assert set(plain) == {"loss", "winner_error", "loser_error", "winners", "losers"}


def test_measurements_are_float32_without_a_gradient_and_zero_gaps_count_as_zero():
    policy = torch.ones(2, dtype=torch.float64, requires_grad=True)
    e = as_pair_errors(policy, torch.zeros(2, dtype=torch.float64))
    row = measurements(LossOutput(policy[:1], policy[:1].detach()), e, compared=True)
    assert row["pair_gap"].item() == 0 and row["drift"].item() == 0
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in row.values())


def test_the_gap_is_that_of_the_further_image():
    e = as_pair_errors(torch.ones(4), torch.tensor([4.0, 1.0, 1.0, 2.0]))
    row = measurements(LossOutput(torch.ones(2), torch.ones(2)), e, compared=True)
    assert row["pair_gap"].item() == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_errors_are_means_over_the_side_that_has_them():
    row = {"loss": 1.0, "winner_error": 0.25, "loser_error": 0.0, "winners": 0.5, "losers": 0.0}
    assert of_sides(row) == {"loss": 1.0, "winner_error": 0.5}
    # nine of ten are disliked, all of them right, and the liked one is wrong: no better than chance
    row = {"accuracy": 0.9, "winner_right": 0.0, "loser_right": 0.9, "winners": 0.1, "losers": 0.9}
    assert of_sides(row) == {"accuracy": 0.5}
    whole = {"winner_error": 0.25, "loser_error": 0.5}
    assert of_sides(whole) == whole


@pytest.mark.parametrize("single", [True, False])
def test_rows_of_single_images_are_of_sides_in_a_step_and_held_out(cache, monkeypatch, single):
    if single:
        alone(cache, monkeypatch)
    row = {"loss": 1.0, "winner_error": 0.25, "winners": 0.5, "losers": 0.5}
    measured = {k: torch.tensor(v) for k, v in row.items()}
    session = make_session(cache, heldout_pairs=[4])

    def given(session, batch, generators, **more):
        assert torch.is_grad_enabled() != more.get("compare", False)  # held-out ones need none
        anchor = 0 * session.network.weight
        return LossOutput(torch.ones(len(batch)) + anchor, torch.zeros(len(batch))), None, 3

    monkeypatch.setattr(module, "losses", given)
    monkeypatch.setattr(module, "measurements", lambda *_, **__: dict(measured))
    found = step(session, 0, 0.0)
    held = heldout(session)
    assert found["winner_error"] == held["heldout_winner_error"] == (0.5 if single else 0.25)
    assert ("winners" in found, "heldout_winners" in held) == (not single, not single)
    assert found["evaluations"] == (1 if single else 2) * 3 * 4


# ---- what each part is given


def test_the_next_part_is_read_ahead_and_the_last_part_syncs(cache, monkeypatch):
    plan = make_plan(accumulation=2)
    session, told = make_session(cache, plan), []

    @contextmanager
    def no_sync(network):
        told.append("apart")
        yield

    session.accelerator.no_sync = no_sync
    whole = module.losses
    ahead = lambda pairs, positions: told.append((list(pairs), positions))  # noqa: E731
    monkeypatch.setattr(cache, "read_ahead", ahead)

    def noted(session, batch, generators, **more):
        told.append([pair for pair, _ in batch])
        return whole(session, batch, generators, **more)

    monkeypatch.setattr(module, "losses", noted)
    _, own = backward(session, 3)
    here, after = (
        [[pair for pair, _ in part_of_step(session, *place)[0]] for place in places]
        for places in (((3, 0), (3, 1)), ((3, 1), (4, 0)))
    )
    assert [t for t in told if isinstance(t, str | list)] == ["apart", here[0], here[1]]
    reads = [t for t in told if isinstance(t, tuple)]
    assert [pairs for pairs, _ in reads] == after and here != after
    assert all(len(positions) == 2 for _, positions in reads)
    assert not any(loss.requires_grad for _, loss in own)


@pytest.mark.parametrize("name", [None, "prompt", "graph", "caption"])
def test_any_share_that_is_dropped_is_dropped(cache, monkeypatch, name):
    shares = {f"{name}_dropout": 0.5} if name else {}
    session, told, whole = make_session(cache, make_plan(**shares)), [], module.losses

    def noted(*given, drop, **more):
        told.append(drop)
        return whole(*given, **more)

    monkeypatch.setattr(module, "losses", noted)
    backward(session, 0)
    assert told == [name is not None]


def test_a_prompt_is_dropped_where_that_is_asked_alone(cache):
    """The network adds the prompt: 2 for pair 1, -7 for none. So predictions differ by 9."""
    session = make_session(cache, make_plan(prompt_dropout=1.0))
    seen, predict = [], session.model.predict

    def noted(network, x, t, condition):
        seen.append(condition["prompt"].flatten().tolist())
        return predict(network, x, t, condition)

    session.model.predict = noted
    for drop in (False, True):
        losses(session, [(1, 0)], [generator_for(0, 0)], drop=drop)
    assert seen[0] == [2, 2] and all(prompts == [-7, -7] for prompts in seen[1:])


# ---- what adapts


def test_a_reference_moves_after_every_third_step(cache):
    plan = make_plan("diffusion_dpo", reference_every=3)
    session = make_session(cache, plan, moved={"weight": torch.tensor(0.75)})
    moved = []
    for number in range(6):
        before = session.moved["weight"].item()
        step(session, number, 0.01)
        moved.append(session.moved["weight"].item() != before)
    assert moved == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("factor", "logit"), [(0.0, 13.815510), (1.0, -13.815510), (0.25, 1.098612)]
)
def test_a_factor_that_is_decided_counts_as_a_millionth(cache, factor, logit):
    """From nothing, with a beta of half: .05 times (2 / .5) times the logit."""
    session = make_session(cache, make_plan(gradient_factor=0.2), coefficients={"beta": 0.5})
    adapt(session, {"loss": 0.1, "grad_norm": 1.0, "gradient_factor": factor}, 0.2)
    assert session.coefficients["logit"] == pytest.approx(0.05 * 4 * logit, rel=1e-5)


def test_a_first_loss_that_rounding_moved_is_warned_of_in_16_bits_and_refused_in_32(caplog):
    """SDXL's preset has bfloat16 and beta 5000: a refusal would come after the inversion."""
    check_is_log_2(math.log(2) + 0.099, exact=True)
    check_is_log_2(1.1032, exact=False)
    assert "at step 0 the loss is 1.1032" in caplog.text
    with pytest.raises(StartupError, match="lower objective.beta"):
        check_is_log_2(1.1032, exact=True)
