"""What ships with the package is what its documentation says."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.making_pairs.build import LABELLINGS
from inversion_dpo.run.config import load_config, resolve
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.scene_prompts import split_of
from tests.pair_files import check_pairs
from tests.scenes import score_image
from tests.slow import slow_but

PIPELINE = resolve("asset:pipeline")

PLAIN = """
import sys, torch
torch.set_num_threads(2)
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a large red star", num_inference_steps=4, guidance_scale=1.0).images[0]
assert image.size == (64, 64)
assert not any(m.startswith("inversion_dpo") for m in sys.modules)
"""


@pytest.mark.slow
def test_pipeline_loads_with_plain_diffusers():
    subprocess.run([sys.executable, "-I", "-c", PLAIN, PIPELINE], check=True)


def test_pipeline_is_small_and_holds_no_pickle():
    from pathlib import Path

    files = [f for f in Path(PIPELINE).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 30e6
    assert {f.suffix for f in files} <= {".json", ".txt", ".safetensors", ".md"}


@pytest.mark.parametrize("name", sorted(LABELLINGS))
@pytest.mark.slow
def test_pairs_are_labelled_by_their_own_scores(name):
    path = resolve(f"asset:{name}.parquet")
    assert check_pairs(path).ok
    for row in pq.read_table(path).slice(0, 60).to_pylist():
        (score,) = LABELLINGS[name].by
        value = [json.loads(row[f"scores_{k}"])[score] for k in (0, 1)]
        assert row["label_0"] == float(value[0] > value[1]) and value[0] != value[1]
        graph = SceneGraph.from_json(row["scene_graph"])
        assert graph == parse_caption(row["caption"]) and split_of(row["caption"]) == "train"


@pytest.mark.parametrize("name", slow_but(["composition"], sorted(LABELLINGS)))
def test_stored_images_have_the_scores_that_they_were_labelled_by(name):
    key = "warmth" if name == "taste" else "composition"
    for row in pq.read_table(resolve(f"asset:{name}.parquet")).slice(0, 60).to_pylist():
        graph = parse_caption(row["caption"])
        for k in (0, 1):
            found = score_image(graph, np.array(decode_image(row[f"jpg_{k}"], "")))
            assert found[key] == pytest.approx(json.loads(row[f"scores_{k}"])[key], abs=1e-6)


def test_prompt_files_are_held_out():
    for split in ("validation", "test"):
        prompts = read_prompts(f"asset:prompts-{split}.txt", None)
        assert len(set(prompts)) == len(prompts) >= 500
        assert {split_of(p) for p in prompts} == {split}


@pytest.mark.parametrize("preset", ["taste", "composition", "sd15"])
def test_presets_load(preset):
    load_config(preset, [])
