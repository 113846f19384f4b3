"""Where a step looks, on a cache and a model whose numbers are known."""

from dataclasses import replace

import pytest
import torch

from inversion_dpo.maths.records import NoisyStates
from inversion_dpo.maths.schedule import step
from inversion_dpo.training.generators import generator_for, integers, normal
from inversion_dpo.training.states import (
    STATES,
    noise_states,
    policy_states,
    predict,
    stepped_states,
    stored_states,
    with_dropout,
    with_reference,
)
from tests.by_hand import GRID, clean, make_plan, make_session, state, write_cache

PAIRS = [3, 0]


def generators(seed):
    return [generator_for(seed, k) for k in range(len(PAIRS))]


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


def test_every_level_between_low_and_high_is_drawn_and_no_other(cache):
    session = make_session(cache, make_plan(low=2, high=3))
    levels = [
        stored_states(session, PAIRS, {}, generators(seed)).level.tolist() for seed in range(20)
    ]
    assert all(drawn[:2] == drawn[2:] for drawn in levels)  # winner and loser alike
    assert {k for drawn in levels for k in drawn} == {2, 3}
    assert any(drawn[0] != drawn[1] for drawn in levels)


def test_a_trajectorys_state_is_the_cached_one(cache):
    states = stored_states(make_session(cache), PAIRS, {}, generators(1))
    i = states.level.tolist()
    wanted = [state(p, side, i[k]) for side in (0, 1) for k, p in enumerate(PAIRS)]
    assert torch.equal(states.x_t, torch.stack(wanted))


def test_the_two_images_of_a_pair_share_noise_and_level(cache):
    plan = make_plan("diffusion_dpo", low=1, high=3)
    states = noise_states(make_session(cache, plan), PAIRS, {}, generators(5))
    assert states.level[:2].tolist() == states.level[2:].tolist()
    at = GRID.levels[states.level]
    x_0 = torch.stack([clean(p, side) for side in (0, 1) for p in PAIRS])
    eps = (states.x_t - at.alpha[:, None] * x_0) / at.sigma[:, None]
    torch.testing.assert_close(eps[:2], eps[2:])
    assert (eps[0] - eps[1]).abs().min() > 1e-3  # two pairs have two noises
    wanted = at.alpha[:, None] * eps - at.sigma[:, None] * x_0
    torch.testing.assert_close(states.target, wanted, check_dtype=False)
    torch.testing.assert_close(states.scale, at.alpha.square().float())
    assert torch.equal(states.timesteps, GRID.timesteps[states.level])
    assert states.evaluations == 0


def test_noise_lies_between_low_and_high(cache):
    plan = make_plan("diffusion_dpo", low=1, high=2)
    session = make_session(cache, plan)
    drawn = {
        k
        for seed in range(20)
        for k in noise_states(session, PAIRS, {}, generators(seed)).level.tolist()
    }
    assert drawn == {1, 2}


@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_a_straight_line_leads_to_each_images_own_noise_as_far_as_it_is_coupled(
    cache, monkeypatch, rho
):
    plan, fresh = make_plan("diffusion_dpo", low=1, high=3), generators(5)
    before = noise_states(make_session(cache, plan), PAIRS, {}, fresh)
    own = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25], [2.0, 2.0]])
    read = cache.of_images
    monkeypatch.setattr(
        cache, "of_images", lambda name, pairs: own if name == "endpoint" else read(name, pairs)
    )
    session = make_session(cache, replace(plan, path="line", coupling=rho))
    states = STATES["line"](session, PAIRS, {}, generators(5))
    assert torch.equal(states.level, before.level)
    at, x_0 = GRID.levels[states.level], read("clean", PAIRS)
    alpha, sigma = at.alpha[:, None].float(), at.sigma[:, None].float()
    eps = rho * own + (1 - rho**2) ** 0.5 * (before.x_t - alpha * x_0) / sigma
    torch.testing.assert_close(states.x_t, alpha * x_0 + sigma * eps)
    torch.testing.assert_close(states.target, alpha * eps - sigma * x_0)


def _steps_up(states):
    """Of each row its place, prompt, index, the noised image below, and the naive step from it."""
    noise = normal((2,), _after_level(2, 3)).repeat(2, 1)
    for row, (p, side) in enumerate([(3, 0), (0, 0), (3, 1), (0, 1)]):
        i, prompt = int(states.level[row]), 1.0 + row % 2
        low, high = GRID.levels[i - 1], GRID.levels[i]
        x = (low.alpha * clean(p, side) + low.sigma * noise[row]).float()
        v = 0.25 * x + prompt + GRID.timesteps[i - 1] / 10
        yield row, (p, side), prompt, i, x, step(x, v, low, high, "v_prediction")


def test_an_unrefined_step_from_fresh_noise_follows_the_reference_at_its_clean_end(cache):
    """With v = 0.25 x + prompt + t / 10, evaluated where the step begins."""
    session = make_session(cache, make_plan("kto", path="stepped", low=2, high=3))
    condition = {"prompt": torch.tensor([[1.0], [2.0]] * 2)}
    states = stepped_states(session, PAIRS, condition, generators(0))
    for row, _, _, _, _, up in _steps_up(states):
        torch.testing.assert_close(states.x_t[row], up, rtol=1e-4, atol=1e-4)
    assert states.evaluations == 1 and session.model.calls == 4


def test_a_step_up_from_fresh_noise_is_undone_by_a_step_down(cache):
    """With v = 0.25 x + prompt + t / 10 of the reference, at the state that v itself led to."""
    session = make_session(cache, make_plan("kto", path="stepped", low=2, high=3, iterations=1))
    condition = {"prompt": torch.tensor([[1.0], [2.0]] * 2)}
    states = stepped_states(session, PAIRS, condition, generators(0))
    for row, (p, side), prompt, i, x, up in _steps_up(states):
        low, high = GRID.levels[i - 1], GRID.levels[i]
        again = 0.25 * up + prompt + GRID.timesteps[i] / 10
        down = step(states.x_t[row], again, high, low, "v_prediction")
        torch.testing.assert_close(down, x, rtol=1e-4, atol=1e-4)
        there = step(states.x_t[row], states.target[row], high, GRID.levels[0], "v_prediction")
        torch.testing.assert_close(there, clean(p, side), rtol=1e-4, atol=1e-4)
    assert states.evaluations == 2 and session.model.calls == 8


def _after_level(low, high):
    """Generators from which the level has been drawn."""
    drawn = generators(0)
    integers(low, high, drawn)
    return drawn


# ---- under the policy


def climbed(x, top, name, prompt, noises=()):
    """The state that the network 0.5 x + prompt + t / 10 leads to, one image at a time."""
    for j in range(top):
        low, high, t = GRID.levels[j], GRID.levels[j + 1], GRID.timesteps[j] / 10
        v = 0.5 * x + prompt + t
        up = step(x, v, low, high, "v_prediction")
        if name == "renoise":
            again = 0.5 * up + prompt + t
            up = step(x, (v + again) / 2, low, high, "v_prediction")
        x = up + noises[j] if noises else up
    return x


def test_renoise_follows_the_mean_of_two_predictions(cache):
    session = make_session(cache, make_plan("smpo", low=1, high=3))
    condition = {"prompt": torch.tensor([[1.0], [2.0]] * 2)}
    for seed in range(4):
        states = policy_states(session, PAIRS, condition, generators(seed))
        for row, (p, side) in enumerate([(3, 0), (0, 0), (3, 1), (0, 1)]):
            top, prompt = int(states.level[row]), 1.0 + row % 2
            wanted = climbed(clean(p, side), top, "renoise", prompt)
            torch.testing.assert_close(states.x_t[row], wanted)
            down = step(
                states.x_t[row],
                states.target[row],
                GRID.levels[top],
                GRID.levels[0],
                "v_prediction",
            )
            torch.testing.assert_close(down, clean(p, side), rtol=1e-4, atol=1e-4)
        assert states.evaluations == 2 * int(states.level.max())
        alpha = GRID.levels.alpha[states.level]
        torch.testing.assert_close(states.scale, alpha.square().float())
        assert torch.equal(states.timesteps, GRID.timesteps[states.level])


def test_noise_beside_the_path_is_a_tenth_of_the_posteriors(cache, monkeypatch):
    """sigma_low / sigma_high sqrt(sigma_high^2 - (alpha_high / alpha_low)^2 sigma_low^2) / 10."""
    ones = lambda shape, generators: torch.ones(len(generators), *shape)  # noqa: E731
    monkeypatch.setattr("inversion_dpo.training.states.normal", ones)
    session = make_session(cache, make_plan("inpo", low=3, high=3))
    condition = {"prompt": torch.zeros(4, 1)}
    states = policy_states(session, PAIRS, condition, generators(0))
    # sigma = 0, 0.28, 0.6, 0.8: 0; 0.28 / 0.6 sqrt(0.36 - (0.8 / 0.96)^2 0.0784); ...
    first = 0.28 / 0.6 * (0.36 - (0.8 / 0.96) ** 2 * 0.0784) ** 0.5
    second = 0.6 / 0.8 * (0.64 - (0.6 / 0.8) ** 2 * 0.36) ** 0.5
    noises = (0.0, 0.1 * first, 0.1 * second)
    wanted = torch.stack(
        [climbed(clean(p, side), 3, "policy", 0.0, noises) for side in (0, 1) for p in PAIRS]
    )
    torch.testing.assert_close(states.x_t, wanted)
    assert states.evaluations == 3
    assert not states.x_t.requires_grad


# ---- what is shown, and what is predicted


def test_a_dropped_prompt_is_dropped_for_both_images_with_its_graph(cache):
    def shown(**shares):
        condition = cache.condition([3, 0])
        session = make_session(cache, make_plan(**shares))
        with_dropout(session, [(3, 0), (0, 0)], condition)
        return {k: v.flatten().tolist() for k, v in condition.items()}

    whole = {k: v.flatten().tolist() for k, v in cache.condition([3, 0]).items()}
    none = {"prompt": [-7.0] * 4, "graph_rows": [-9.0] * 4}
    assert shown() == whole
    assert shown(prompt_dropout=1.0) == whole | none
    assert shown(graph_dropout=1.0) == whole | {"graph_rows": none["graph_rows"]}
    assert shown(caption_dropout=1.0) == whole | {"prompt": none["prompt"]}


def test_each_pair_is_dropped_by_a_chance_of_its_own_in_every_epoch(cache):
    session = make_session(cache, make_plan(prompt_dropout=0.5))
    seen = set()
    for epoch in range(30):
        condition = cache.condition([3, 0])
        with_dropout(session, [(3, epoch), (0, epoch)], condition)
        dropped = [value == -7 for value in condition["prompt"].flatten().tolist()]
        assert dropped[:2] == dropped[2:]
        seen.add(tuple(dropped[:2]))
    assert len(seen) == 4


def test_a_share_of_nothing_drops_nothing_by_the_least_chance(cache, monkeypatch):
    monkeypatch.setattr("inversion_dpo.training.states.chance", lambda *key: 0.0)
    condition = cache.condition([3, 0])
    with_dropout(make_session(cache), [(3, 0), (0, 0)], condition)
    assert condition["prompt"].flatten().tolist() == [4.0, 1.0] * 2
    assert condition["graph_rows"].flatten().tolist() == [3.5, 0.5] * 2


def test_the_reference_is_asked_at_the_same_place_and_is_one_evaluation_more(cache):
    session = make_session(cache)
    x, t = torch.ones(4, 2), torch.tensor([10, 20, 10, 20])
    nothing = torch.zeros(4, 2)
    states = NoisyStates(t, x, t, torch.ones(4), nothing, nothing, evaluations=6)
    found = with_reference(session, states, {"prompt": torch.tensor([[1.0], [2], [3], [4]])})
    # 0.25 x + prompt + t / 10
    wanted = torch.tensor([2.25, 4.25, 4.25, 6.25])[:, None].expand(4, 2)
    torch.testing.assert_close(found.reference, wanted)
    assert found.evaluations == 7 and not found.reference.requires_grad
    assert found.target is nothing and found.x_t is x


def test_a_guided_prediction_is_what_is_trained(cache):
    """p_u + 3 (p_c - p_u) with p = x / 2 + prompt + t / 10 and -7 for the empty prompt."""
    session = make_session(cache, make_plan(guidance_scale=3.0))
    x, t = torch.full((2, 2), 4.0), torch.tensor([10, 20])
    found = predict(session, session.network, x, t, {"prompt": torch.tensor([[1.0], [2.0]])})
    wanted = torch.tensor([2 - 7 + 1 + 3 * 8.0, 2 - 7 + 2 + 3 * 9.0])[:, None].expand(2, 2)
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad
