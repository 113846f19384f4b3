"""Noise that is drawn again from the seeds of samples, and the check that it is theirs."""

from dataclasses import replace

import pytest
import torch

from inversion_dpo.data.buckets import Place
from inversion_dpo.data.images import DataError
from inversion_dpo.maths.records import Levels
from inversion_dpo.maths.schedule import Schedule, prediction_of
from inversion_dpo.trajectories.jobs import Inverter, Job
from inversion_dpo.trajectories.key import NOWHERE
from inversion_dpo.trajectories.known import known_noise
from tests.by_hand import GRID
from tests.unit.trajectories.test_fill import CPU, KEY, KIND, SIDE, Pipeline, pair, picture

PLACE = Place((SIDE, SIDE), "pad")
SEEDS = (7, 8), (9, 2**40)


def seeded(number, seeds, size=SIDE):
    """A pair whose images were sampled from seeds."""
    images = (picture(9, 9, size),) * 2
    return Job(number, replace(pair(number), seeds=seeds, decoded=images), PLACE)


def drawn(*seeds, dtype=torch.float32):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(1, SIDE, SIDE, generator=g, dtype=dtype) for g in generators])


def found(noise, seeds=SEEDS, *, known=None, single=False, dtype=torch.float32):
    """Ask for the noise of pairs, with a model that knows what it is.

    known: of how many images; of the others the model takes it for the negative.
    """
    model = Pipeline()
    model.pipeline.dtype = dtype
    key = replace(KEY, endpoint="known", extent=NOWHERE, single=single)
    x_0 = torch.linspace(-1, 1, noise.numel()).reshape(noise.shape)
    signs = torch.where(torch.arange(len(noise)) < (len(noise) if known is None else known), 1, -1)
    asked = []

    def predict(network, x_t, t, condition):
        asked.append((x_t, t, condition, torch.is_grad_enabled()))
        return prediction_of(x_0, signs[:, None, None, None] * noise, GRID.levels[2], KIND)

    model.predict = predict
    jobs = [seeded(k, of) for k, of in enumerate(seeds)]
    how = Inverter(model, key, GRID, CPU)
    return known_noise(how, x_0, {"prompt": "as it is"}, jobs)["endpoint"], x_0, asked


def test_known_noise_is_drawn_again_from_the_seeds():
    noise = drawn(7, 8, 9, 2**40)
    assert torch.equal(found(noise)[0], noise)


def test_a_pair_alone_is_enough():
    noise = drawn(7, 8)
    assert torch.equal(found(noise, SEEDS[:1])[0], noise)


def test_it_is_drawn_in_the_pipelines_type_and_stored_in_float32():
    noise = drawn(7, 8, 9, 2**40, dtype=torch.bfloat16).float()
    again, _, _ = found(noise, dtype=torch.bfloat16)
    assert again.dtype == torch.float32 and torch.equal(again, noise)
    assert not torch.equal(again, drawn(7, 8, 9, 2**40))


def test_a_single_image_has_the_seed_of_the_first():
    noise = drawn(7, 9)
    assert torch.equal(found(noise, single=True)[0], noise)
    assert torch.equal(found(noise, ((7,), (9,)), single=True)[0], noise)


def test_the_check_is_at_four_fifths_of_the_way_with_the_noise_and_its_negative():
    """Of the levels 0 to 3 that is level 2, where alpha is 0.8 and sigma 0.6."""
    noise = drawn(7, 8, 9, 2**40)
    _, x_0, asked = found(noise)
    for (x_t, t, condition, grad), sign in zip(asked, (1, -1), strict=True):
        torch.testing.assert_close(x_t, 0.8 * x_0 + sign * 0.6 * noise)
        assert t.tolist() == [20] * 4 and condition == {"prompt": "as it is"} and not grad


def test_four_fifths_of_ten_steps_are_eight():
    alpha = 1 - torch.arange(11, dtype=torch.float64) / 12
    model = Pipeline()
    model.pipeline.dtype, asked = torch.float32, []
    levels = Levels(alpha, (1 - alpha**2).sqrt())
    model.schedule = Schedule(KIND, 10 * torch.arange(11), levels, lambda _: None)
    model.predict = lambda network, x_t, t, condition: asked.extend(t.tolist()) or 0 * x_t
    how = Inverter(model, replace(KEY, endpoint="known", extent=NOWHERE), GRID, CPU)
    with pytest.raises(DataError, match="only 0 of 2"):  # a network that sees no noise fits none
        known_noise(how, torch.zeros(2, 1, SIDE, SIDE), {}, [seeded(0, (7, 8))])
    assert asked == [80] * 4


@pytest.mark.parametrize("known", [3, 4])
def test_three_of_four_images_that_fit_are_enough(known):
    assert len(found(drawn(7, 8, 9, 2**40), known=known)[0]) == 4


@pytest.mark.parametrize("known", [0, 2])
def test_noise_that_is_not_the_images_own_is_refused(known):
    what = f"here and the next: only {known} of 4 images fit the noise of their seeds"
    with pytest.raises(DataError, match=what + r".*set objective\.path=line"):
        found(drawn(7, 8, 9, 2**40), known=known)


@pytest.mark.parametrize("seeds", [(), (1,)])
def test_a_pair_without_two_seeds_is_refused(seeds):
    what = r"needs the columns seed_0 and seed_1.*set objective\.path=line"
    with pytest.raises(DataError, match=what):
        found(drawn(7, 8, 9, 2**40), (SEEDS[0], seeds))


@pytest.mark.parametrize("job", [0, 1])
def test_an_image_of_another_size_is_refused(job):
    jobs = [seeded(k, (1, 2), 2 * SIDE if k == job else SIDE) for k in range(2)]
    how = Inverter(Pipeline(), replace(KEY, endpoint="known", extent=NOWHERE), GRID, CPU)
    with pytest.raises(DataError, match="needs images at the size of training: set model.resol"):
        known_noise(how, torch.zeros(4, 1, SIDE, SIDE), {}, jobs)
