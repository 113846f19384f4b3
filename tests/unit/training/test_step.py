"""One training step on a cache and a network whose numbers are known."""

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inversion_dpo.maths.losses import LOSSES, as_pair_errors
from inversion_dpo.maths.records import LossOutput, LossSettings, NoisyStates
from inversion_dpo.run.processes import Team
from inversion_dpo.run.sharded import total
from inversion_dpo.training import step as module
from inversion_dpo.training.checks import NotFiniteError
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.session import pairs_of_step
from inversion_dpo.training.step import (
    adapt,
    backward,
    heldout,
    losses,
    mean_gain,
    measurements,
    pair_errors,
    part_of_step,
    settings_now,
    step,
)
from tests.by_hand import make_plan, make_session, write_cache


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


def drawn(count, seed=0):
    return [generator_for(seed, k) for k in range(count)]


# ---- errors

# One pair of two elements. Target 0: the policy misses by (1, 3) and (2, 4), means of squares 5
# and 10; the reference by (1, 1) and (3, 3): 1 and 9; they differ by (0, 2), (1, 1): 2 and 1.
STATES = NoisyStates(
    level=torch.tensor([2, 2]),
    x_t=torch.zeros(2, 2),
    timesteps=torch.tensor([20, 20]),
    scale=torch.tensor([0.5, 0.25]),
    target=torch.zeros(2, 2),
    reference=torch.tensor([[1.0, 1.0], [3.0, 3.0]]),
)
PREDICTION = torch.tensor([[1.0, 3.0], [2.0, 4.0]])


def errors_of(cache, plan):
    return pair_errors(make_session(cache, plan), STATES, PREDICTION.requires_grad_(True), [3])


def test_errors_by_hand(cache):
    weights = torch.tensor([1.0, 1.5, 0.75, 3.0])
    e = errors_of(cache, make_plan(weights=lambda size: weights))
    assert (e.winner.item(), e.loser.item()) == (2.5, 2.5)
    assert (e.winner_ref.item(), e.loser_ref.item()) == (0.5, 2.25)
    assert (e.winner_moved.item(), e.loser_moved.item()) == (1.0, 0.25)
    assert e.weight.item() == 0.75 and e.preference.item() == 1
    assert e.overlap.item() == 0 and e.baseline.item() == 0


def test_what_a_loss_needs_is_computed_by_hand(cache):
    e = errors_of(cache, make_plan("kto", safeguard=True, soft_labels=True))
    assert e.preference.item() == pytest.approx(0.7)  # of pair 3
    assert e.baseline.item() == pytest.approx((0.5 - 2.5 + 2.25 - 2.5) / 2)
    assert e.overlap.item() == 0.5 * (1 * 2 + 3 * 4) / 2  # at the winner's scale
    assert not e.baseline.requires_grad and not e.overlap.requires_grad
    assert e.winner.requires_grad and not e.winner_ref.requires_grad


def test_the_mean_gain_weighs_every_image_alike():
    """Shares of 2 and 4 images with sums 6 and 3: 9 / 6, not the mean of 3 and 0.75."""
    others = torch.tensor([3.0, 4.0])
    many = SimpleNamespace(num_processes=2, reduce=lambda sums, how: sums + others)
    gain = torch.tensor([2.0, 4.0])
    assert mean_gain(SimpleNamespace(accelerator=many), gain).item() == 1.5
    one = SimpleNamespace(num_processes=1)
    assert mean_gain(SimpleNamespace(accelerator=one), gain).item() == 3.0


def test_measurements_by_hand():
    e = as_pair_errors(
        torch.tensor([1.0, 2, 3, 6]),
        torch.tensor([2.0, 4, 5, 8]),
        moved=torch.tensor([1.0, 2, 3, 6]),
    )
    output = LossOutput(torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.25]))
    row = measurements(output, e, compared=True)
    assert row == {
        "loss": 2.0,
        "winner_error": 1.5,
        "loser_error": 4.5,
        "winner_error_ref": 3.0,
        "loser_error_ref": 6.5,
        "accuracy": 0.5,
        "margin": 0.125,
        "gradient_factor": pytest.approx((0.377541 + 0.562177) / 2),  # of logits -0.5 and 0.25
        "drift": 3.0,
        "pair_gap": pytest.approx((3 / 5 + 4 / 8) / 2),
    }
    tied = replace(output, margin=torch.tensor([0.0, 0.25]))
    assert measurements(tied, e, compared=True)["accuracy"] == 0.75  # a tie counts half
    assert list(measurements(output, e, compared=False)) == ["loss", "winner_error", "loser_error"]
    rows = [(0.25, {"a": 4.0, "b": 0.0}), (0.75, {"a": torch.tensor(8.0), "b": 4.0})]
    summed = total(rows, None, Team(), same={"c": torch.tensor(5.0)})
    assert summed == {"a": 7.0, "b": 3.0, "c": 5.0}


# ---- losses of a batch


def test_a_trajectory_costs_the_policy_alone(cache):
    """One forward of the policy and its backward, twice a forward; the reference is cached."""
    session = make_session(cache)
    output, errors, evaluations = losses(session, [(0, 0), (3, 0)], drawn(2))
    assert session.model.calls == 4 and evaluations == 3
    assert output.loss.shape == (2,) and errors.winner_ref.min() > 0
    guided = make_session(cache, make_plan(guidance_scale=2.0))
    assert losses(guided, [(0, 0)], drawn(1))[2] == 6


def test_fresh_noise_costs_the_reference_too_where_the_loss_compares(cache):
    batch = [(0, 0), (3, 0)]
    compared = make_session(cache, make_plan("diffusion_dpo"))
    _, errors, evaluations = losses(compared, batch, drawn(2))
    assert compared.model.calls == 8 and evaluations == 4
    assert (errors.winner_moved > 0).all()  # policy 0.5 x and reference 0.25 x
    alone = make_session(cache, make_plan("sft"))
    assert losses(alone, batch, drawn(2))[2] == 3 and alone.model.calls == 4
    assert losses(alone, batch, drawn(2), compare=True)[2] == 4


def test_a_moving_reference_is_the_policy_of_some_steps_ago(cache):
    """Of weight 0.75, beside a policy of 0.5 and a first reference of 0.25."""
    plan = make_plan("diffusion_dpo", reference_every=2)
    session = make_session(cache, plan, moved={"weight": torch.tensor(0.75)})

    def errors(session, **more):
        return losses(session, *part_of_step(session, 0, 0), **more)[1]

    alone = {w: errors(make_session(cache, make_plan("diffusion_dpo"), w)) for w in (0.25, 0.75)}
    for compare, weight in ((False, 0.75), (True, 0.25)):  # held-out pairs take the first one
        found = errors(session, compare=compare)
        assert torch.equal(found.winner_ref, alone[weight].winner)
        assert torch.equal(found.loser_ref, alone[weight].loser)
    weights = [session.network.weight.item()]
    for number in range(2):
        assert session.moved["weight"].item() == 0.75
        step(session, number, 0.01)
        weights.append(session.network.weight.item())
    assert weights[0] == 0.5 and len(set(weights)) == 3
    assert session.moved["weight"].item() == weights[-1]
    assert not session.moved["weight"].requires_grad


def test_gaps_scale_beta_and_leave_the_terms(cache):
    """Pair 3 has p = .7: a gap of .4 of a mean of .8 halves its margin."""
    terms = LossSettings(2.0, anchor=3.0)
    plans = [make_plan(settings=terms, soft_labels=on, gap=0.8 * on or None) for on in (0, 1)]
    (plain, errors, _), (weighed, _, _) = (
        losses(make_session(cache, plan), [(3, 0)], drawn(1)) for plan in plans
    )
    torch.testing.assert_close(weighed.margin, plain.margin / 2)
    anchor = 1.5 * (errors.winner_moved + errors.loser_moved)
    wanted = anchor - torch.nn.functional.logsigmoid(plain.margin / 2)
    torch.testing.assert_close(weighed.loss, wanted)


def test_the_reference_of_a_dropped_prompt_is_computed_anew(cache):
    """Both then predict under the empty prompt: they differ by 0.25 x alone."""
    session = make_session(cache, make_plan(prompt_dropout=1.0))
    _, errors, evaluations = losses(session, [(1, 0)], drawn(1), drop=True)
    assert evaluations == 4
    at = cache.states([1], [int(torch.randint(0, 3, (1,), generator=generator_for(0, 0)))], "x0")
    moved = at.scale * (0.25 * at.x_t).square().mean(1)
    torch.testing.assert_close(torch.cat([errors.winner_moved, errors.loser_moved]), moved)
    kept = losses(session, [(1, 0)], drawn(1))
    assert kept[2] == 3


def test_the_safeguard_holds_the_losers_slope_and_no_value(cache):
    """Weights 0.5 and residuals that overlap: another gradient, the same loss."""
    slopes, values = [], []
    for on in (False, True):
        session = make_session(cache, make_plan(safeguard=on))
        output, errors, _ = losses(session, [(2, 0)], drawn(1))
        output.loss.sum().backward()
        slopes.append(session.network.weight.grad.item())
        values.append(output.loss.item())
    assert values[0] == values[1] and errors.overlap.item() > errors.winner.item()
    assert slopes[0] != pytest.approx(slopes[1], rel=1e-3)


# ---- one step


def gradient(cache, **changed):
    session = make_session(cache, make_plan(**changed))
    session.network.zero_grad()
    rows, own = backward(session, 2)
    every = [pair for pair, _ in pairs_of_step(session.train_pairs, 4, 0, 2)]
    assert [pair for pairs, _ in own for pair in pairs][:: session.plan.states] == every
    return session.network.weight.grad.item(), total(rows, None, Team()), session


def test_the_gradient_is_that_of_the_mean_loss(cache):
    found, row, session = gradient(cache)
    places = [generator_for(0, 0, 2, k, 0) for k in range(4)]
    batch = pairs_of_step(session.train_pairs, 4, 0, 2)
    output, errors, _ = losses(session, batch, places)
    (wanted,) = torch.autograd.grad(output.loss.mean(), session.network.weight)
    assert found == pytest.approx(wanted.item())
    assert row["loss"] == pytest.approx(output.loss.mean().item())
    assert row["winner_error"] == pytest.approx(errors.winner.mean().item())
    assert row["evaluations"] == 2 * 4 * 3  # images times a forward and a backward


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_have_the_same_gradient(cache, parts):
    whole, row, _ = gradient(cache)
    found, again, session = gradient(cache, accumulation=parts)
    assert found == pytest.approx(whole, rel=1e-5)
    assert again == pytest.approx(row, rel=1e-5)
    assert session.accelerator.unsynced == parts - 1


def test_processes_take_their_shares(cache):
    """DDP's mean over two processes is the gradient of one; measurements add up."""
    whole, row, _ = gradient(cache)
    found, rows = [], []
    for rank in (0, 1):
        session = make_session(cache, team=Team(rank, 2))
        rows.append(total(backward(session, 2)[0], None, Team()))
        found.append(session.network.weight.grad.item())
    assert sum(found) / 2 == pytest.approx(whole, rel=1e-5)
    assert {k: rows[0][k] + rows[1][k] for k in row} == pytest.approx(row, rel=1e-5)


def test_several_states_of_a_pair_are_several_places(cache):
    two, row, session = gradient(cache, states=2)
    places = [(k, s) for k in range(4) for s in range(2)]
    batch = pairs_of_step(session.train_pairs, 4, 0, 2)
    generators = [generator_for(0, 0, 2, *place) for place in places]
    output, _, _ = losses(session, [batch[k] for k, _ in places], generators)
    (wanted,) = torch.autograd.grad(output.loss.mean(), session.network.weight)
    assert two == pytest.approx(wanted.item(), rel=1e-5)
    assert row["evaluations"] == 2 * 8 * 3


def test_a_step_goes_down_the_gradient_at_its_rate(cache):
    whole, _, _ = gradient(cache)
    session = make_session(cache)
    session.network.weight.grad = torch.tensor(1e6)  # of an earlier step
    row = step(session, 2, 0.125)
    assert row["grad_norm"] == pytest.approx(abs(whole), rel=1e-5)
    assert session.network.weight.item() == pytest.approx(0.5 - 0.125 * whole, rel=1e-4)
    assert session.skipped == 0


def test_a_step_waits_for_the_device_once(cache):
    """No measurement is fetched alone, which would wait for all that the device has to do.

    They are float32 there; float64 is the one table of all, and whole numbers never left the host.
    """
    fetched = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(func) and args[0].dtype == torch.float32:
                fetched.append(args[0])
            return func(*args, **(kwargs or {}))

    session = make_session(cache, make_plan(accumulation=2))
    session.policy.trainable = None  # a walk over all modules, which takes longer than small steps
    with Watch():
        row = step(session, 0, 0.1)
    assert fetched == [] and row["grad_norm"] > 0 and row["evaluations"] == 24


def adapting(cache, steps, coefficients):
    plan = make_plan(gradient_factor=0.2)
    session = make_session(cache, plan, 1.5, coefficients=coefficients)
    return [step(session, number, 0.0) for number in steps], session


def test_an_adapting_beta_follows_the_margins_by_hand(cache):
    """Running mean of a logit: 40, then 38 + .05 (2 / 1.39) log 9, at a beta of 2 at first."""
    _, session = adapting(cache, (), {"logit": 40.0 / 0.95})
    told = {"loss": 0.1, "grad_norm": 1.0}
    adapt(session, row := told | {"gradient_factor": 0.5}, 0.2)
    assert row["beta"] == 2.0 and session.coefficients["logit"] == pytest.approx(40.0)
    assert session.coefficients["beta"] == pytest.approx(0.2)  # 2 log(4) / 40 is less
    session.coefficients |= {"logit": 2.0, "beta": 1.0}
    adapt(session, row := told | {"gradient_factor": 0.1}, 0.2)
    mean = 0.95 * 2.0 + 0.05 * 2 * math.log(9)
    assert row["beta"] == 1.0
    wanted = {"logit": mean, "beta": 2 * math.log(4) / mean}
    assert session.coefficients == pytest.approx(wanted) and 0.2 < wanted["beta"] < 2
    assert settings_now(session).beta == session.coefficients["beta"]
    adapt(session, told | {"gradient_factor": 0.0}, 0.2)  # decided beyond what a float holds
    plain = make_session(cache, weight=1.5)
    assert "beta" not in step(plain, 0, 0.0) and plain.coefficients == {}


def test_an_adapting_beta_starts_at_its_loss_s_own(cache):
    rows, session = adapting(cache, range(2), {})
    assert rows[0]["beta"] == rows[1]["beta"] == 2.0 and set(session.coefficients) == {
        "logit",
        "beta",
    }


def test_an_adapting_beta_goes_on_to_the_bit_and_passes_over_broken_steps(cache, monkeypatch):
    whole, session = adapting(cache, range(4), {})
    _, first = adapting(cache, range(2), {})
    again, second = adapting(cache, range(2, 4), json.loads(json.dumps(first.coefficients)))
    assert again == whole[2:] and second.coefficients == session.coefficients
    kept = dict(session.coefficients)
    broken = {"loss": math.nan, "grad_norm": 1.0, "gradient_factor": math.nan}
    adapt(session, broken, session.plan.gradient_factor)
    assert session.coefficients == kept


def test_a_long_gradient_is_clipped(cache):
    session = make_session(cache, clip=1e-3)
    row = step(session, 2, 1.0)
    assert row["grad_norm"] > 1e-2
    assert abs(session.network.weight.item() - 0.5) == pytest.approx(1e-3, rel=1e-3)


def broken(session, monkeypatch, pairs):
    """Make the loss of these pairs infinite."""
    whole = module.losses

    def only(session, batch, generators, **more):
        output, errors, evaluations = whole(session, batch, generators, **more)
        bad = torch.tensor([pair in pairs for pair, _ in batch])
        loss = torch.where(bad, torch.full_like(output.loss, math.inf), output.loss)
        return replace(output, loss=loss), errors, evaluations

    monkeypatch.setattr(module, "losses", only)


def test_a_step_without_a_number_is_left_out_and_its_pair_named(cache, monkeypatch, caplog):
    session = make_session(cache)
    broken(session, monkeypatch, [1])
    with caplog.at_level(logging.WARNING):
        row = step(session, 0, 0.1)
    assert session.network.weight.item() == 0.5
    assert row["skipped"] == session.skipped == 1 and row["loss"] == math.inf
    assert "pairs 1 (1111111111111111)" in caplog.text
    with pytest.raises(NotFiniteError, match="2 steps were left out"):
        step(session, 1, 0.1)


@pytest.mark.parametrize(("pairs", "left_out"), [([], 0), ([1], 1)])
def test_a_scaler_sees_every_gradient(cache, monkeypatch, pairs, left_out):
    """With fp16 the scaler leaves steps out; a loss that is no number counts all the same."""
    session = make_session(cache)
    session.accelerator.scaler = object()
    session.accelerator.clip_grad_norm_ = lambda parameters, limit: torch.tensor(math.inf)
    broken(session, monkeypatch, pairs)
    steps = []
    monkeypatch.setattr(session.optimizer, "step", lambda: steps.append(1))
    row = step(session, 0, 0.1)
    assert steps == [1] and session.skipped == left_out and row["grad_norm"] == math.inf


# ---- held-out pairs


def test_held_out_measurements_are_the_mean_of_two_draws_of_each_pair(cache):
    session = make_session(cache, heldout_pairs=[4, 1, 2])
    found = heldout(session)
    assert heldout(session) == found  # the same states every time
    batch = [(pair, 0) for _ in range(2) for pair in (4, 1, 2)]
    places = [generator_for(1, draw, place) for draw in range(2) for place in range(3)]
    output, errors, _ = losses(session, batch, places, compare=True)
    wanted = {k: v.item() for k, v in measurements(output, errors, compared=True).items()}
    assert "heldout_loss" not in found
    for key, value in wanted.items():
        if key != "loss":
            assert found[f"heldout_{key}"] == pytest.approx(value, rel=1e-5), key
    assert len(found) == len(wanted) and found["heldout_pairs"] == 3


def test_no_more_held_out_pairs_than_the_limit(cache):
    all_three = make_session(cache, heldout_pairs=[4, 1, 2])
    first = make_session(cache, heldout_pairs=[4])
    assert heldout(all_three, limit=1) == pytest.approx(heldout(first))
    first.model.calls = 0
    heldout(first, draws=3)
    assert first.model.calls == 3 * 2


def test_a_held_out_batch_is_no_larger_than_a_steps_part(cache, monkeypatch):
    sizes, whole = [], module.losses

    def counted(session, batch, generators, **more):
        sizes.append(len(batch))
        return whole(session, batch, generators, **more)

    monkeypatch.setattr(module, "losses", counted)
    heldout(make_session(cache, make_plan(accumulation=2), heldout_pairs=[4, 1, 2]))
    assert sizes == [2, 2, 2]
    sizes.clear()
    heldout(make_session(cache, make_plan(batch_size=5, accumulation=2), heldout_pairs=[4, 1, 2]))
    assert sizes == [3, 3]


def test_every_process_has_as_many_forwards_and_only_its_own_count(cache, monkeypatch):
    """Three chunks on two processes: the second repeats one, at weight 0."""
    monkeypatch.setattr(module, "total", lambda rows, device, team: total(rows, device, Team()))
    plan, pairs = make_plan(batch_size=4), [4, 1, 2]
    rows, calls = [], []
    for rank in (0, 1):
        session = make_session(cache, plan, heldout_pairs=pairs, team=Team(rank, 2))
        rows.append(heldout(session))
        calls.append(session.model.calls)
    assert calls == [8, 8]  # 2 + 2 of six places, and of the third chunk 2 and again 2, two images
    alone = heldout(make_session(cache, plan, heldout_pairs=pairs))
    both = {k: rows[0][k] + rows[1][k] for k in alone} | {"heldout_pairs": 3}
    assert both == pytest.approx(alone, rel=1e-5)


def test_losses_uses_the_plans_own_loss_and_settings(cache):
    plan = make_plan(loss=LOSSES["dpo"], settings=LossSettings(2.0, "ipo"))
    output, _, _ = losses(make_session(cache, plan), [(0, 0)], drawn(1))
    torch.testing.assert_close(output.loss, (output.margin - 0.5).square())
