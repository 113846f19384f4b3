"""The order in which a training visits the pairs."""

import torch

from inversion_dpo.training.session import epoch_order, pairs_of_step


def test_epochs_are_permutations_laid_end_to_end():
    pairs = [10, 20, 30, 40, 50]
    seen = [entry for number in range(10) for entry in pairs_of_step(pairs, 4, 7, number)]
    for epoch in range(8):
        mine = seen[5 * epoch : 5 * epoch + 5]
        assert sorted(pair for pair, _ in mine) == pairs
        assert {e for _, e in mine} == {epoch}
    assert pairs_of_step(pairs, 12, 7, 0) == seen[:12]  # more than an epoch in one step


def test_an_epochs_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert epoch_order(50, 3, 4) is epoch_order(50, 3, 4)
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 4)  # recorded runs must come back
    assert torch.equal(epoch_order(50, 3, 4), torch.randperm(50, generator=generator))
