"""Whoever draws a picture reads the whole prompt and the scene graph that came with it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from inversion_dpo import api
from inversion_dpo.cli.main import main
from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation import sides
from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.sides import load_policy_pipeline, sampler_of, side
from inversion_dpo.graphs.graph import Item, SceneGraph
from inversion_dpo.labels.asking import sample_pairs
from inversion_dpo.making_pairs.build import drawing
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.graph_encoder import SceneGraphEncoder, install, shape_for
from inversion_dpo.models.graph_model import save_encoder
from inversion_dpo.models.loading import load_pipeline
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.fields import ConfigError, ModelConfig
from inversion_dpo.web.studio import How, Studio
from tests.slow import slow_but

WORDS = "a large red circle left of a small blue star " * 10
LONG = [WORDS + "above a green square", WORDS + "below a yellow cross"]  # beyond 77 tokens


def same(images, others):
    """Equal but for the last bit of a byte: sums of another batch size round otherwise."""
    return np.abs(np.stack(images).astype(int) - np.stack(others).astype(int)).max() <= 1


@pytest.mark.parametrize("chunks", [1, 4])
def test_prompts_that_lose_their_end_are_counted(tiny, caplog, chunks):
    given = [f"model.path={tiny('sd15')}", f"model.prompt_chunks={chunks}"]
    sampler_of(load_config(None, given), None).warn_of_cut([*LONG, *LONG, "a red star"])
    told = "of 3 prompts the end is cut: 2 by tokenizer (reads 75 tokens); put what matters first"
    assert (told in caplog.text) == (chunks == 1) == bool(caplog.text)


@pytest.fixture
def config(tiny):
    given = ["evaluation.sample_steps=1", "evaluation.guidance_scale=2", "evaluation.batch_size=2"]
    return load_config(None, [f"model.path={tiny('sd15')}", "model.prompt_chunks=4", *given])


def test_a_run_without_a_policy_is_told_so(config, tmp_path, monkeypatch, capsys):
    """Its run/adapter is no OWNER/NAME of the hub."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("inversion_dpo.models.lora.snapshot_download", pytest.fail)
    with pytest.raises(ConfigError, match="^run is a run without a policy: train it first$"):
        api.sample("run", ["a red star"])
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "a red star", "--run", "run", "-o", "png"])
    assert "run is a run without a policy: train it first" in capsys.readouterr().err


def by_api(config, folder, prompts):
    (folder / "config.yaml").write_text(to_yaml(config))
    return [api.sample(folder, [p], seed=5, policy=False)[0] for p in prompts]


def by_pairs_build(config, folder, prompts):
    scale, plain = config.evaluation.guidance_scale, PromptSet([], [], [])
    draw = drawing({"reference": (side(config, None), scale)}, plain)
    graphs = [p if isinstance(p, SceneGraph) else SceneGraph((), (), p) for p in prompts]
    return draw(graphs, [5] * len(prompts), "reference")


def by_pairs_sample(config, folder, prompts):
    images = []
    for k, prompt in enumerate(prompts):
        graph = prompt if isinstance(prompt, SceneGraph) else None
        asked, file = PromptSet([graph.caption if graph else prompt], [""], [graph]), f"{k}.parquet"
        sample_pairs(folder / file, config, asked, 5)
        row = pq.read_table(folder / file).to_pylist()[0]
        images.append(np.asarray(decode_image(row["jpg_0"], "")))
    return images


def test_samples_for_pairs_count_what_is_not_read_too(config, tmp_path, caplog):
    cut = replace(config, model=replace(config.model, prompt_chunks=1))
    sample_pairs(tmp_path / "pairs.parquet", cut, PromptSet(LONG[:1], [""], [None]), 5)
    told = "of 1 prompt the end is cut: 1 by tokenizer (reads 75 tokens)"
    assert caplog.text.count(told) == 1
    caplog.clear()
    draw = drawing({"reference": (side(cut, None), 2.0)}, PromptSet([], [], []), LONG[:1])
    for seed in (5, 6):
        draw([SceneGraph((), (), LONG[0])], [seed], "reference")
    assert caplog.text.count(told) == 1


def by_the_page(config, folder, prompts):
    studio, e = Studio(config, load=sampler_of), config.evaluation
    how = How(e.sample_steps, e.guidance_scale)
    return [np.asarray(decode_image(studio.draw(None, [p], [5], how)[0], "")) for p in prompts]


@pytest.mark.parametrize(
    "way", slow_but([by_api, by_the_page], [by_api, by_pairs_build, by_pairs_sample, by_the_page])
)
def test_the_end_of_a_long_prompt_counts(way, config, tmp_path):
    expected = [sampler_of(config, None).draw([p], [5])[0] for p in LONG]
    assert (expected[0] != expected[1]).any()
    assert same(way(config, tmp_path, LONG), expected)


@pytest.fixture
def with_graphs(tiny, tmp_path):
    """A configuration whose encoder of scene graphs does something."""
    pipeline = load_pipeline(ModelConfig(str(tiny("sd15"))))
    encoder = SceneGraphEncoder(shape_for(pipeline, 8, 16, 1))
    for part in encoder.projections:
        part.to_out.weight.data.normal_()
    install(pipeline, encoder)
    save_encoder(encoder, tmp_path / "encoder")
    given = ["evaluation.sample_steps=1", "evaluation.guidance_scale=1"]
    words = [f"model.path={tiny('sd15')}", f"model.scene_graph={tmp_path / 'encoder'}"]
    return load_config(None, [*words, *given])


@pytest.mark.parametrize("way", slow_but([by_pairs_build], [by_pairs_build, by_pairs_sample]))
def test_a_given_scene_graph_counts(way, with_graphs, tmp_path):
    graphs = [SceneGraph((Item(0, label),), (), "a photograph") for label in ("cat", "red dog")]
    expected = [sampler_of(with_graphs, None).draw([g], [5])[0] for g in graphs]
    assert (expected[0] != expected[1]).any()
    assert same(way(with_graphs, tmp_path, graphs), expected)


def test_a_caption_of_the_world_brings_its_graph(with_graphs):
    sampler = sampler_of(with_graphs, None)
    caption = "a large red circle"
    bare = Sampler(sampler.pipeline, sampler.config).draw([caption], [0])[0]
    assert (sampler.draw([caption], [0])[0] != bare).any()


def test_more_steps_than_the_schedule_has_are_refused_by_name(config):
    sampler = sampler_of(config, None).under(sample_steps=1000)
    with pytest.raises(ConfigError, match="evaluation.sample_steps=1000: .* takes 1 to 999 steps"):
        sampler.draw(["a star"], [1])


@pytest.mark.parametrize("scale", [0, 0.5])
def test_a_guidance_under_which_pipelines_do_not_guide_is_refused(scale, config):
    sampler = sampler_of(config, None).under(guidance_scale=scale)
    message = f"evaluation.guidance_scale={scale} is below 1, and StableDiffusionPipeline"
    with pytest.raises(ModelError, match=message):
        sampler.draw(["a star"], [0])


def test_a_network_may_be_told_any_guidance(tiny):
    given = [f"model.path={tiny('flux')}", "evaluation.sample_steps=1"]
    sampler = sampler_of(load_config(None, given), None)
    few, many = (sampler.under(guidance_scale=s).draw(["a star"], [0])[0] for s in (0, 1))
    assert (few != many).any()


def test_other_settings_leave_the_pipeline(config):
    sampler = sampler_of(config, None)
    other = sampler.under(guidance_scale=1.0)
    assert other.pipeline is sampler.pipeline and other.config.evaluation.guidance_scale == 1
    assert sampler.config.evaluation.guidance_scale == 2
    assert other.config == replace(config, evaluation=other.config.evaluation)


def test_noise_is_the_seeds_and_not_the_batchs(config):
    sampler = sampler_of(config, None)
    three = sampler.draw(["a star"] * 3, [1, 2, 3])
    assert same([three[2]], sampler.draw(["a star"], [3]))


def test_images_of_several_sizes_are_drawn_each_as_if_alone():
    """By the embedded model, which has learned squares of 64 pixels and can draw other shapes."""
    sampler = sampler_of(load_config(None, ["evaluation.sample_steps=2"]), None)
    sizes, prompts = [(48, 80), (64, 64), (48, 80), (80, 48)], ["a large red star"] * 4
    drawn = sampler.draw(prompts, [1, 2, 3, 4], sizes=sizes)
    assert [image.shape[:2] for image in drawn] == sizes
    for k in (2, 3):
        assert same([drawn[k]], sampler.draw(prompts[:1], [k + 1], sizes=sizes[k : k + 1]))
    assert same([drawn[1]], sampler.draw(prompts[:1], [2])) and all(i.std() > 3 for i in drawn)
    with pytest.raises(ModelError, match="images of 80x50: both sides must be multiples of 16"):
        sampler.draw(prompts[:1], [1], sizes=[(50, 80)])


def test_every_prompt_needs_a_seed(config):
    with pytest.raises(ValueError, match="2 prompts need as many seeds, got 1"):
        sampler_of(config, None).draw(["a", "b"], [1])


def test_an_encoder_goes_where_its_pipeline_goes(tiny, tmp_path, monkeypatch):
    pipeline = load_pipeline(ModelConfig(str(tiny("sd15"))))
    save_encoder(SceneGraphEncoder(shape_for(pipeline, 8, 16, 1)), tmp_path / "encoder")
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr(sides, "current_team", lambda: elsewhere)
    config = load_config("taste", [f"model.path={tiny('sd15')}"])
    found = load_policy_pipeline(config, tmp_path / "encoder")
    assert {p.device.type for p in (*found.unet.parameters(), *found.scene_graph.parameters())} == {
        "meta"
    }


def test_an_autoencoder_that_overflows_is_named_with_its_image(tiny):
    """NaN becomes a black picture otherwise, which is scored and paired."""
    config = load_config(None, [f"model.path={tiny('sd15')}", "evaluation.sample_steps=1"])
    pipeline = load_pipeline(config.model)
    real = pipeline.vae.decode

    def decode(z, **how):
        (image,) = real(z, **how)
        image[1, 0, 3, 3] = torch.nan
        return (image,)

    pipeline.vae.decode = decode
    with pytest.raises(ModelError, match="'a moon', seed 7: .*not finite.*model.dtype.*model.vae"):
        Sampler(pipeline, config).draw(["a sun", "a moon"], [3, 7])
