"""``inversion.trajectories``: several of one image, from other noise, taken in turn by epochs."""

import pytest
import torch

from inversion_dpo.compare.runs import inversion_evaluations
from inversion_dpo.config import ConfigError
from inversion_dpo.draws import generator_for
from inversion_dpo.points import trajectory_points
from inversion_dpo.session import set_up
from inversion_dpo.training import train

SEVERAL = ("inversion.t_start=0.2", "inversion.trajectories=3", "training.steps=8")


@pytest.fixture
def session(tiny_config, tmp_path):
    return set_up(tiny_config(*SEVERAL), tmp_path)


def test_they_share_the_image_and_differ_in_noise(session, tiny_config, tmp_path):
    first, second, third = session.caches
    assert session.cache is first
    pairs = [0, 3]
    for other in (second, third):
        assert torch.equal(first.gather("clean", pairs), other.gather("clean", pairs))
        assert first.digests == other.digests
        for k in range(5):  # the noisiest too: inversion keeps what was added apart
            one, two = (c.gather("states", pairs, [k, k]) for c in (first, other))
            assert (one - two).flatten(1).norm(dim=1).min() > 0.1
    alone = set_up(tiny_config(*SEVERAL, "inversion.trajectories=1"), tmp_path)
    assert [c.folder for c in alone.caches] == [first.folder]  # made once, whatever comes after


def test_winner_and_loser_share_their_noise(session):
    """At the end of the added noise x_t - alpha x_0 is sigma eps, the same for both images."""
    for cache in session.caches:
        x_t, x_0 = cache.gather("states", [1], [0]), cache.gather("clean", [1])
        winner, loser = x_t - cache.grid.levels.alpha[1].float() * x_0
        assert torch.allclose(winner, loser, atol=1e-5)


def test_epochs_take_them_in_turn_and_the_batch_keeps_its_order(session):
    generators = [generator_for(0, 1, 2, k) for k in range(3)]
    for batch in ([(4, 0), (1, 1), (2, 5)], [(4, 3), (1, 4), (2, 2)]):
        found = trajectory_points(session, batch, {}, generators)
        for k, (pair, epoch) in enumerate(batch):
            generators = [generator_for(0, 1, 2, k) for k in range(3)]  # as they were
            expected = trajectory_points(session, [(pair, epoch)], {}, generators[k : k + 1])
            wanted = session.caches[epoch % 3].gather("states", [pair], [int(expected.i[0]) - 1])
            for name in ("i", "x_t", "timesteps", "scale", "target", "reference"):
                ours, theirs = getattr(found, name), getattr(expected, name)
                assert torch.equal(ours[[k, k + 3]], theirs), name
            assert torch.equal(found.x_t[[k, k + 3]], wanted)
        generators = [generator_for(0, 1, 2, k) for k in range(3)]


def test_no_more_are_made_than_epochs_come_to_see(tiny_config, tmp_path):
    """Eight steps of four pairs: as many epochs of the pairs trained on as are begun."""
    session = set_up(tiny_config(*SEVERAL, "inversion.trajectories=99"), tmp_path)
    epochs = -(-8 * 4 // len(session.train_pairs))
    assert len(session.caches) == epochs > 1
    fresh = tiny_config("objective.name=diffusion_dpo", *SEVERAL)
    assert len(set_up(fresh, tmp_path).caches) == 1


def test_evaluations_count_what_epochs_visit(session, tiny_config):
    """All pairs of full epochs, and of the last one what is left: as many as pairs are drawn."""
    config = tiny_config(*SEVERAL)
    one = inversion_evaluations(
        tiny_config(*SEVERAL, "inversion.trajectories=1"), session.caches[:1]
    )
    trained = len(session.train_pairs)
    visited = min(3 * trained, 8 * 4)
    assert inversion_evaluations(config, session.caches) == pytest.approx(one * visited / trained)


def test_label_noise_swaps_the_same_pairs_in_all(tiny_config, tmp_path):
    plain = set_up(tiny_config(*SEVERAL), tmp_path)
    noisy = set_up(tiny_config(*SEVERAL, "data.label_noise=1"), tmp_path)
    pair = plain.train_pairs[0]
    for before, after in zip(plain.caches, noisy.caches, strict=True):
        winner, loser = before.gather("states", [pair], [2])
        assert torch.equal(after.gather("states", [pair], [2]), torch.stack([loser, winner]))


def test_kept_states_are_other_ones(tiny_config, tmp_path):
    caches = set_up(tiny_config(*SEVERAL, "inversion.keep=1"), tmp_path).caches
    pairs = list(range(caches[0].pairs))
    steps = [c.steps_of(pairs, [0] * len(pairs)).tolist() for c in caches]
    assert steps[0] != steps[1]


def test_a_resumed_run_takes_the_same_ones(tiny_config, tmp_path, monkeypatch):
    from inversion_dpo import training

    class Killed(Exception):
        pass

    whole = train(tiny_config(*SEVERAL), tmp_path / "whole").policy.trainable()
    update = training.update

    def dies(session, step, *rest):
        if step == 5:
            raise Killed
        return update(session, step, *rest)

    monkeypatch.setattr(training, "update", dies)
    with pytest.raises(Killed):
        train(tiny_config(*SEVERAL), tmp_path / "cut")
    monkeypatch.setattr(training, "update", update)
    again = train(tiny_config(*SEVERAL), tmp_path / "cut").policy.trainable()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_without_noise_at_the_start_there_is_only_one(tiny_config):
    with pytest.raises(ConfigError, match=r"trajectories=2 .* all the same .* inversion.t_start"):
        tiny_config("inversion.trajectories=2")
    with pytest.raises(ConfigError, match="inversion.trajectories must be positive"):
        tiny_config("inversion.trajectories=0")
