"""Pairs of edits on tiny pipelines that edit: inverted, trained, saved, drawn, evaluated."""

import io
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from inversion_dpo.data.images import DataError, stack_pixels
from inversion_dpo.data.source import open_pairs
from inversion_dpo.data.transforms import fit
from inversion_dpo.evaluation.evaluate import evaluate
from inversion_dpo.evaluation.prompt_sets import read_prompt_set, sources_to_sample
from inversion_dpo.evaluation.report import report
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import check_model
from inversion_dpo.models.prompts import ImagesAndText
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.folder import claim, read_rows
from inversion_dpo.training.beforehand import check_training
from inversion_dpo.training.recipe import train
from inversion_dpo.training.step import losses
from inversion_dpo.web.studio import How, Studio
from tests.pair_files import open_pairs as pairs_of
from tests.pair_files import write_edits
from tests.sessions import small_sources
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
            "evaluation.guidance_scale=1",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """Call with a family: its configuration, the folder of its run, and the training's session."""
    runs, root, patch = {}, tmp_path_factory.mktemp("edits"), small_sources()
    pairs = write_edits(root / "pairs.parquet", 8)

    def make(family):
        if family not in runs:
            more = ["data.prompt_dropout=0.5"] if family.startswith("qwen") else []
            config = settings(family, tiny, pairs, *more)
            runs[family] = config, root / family, train(config, root / family)
        return runs[family]

    yield make
    patch.undo()


each_family = pytest.mark.parametrize(
    "family",
    slow_but(
        ["flux-kontext"], ["flux-kontext", "flux2-klein", "qwen-image-edit", "qwen-image-edit-plus"]
    ),
)


@each_family
def test_the_cache_holds_a_source_a_pair_beside_shared_prompts(family, made):
    config, _, session = made(family)
    cache, model, pairs = session.cache, session.model, list(open_pairs(config.data))
    condition = cache.condition([5, 0])
    size = model.source_size((64, 64))
    sources = [fit(pairs[k].source_image, size, "pad").image for k in (5, 0)]
    expected = model.encode(stack_pixels(sources))
    if model.edits == "reads":  # the condition is of instruction and source
        text = model.condition(["edit 5", "edit 0"], sources)
        assert all(torch.equal(condition[k][:2], text[k]) for k in text)
    torch.testing.assert_close(condition["source"], expected.repeat(2, 1, 1, 1))
    stored = sum(len(cache.shard(k).get_slice("pair.source")[:]) for k in range(len(cache.sizes)))
    assert stored == cache.pairs == 8


@each_family
def test_the_policy_is_a_lora_that_the_plain_pipeline_edits_with(family, made, tiny):
    config, folder, session = made(family)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and rows[2]["grad_norm"] > 0
    parts = {}
    if family.startswith("qwen"):  # their published processor needs torchvision, for videos
        parts["processor"] = ImagesAndText.from_pretrained(tiny(family) / "processor")
    pipe = DiffusionPipeline.from_pretrained(tiny(family), **parts)
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
    for session.cache.condition in (read, read, other):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        found.append(losses(session, batch, generators, compare=True)[1].winner.detach())
    del session.cache.condition
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])  # tiny weights attend to it a little only


@each_family
def test_evaluation_edits_the_held_out_sources(family, made, tmp_path):
    """At their shape; files beside the prompts, pictures and report show them; the page too."""
    config, folder, _ = made(family)
    shutil.copytree(folder, run := tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    claim(run / "x", config)
    shutil.move(run / "x" / "config.yaml", run)
    metrics = evaluate(run, config)
    rows = [json.loads(line) for line in (run / "heldout-prompts.jsonl").open()]
    assert len(rows) == metrics["n_prompts"] == 2
    pair_of = {p.caption: p for p in open_pairs(config.data)}
    for k, row in enumerate(rows):
        expected = pair_of[row["prompt"]].source_image
        for file in (run / row["source"], run / "images" / f"{k:03d}-source.png"):
            assert Image.open(file).tobytes() == expected.tobytes()
    samples = sorted((run / "samples").glob("*.parquet"))
    page = report(run).read_text()
    assert "From left to right: the source, the reference and the policy" in page
    sections = re.split(r"<h2>", page)
    for title in ("Samples", "Largest changes"):  # nothing scored these, so none is the worst
        here = next(part for part in sections if part.startswith(title))
        assert len(re.findall(r">\s*source\b", here)) == len(rows), title
    assert sorted((run / "samples").glob("*.parquet")) == samples  # drawn once
    studio = Studio(config, run)
    name = studio.source(rows[0]["prompt"])
    assert Image.open(io.BytesIO(studio.pictures.get(name))).size == (64, 64)
    needs = pytest.raises(ModelError, match="edits images: give each prompt its")
    with nullcontext() if family == "flux2-klein" else needs:
        studio.draw(None, ["another"], [1], How(2, 1.0))


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a.png"] * 2, "3 prompts and 2 images to edit: give --source once"),
        (["none.png"], "--source .*none.png cannot be read: No such file"),
    ],
)
def test_sources_of_the_command_that_do_not_fit(sources, expected, tmp_path):
    write_edits(tmp_path / "p.parquet", 1)
    (tmp_path / "a.png").write_bytes(next(iter(pairs_of(tmp_path / "p.parquet"))).source)
    with pytest.raises(ConfigError, match=expected):
        sources_to_sample([tmp_path / name for name in sources], 3)
    assert len(sources_to_sample([tmp_path / "a.png"], 3)) == 3


def test_one_instruction_for_two_sources_is_refused(tmp_path):
    """And a source that is not there names its line."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [json.dumps({"prompt": "x", "source": f"{name}.png"}) for name in "abc"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines[:2]))
    with pytest.raises(ConfigError, match="'x' occurs with two sources; word the two"):
        _ = read_prompt_set(str(file), None).source_of
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"line 3, \"source\": there is no file 'c.png'"):
        read_prompt_set(str(file), None)


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
