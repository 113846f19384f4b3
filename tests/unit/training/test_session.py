"""The order in which a training visits the pairs."""

import dataclasses
import itertools
from collections import Counter

import torch

from inversion_dpo.training.session import (
    Session,
    batch_of_step,
    epoch_batches,
    epoch_of_step,
    epoch_order,
    pairs_of_step,
    split_by,
)


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


def test_one_bucket_is_the_order_of_its_pairs():
    pairs = [10, 20, 30, 40, 50]
    for batch in (2, 4, 12):
        for number in range(20):
            found = batch_of_step([pairs], batch, 7, number)
            assert found == pairs_of_step(pairs, batch, 7, number)


def test_each_batch_is_of_one_bucket_and_every_pair_is_seen_equally_often():
    """13, 7 and 2 pairs in batches of 4: floor(13 e / 4) + floor(7 e / 4) + floor(2 e / 4)."""
    buckets = [list(range(13)), list(range(13, 20)), [20, 21]]
    of = {pair: k for k, bucket in enumerate(buckets) for pair in bucket}
    assert [epoch_of_step([13, 7, 2], 4, number) for number in (0, 3, 4, 9, 10)] == [1, 1, 2, 2, 3]
    seen = Counter()
    for number in range(22):  # 4 epochs: 13 + 7 + 2 batches
        batch = batch_of_step(buckets, 4, 7, number)
        assert len({of[pair] for pair, _ in batch}) == 1
        seen.update(pair for pair, _ in batch)
    assert set(seen.values()) == {4} and len(seen) == 22
    names = [of[batch_of_step(buckets, 4, 7, number)[0][0]] for number in range(22)]
    assert names != sorted(names) and Counter(names) == {0: 13, 1: 7, 2: 2}
    other = [of[batch_of_step(buckets, 4, 8, number)[0][0]] for number in range(22)]
    assert names != other


def test_items_are_split_by_size_and_keep_their_order():
    sizes = {"a": (8, 16), "b": (8, 8), "c": (8, 16), "d": (8, 8)}
    assert split_by("cadb", sizes.get) == [["d", "b"], ["c", "a"]]
    assert split_by([], sizes.get) == []


def test_the_batches_of_an_epoch_are_shuffled_by_seed_and_epoch():
    """Recorded runs must come back: 2 and 1 batches, in an order drawn for minus the epoch."""
    generator = torch.Generator().manual_seed(7 * 1_000_003 - 2)
    order = torch.randperm(3, generator=generator).tolist()
    names, following = [0, 0, 1], [itertools.count(2), itertools.count(1)]
    wanted = [(names[i], next(following[names[i]])) for i in order]
    assert epoch_batches((8, 4), 4, 7, 2) == wanted
    buckets = [list(range(8)), list(range(8, 12))]
    for k, (bucket, place) in enumerate(wanted):
        assert batch_of_step(buckets, 4, 7, 3 + k) == pairs_of_step(buckets[bucket], 4, 7, place)


def test_a_session_has_left_out_and_taken_nothing_at_first():
    fields = {f.name: f.default for f in dataclasses.fields(Session)}
    assert fields["skipped"] == fields["updates"] == 0
