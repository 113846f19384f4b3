"""The records that pass between the rooms."""

import torch

from inversion_dpo.maths.records import Grid, Levels, LossSettings, NoisyStates

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
