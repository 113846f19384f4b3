"""Forty pairs of three shapes: trained and evaluated at their own, the same after a kill."""

import io
import json
from collections import Counter
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from inversion_dpo.cli.main import main
from inversion_dpo.data.buckets import named, read_size
from inversion_dpo.data.images import stack_pixels
from inversion_dpo.data.source import open_pairs
from inversion_dpo.data.transforms import GREY, fit
from inversion_dpo.evaluation.evaluate import evaluate
from inversion_dpo.evaluation.samples import pictures
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.training import recipe
from inversion_dpo.training.recipe import train
from inversion_dpo.training.session import batch_of_step
from inversion_dpo.training.step import losses
from tests.pair_files import write_shapes
from tests.slow import slow_but

SIZES = {(80, 48): 14, (48, 80): 13, (64, 64): 13}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """Call with a family: its configuration, the folder of its run, and the training's session."""
    runs, root = {}, tmp_path_factory.mktemp("shapes")
    pairs = write_shapes(root / "pairs.parquet", 40)

    def make(family):
        if family not in runs:
            given = [
                f"model.path={tiny(family)}",
                f"data.pairs={pairs}",
                "policy.target_modules=[to_v,to_out.0]",
                "data.holdout=0.2",
                "inversion.steps=3",
                "inversion.batch_size=12",
                "policy.rank=2",
                "training.steps=6",
                "training.batch_size=4",
                "training.checkpoint_every=3",
                "training.learning_rate=1e-2",
                "evaluation.scorer=null",
                "evaluation.prompts=heldout",
                "evaluation.limit=6",
                "evaluation.sample_steps=2",
                "evaluation.guidance_scale=1",
            ]
            config = load_config(None, given)
            runs[family] = config, root / family, train(config, root / family)
        return runs[family]

    return make


each_family = pytest.mark.parametrize("family", slow_but(["sdxl"], ["sdxl", "flux"]))


@each_family
def test_no_latent_has_a_grey_bar(family, made):
    """Each is that of the whole picture, resized; flow models invert on their size's own grid."""
    config, _, session = made(family)
    cache, model = session.cache, session.model
    assert Counter(map(cache.size, range(40))) == SIZES and not cache.left_out
    for k, pair in enumerate(open_pairs(config.data)):
        size, seen = cache.size(k), []
        for picture in pair.images:
            pixels = fit(picture, size, "crop").image
            assert pixels == picture.convert("RGB").resize(size[::-1], 1)
            assert not (np.asarray(pixels) == GREY).all((0, 2)).any()
            seen.append(pixels)
        torch.testing.assert_close(cache.of_images("clean", [k]), model.encode(stack_pixels(seen)))
    grids = {size: cache.grid_at(size).timesteps.tolist() for size in SIZES}
    told = [model.schedule_at(size).grid(3, "sampler").timesteps.tolist() for size in SIZES]
    assert list(grids.values()) == told
    assert (grids[64, 64] != grids[80, 48]) == (family == "flux")  # 16 and 15 tokens
    if family == "sdxl":
        ids = {tuple(map(int, cache.condition([k])["time_ids"][0])) for k in range(3)}
        assert ids == {(120, 72, 0, 0, 80, 48), (48, 80, 0, 0, 48, 80), (64, 64, 0, 0, 64, 64)}


@each_family
def test_every_batch_is_of_one_shape(family, made, monkeypatch):
    _, _, session = made(family)
    shapes, size = set(), session.cache.size
    for number in range(60):
        batch = batch_of_step(session.buckets, 4, 0, number)
        assert len({size(pair) for pair, _ in batch}) == 1
        shapes.add(size(batch[0][0]))
    assert shapes == set(SIZES)


@each_family
def test_the_policy_is_evaluated_at_the_shapes_of_the_pictures(family, made):
    config, folder, session = made(family)
    metrics = evaluate(folder, config, (None, str(folder / "adapter")))
    lines = (folder / "heldout-prompts.jsonl").read_text().splitlines()[:6]
    asked = [json.loads(line) for line in lines]
    wanted = [read_size(row.get("size", "64x64")) for row in asked]
    number = {f"number {k}": k for k in range(40)}
    assert wanted == [session.cache.size(number[row["prompt"]]) for row in asked]
    assert len(set(wanted)) == 3 and metrics["n_prompts"] == 6
    assert metrics["sizes"] == Counter(map(named, wanted))
    for file in (folder / "samples").glob("*.parquet"):
        assert [image.size[::-1] for image in pictures(file)] == wanted


@pytest.mark.slow
@each_family
def test_a_killed_training_goes_on_to_the_bit(family, made, tmp_path, monkeypatch):
    config, folder, session = made(family)

    def killed(session, number, rate):
        if number == 4:
            raise KeyboardInterrupt
        return step(session, number, rate)

    step = recipe.step
    monkeypatch.setattr(recipe, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, folder / "cache")
    monkeypatch.setattr(recipe, "step", step)
    train(config, tmp_path, folder / "cache")
    name = "adapter/pytorch_lora_weights.safetensors"
    one, two = load_file(folder / name), load_file(tmp_path / name)
    assert all(torch.equal(one[key], two[key]) for key in one) and one.keys() == two.keys()
    rows = [[json.loads(r) for r in (f / "metrics.jsonl").open()] for f in (folder, tmp_path)]
    assert [r.get("loss") for r in rows[0]] == [r.get("loss") for r in rows[1]]


def test_pairs_that_differ_in_shape_are_left_out_and_counted(tiny_config, tmp_path, caplog):
    """A pair's two images in two shapes; and a run's other pairs keep their numbers."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(write_shapes(tmp_path / "p.parquet", 12)).to_pylist()
    for k in (1, 5):
        buffer = io.BytesIO()
        turned = Image.open(io.BytesIO(rows[k]["jpg_0"])).transpose(Image.Transpose.ROTATE_90)
        turned.resize((100, 300) if k == 1 else (64, 200)).save(buffer, "PNG")
        rows[k]["jpg_0"] = buffer.getvalue()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    config = tiny_config(f"data.pairs={tmp_path / 'p.parquet'}", "data.allow_giveaways=true")
    with caplog.at_level("INFO"):
        prepared = recipe.prepare(config, tmp_path / "cache")
    assert prepared.cache.left_out == [1, 5] and prepared.cache.pairs == 10
    assert "2 of 12 pairs are left out" in caplog.text and "set data.fit=crop or pad" in caplog.text
    assert "pairs by size: 48x80 (4)" in caplog.text
    session = recipe.set_up(config, prepared)
    batch = [(pair, 0) for pair in session.buckets[0]]
    output, _, _ = losses(session, batch, [torch.Generator() for _ in batch], compare=True)
    assert output.loss.isfinite().all()


@pytest.mark.parametrize(
    "words",
    [
        "sample star -o out",
        "pairs sample --prompts p.txt -o out.parquet",
        "pairs build --prompts p.txt --samples 2 evaluation.scorer=mine:taste -o out",
    ],
)
def test_one_size_counts_wherever_pictures_are_made(words, tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("star")
    code = "def taste(images, prompts):\n    return [float(i.mean()) for i in images]\n"
    (tmp_path / "mine.py").write_text(code)
    config = tiny_config("model.resolution=96x64", "evaluation.sample_steps=1")
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    with suppress(SystemExit):
        main([*words.split(), "-c", "tiny.yaml"])
    rows = [row for file in tmp_path.rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    found = [row.get("jpg_0") or row["jpg"] for row in rows]  # of the pairs, or of candidates
    found += [file.read_bytes() for file in (tmp_path / "out").glob("*.png")]
    assert {Image.open(io.BytesIO(image)).size for image in found} == {(96, 64)}
