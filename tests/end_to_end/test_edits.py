"""Pairs of edits on tiny FLUX.1 Kontext and FLUX.2: inverted, trained, saved, drawn, evaluated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from inversion_dpo.data.images import DataError, stack_pixels
from inversion_dpo.data.source import open_pairs
from inversion_dpo.models.loading import check_model
from inversion_dpo.run.config import load_config
from inversion_dpo.run.folder import read_rows
from inversion_dpo.training.beforehand import check_training
from inversion_dpo.training.recipe import train
from inversion_dpo.training.step import losses
from tests.pair_files import write_edits
from tests.slow import slow_but


def settings(family, tiny, pairs, *more):
    return load_config(
        None,
        [
            f"model.path={tiny(family)}",
            f"data.pairs={pairs}",
            "model.resolution=64",
            "data.allow_giveaways=true",
            "data.holdout=0.25",
            "inversion.steps=3",
            "inversion.batch_size=6",
            "policy.rank=2",
            "training.steps=3",
            "training.batch_size=2",
            "training.learning_rate=1e-2",
            "training.warmup=0",
            "evaluation.scorer=null",
            "evaluation.prompts=heldout",
            "evaluation.sample_steps=2",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """Call with a family: its configuration, the folder of its run, and the training's session."""
    runs, root = {}, tmp_path_factory.mktemp("edits")
    pairs = write_edits(root / "pairs.parquet", 8)

    def make(family):
        if family not in runs:
            config = settings(family, tiny, pairs)
            runs[family] = config, root / family, train(config, root / family)
        return runs[family]

    return make


each_family = pytest.mark.parametrize(
    "family", slow_but(["flux-kontext"], ["flux-kontext", "flux2-klein"])
)


@each_family
def test_the_cache_holds_a_source_a_pair_beside_shared_prompts(family, made):
    config, _, session = made(family)
    cache, model, pairs = session.cache, session.model, list(open_pairs(config.data))
    condition = cache.condition([5, 0])
    expected = model.encode(stack_pixels([pairs[5].source_image, pairs[0].source_image]))
    torch.testing.assert_close(condition["source"], expected.repeat(2, 1, 1, 1))
    stored = sum(len(cache.shard(k).get_slice("pair.source")[:]) for k in range(len(cache.sizes)))
    assert stored == cache.pairs == 8


@each_family
def test_the_policy_is_a_lora_that_the_plain_pipeline_edits_with(family, made, tiny):
    config, folder, session = made(family)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and rows[2]["grad_norm"] > 0
    pipe = DiffusionPipeline.from_pretrained(tiny(family))
    source = next(iter(open_pairs(config.data))).source_image
    more = {"max_area": 64 * 64, "_auto_resize": False} if family == "flux-kontext" else {}

    def edited():
        noise = torch.Generator().manual_seed(0)
        how = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
        return pipe(prompt="edit 0", image=source, generator=noise, **how, **more).images[0]

    before = edited()
    pipe.load_lora_weights(str(folder / "adapter"))
    assert np.abs(edited() - before).max() > 1e-3


@each_family
def test_the_reference_is_the_network_with_the_source(family, made):
    """Stored predictions are those of the source: at another source the errors are others."""
    _, _, session = made(family)
    batch = [(0, 0), (1, 0)]
    read = session.cache.condition

    def other(pairs):
        condition = read(pairs)
        return condition | {"source": condition["source"].flip(0) * 2}

    found = []
    for session.cache.condition in (read, other):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        found.append(losses(session, batch, generators, compare=True)[1].winner.detach())
    del session.cache.condition
    assert (found[0] - found[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("family", "column", "expected"),
    [
        ("sdxl", True, "edit a source image, and StableDiffusionXLPipeline draws from text alone"),
        (
            "flux-kontext",
            False,
            r"FluxKontextPipeline edits a source image, and the pairs have non",
        ),
        ("flux2-klein", False, None),
    ],
)
def test_sources_and_model_must_fit(family, column, expected, tiny, tmp_path, pair_file):
    pairs = write_edits(tmp_path / "pairs.parquet", 4) if column else pair_file
    config = settings(family, tiny, pairs)

    def check():
        check_training(config, check_model(config.model), Path(tmp_path / "run"))

    if expected is None:
        check()
        return
    with pytest.raises(DataError, match=expected):
        check()
