"""Single images in training: what pairs teach image by image, unpaired images teach, too."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from inversion_dpo.data.images import DataError
from inversion_dpo.maths.losses import as_pair_errors
from inversion_dpo.maths.records import LossSettings
from inversion_dpo.run.config import ConfigError
from inversion_dpo.training.notices import counts_text
from inversion_dpo.training.session import batch_of_step
from inversion_dpo.training.step import heldout, losses, step
from tests.pair_files import read_pairs
from tests.sessions import loss_of, set_up
from tests.slow import slow_but

P = 3


@pytest.mark.parametrize("name", ["kto", "nft", "denoising"])
def test_single_images_have_the_loss_of_their_pairs(name):
    generator = torch.Generator().manual_seed(0)
    policy, reference, moved = torch.rand(3, 2 * P, generator=generator, dtype=torch.float64)
    weight, p = torch.rand(2, P, generator=generator, dtype=torch.float64)
    baseline = torch.full((P,), 0.1, dtype=torch.float64)
    more = {"weight": weight, "preference": 0.5 + p / 2, "baseline": baseline}
    pairs = as_pair_errors(policy, reference, moved=moved, **more)
    liked = torch.arange(2 * P) < P
    twice = {k: v.repeat(2) for k, v in more.items()}
    single = as_pair_errors(policy, reference, moved=moved, liked=liked, **twice)
    settings = LossSettings(beta=2.0)
    together, apart = (loss_of(name)(e, settings) for e in (pairs, single))
    torch.testing.assert_close(together.loss, (apart.loss[:P] + apart.loss[P:]) / 2)
    torch.testing.assert_close(together.margin, apart.margin[:P] + apart.margin[P:])


@pytest.fixture(scope="module")
def few(write_pairs, tmp_path_factory):
    """Eight pairs."""
    return write_pairs(tmp_path_factory.mktemp("few") / "pairs.parquet", 8)


def thumbs_of(pair_file, path, downs=None):
    """The images of the pairs, each with its thumb; fewer down, if asked."""
    pairs = read_pairs(pair_file).pairs
    rows = [{"image": p.winner, "thumb": "up", "prompt": p.caption} for p in pairs]
    rows += [{"image": p.loser, "thumb": "down", "prompt": p.caption} for p in pairs[:downs]]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return f"data.pairs={path}"


ONE_LEVEL = ("objective.path=trajectory", "objective.t_min=0.7", "objective.t_max=0.8")
ONE_LEVEL += ("inversion.steps=3",)


@pytest.mark.parametrize("name", slow_but(["kto"], ["kto", "nft"]))
def test_unpaired_equals_paired_where_the_data_are_the_same(name, few, tmp_path, tiny_config):
    """Loss and gradient of all images at one level, away from the reference."""
    chosen = (f"objective.name={name}", "objective.liked_share=null", *ONE_LEVEL)
    thumbs = thumbs_of(few, tmp_path / "thumbs.parquet")
    found = []
    for folder, given in (("pairs", f"data.pairs={few}"), ("thumbs", thumbs)):
        session = set_up(tiny_config(given, *chosen), tmp_path / folder)
        generator = torch.Generator().manual_seed(0)
        parameters = list(session.policy.trainable().values())
        for parameter in parameters:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        numbers = range(session.cache.pairs)
        draws = [torch.Generator().manual_seed(k) for k in numbers]
        output, errors, _ = losses(session, [(k, 0) for k in numbers], draws)
        output.loss.mean().backward()
        found.append((session, output.loss.mean().item(), [p.grad for p in parameters], errors))
    (paired, loss, gradient, _), (single, other, gradients, errors) = found
    assert single.cache.single and single.cache.pairs == 2 * paired.cache.pairs == len(
        errors.winner
    )
    assert loss == pytest.approx(other, rel=1e-5) and abs(loss - 0.5) > 1e-4
    for a, b in zip(gradient, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_unequal_numbers_train_and_sft_takes_those_that_are_liked(pair_file, tmp_path, tiny_config):
    thumbs = thumbs_of(pair_file, tmp_path / "thumbs.parquet", downs=5)
    session = set_up(tiny_config(thumbs, "objective.name=kto"), tmp_path / "cache")
    assert (session.cache.pairs, session.cache.counts["disliked"]) == (21, 5)
    assert counts_text(session.cache) == "21 images of 21 rows (16 liked, 5 not)"
    plan, cache, weights = session.plan, session.cache, session.plan.settings
    liked = int(cache.liked(session.train_pairs).sum())  # both kinds weigh half of all
    half = pytest.approx(len(session.train_pairs) / 2)
    assert weights.liked * liked == half
    assert weights.disliked * (len(session.train_pairs) - liked) == half
    batch = batch_of_step(session.buckets, plan.batch_size, plan.seed, 0)
    kinds = cache.liked([pair for pair, _ in batch])
    row = step(session, 0, 1e-3)
    mean = torch.where(kinds, weights.liked, weights.disliked).mean().item()
    assert row["loss"] == pytest.approx(mean / 2) and weights.liked < 1 < weights.disliked
    assert row["evaluations"] == 4 * plan.batch_size
    found, held = heldout(session), cache.liked(session.heldout_pairs)
    assert (found["heldout_pairs"], found["heldout_liked"]) == (len(held), int(held.sum()))
    session = set_up(tiny_config(thumbs, "objective.name=sft"), tmp_path / "cache")
    assert len(session.train_pairs) + len(session.heldout_pairs) == 16
    assert bool(session.cache.liked(session.train_pairs).all())


@pytest.mark.parametrize(
    ("downs", "settings", "error", "expected"),
    [
        (0, ["objective.name=kto"], DataError, "no image is disliked.*objective.name=denoising"),
        (5, ["objective.name=kto", "objective.safeguard=true"], ConfigError, "needs pairs"),
        (0, [], DataError, "no prompt has both a thumb up and a thumb down.*objective.name=kto"),
    ],
)
def test_what_thumbs_cannot_teach_is_refused(
    pair_file, tmp_path, tiny_config, downs, settings, error, expected
):
    thumbs = thumbs_of(pair_file, tmp_path / "thumbs.parquet", downs)
    with pytest.raises(error, match=expected):
        set_up(tiny_config(thumbs, *settings), tmp_path / "cache")
