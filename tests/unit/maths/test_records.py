"""The records that pass between the rooms."""

import torch

from inversion_dpo.maths.records import Extent, Grid, Levels, LossSettings, NoisyStates

LEVELS = Levels(torch.tensor([1.0, 0.8, 0.6]), torch.tensor([0.0, 0.6, 0.8]))


def test_levels_are_picked_by_index_slice_and_tensor():
    assert (LEVELS[1].alpha.item(), LEVELS[2].sigma.item()) == (LEVELS.alpha[1], LEVELS.sigma[2])
    assert torch.equal(LEVELS[1:].sigma, torch.tensor([0.6, 0.8]))
    assert torch.equal(LEVELS[torch.tensor([2, 0])].alpha, torch.tensor([0.6, 1.0]))


def test_a_grid_of_three_levels_has_two_steps():
    assert Grid(torch.tensor([0, 5, 9]), LEVELS).steps == 2


def test_a_record_moves_with_all_its_tensors():
    levels = LEVELS.to("meta")
    assert levels.alpha.is_meta and levels.sigma.is_meta
    one = torch.ones(2)
    states = NoisyStates(one, one, one, one, one, one, evaluations=3).to(torch.device("meta"))
    assert all(v.is_meta for v in vars(states).values() if isinstance(v, torch.Tensor))
    assert states.evaluations == 3


def test_nothing_is_assumed_of_a_loss_or_a_state():
    assert (LossSettings(1.0).link, LossSettings(1.0).label_smoothing) == ("sigmoid", 0)
    one = torch.ones(2)
    assert NoisyStates(one, one, one, one, one, one).evaluations == 0


def test_the_states_of_the_first_images_cost_what_each_of_all_did():
    rows = torch.arange(8.0).reshape(4, 2)
    one = torch.arange(4)
    few = NoisyStates(one, rows, one + 10, one + 20, rows + 1, rows + 2, evaluations=3).first(2)
    assert (few.level.tolist(), few.timesteps.tolist(), few.scale.tolist()) == (
        [0, 1],
        [10, 11],
        [20, 21],
    )
    assert torch.equal(few.x_t, rows[:2]) and torch.equal(few.target, rows[:2] + 1)
    assert torch.equal(few.reference, rows[:2] + 2) and few.evaluations == 3


def test_all_states_are_inverted_unless_told_otherwise():
    whole = Extent()
    assert (whole.start, whole.first, whole.iterations) == (0, 1, 0) and whole.last > 10**9
