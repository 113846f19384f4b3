"""Training an encoder of scene graphs, and preference training under its condition."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from inversion_dpo.cli.main import main
from inversion_dpo.data.images import DataError
from inversion_dpo.evaluation.evaluate import evaluate
from inversion_dpo.evaluation.publish import export
from inversion_dpo.evaluation.sides import load_policy_pipeline
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.maths.records import LossSettings, PairErrors
from inversion_dpo.models.graph_model import load_encoder
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.folder import claim
from inversion_dpo.training import step as training
from inversion_dpo.training.recipe import train
from inversion_dpo.training.run_files import read_rows
from inversion_dpo.world.checker import detect, score
from tests.pair_files import read_pairs, write_annotations
from tests.sessions import sampled, set_up
from tests.slow import slow_but
from tools.embedded.renders import rows

ENCODER = (
    "policy.kind=scene_graph",
    "objective.name=denoising",
    "policy.graph_tokens=8",
    "policy.graph_width=16",
    "policy.graph_layers=2",
    "inversion.steps=1",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, request):
    """A run that trained an encoder for a few steps: its folder and what was alive."""
    make = request.getfixturevalue("tiny_config_of_module")
    folder = tmp_path_factory.mktemp("encoder")
    claim(folder, make(*ENCODER))
    return folder, train(make(*ENCODER), folder)


@pytest.fixture(scope="module")
def tiny_config_of_module(tiny_pipeline, pair_file, tmp_path_factory):
    """As ``tiny_config``, for a whole module."""
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text("\n".join(p.caption for p in read_pairs(pair_file, 3).pairs))

    def make(*overrides):
        return load_config(
            None,
            [
                f"model.path={tiny_pipeline}",
                f"data.pairs={pair_file}",
                "data.holdout=0.25",
                "data.limit=8",
                "inversion.steps=3",
                "inversion.batch_size=8",
                "policy.rank=2",
                "policy.alpha=2",
                "training.steps=8",
                "training.batch_size=4",
                "training.checkpoint_every=3",
                "training.eval_every=4",
                "training.learning_rate=1e-3",
                "evaluation.sample_steps=2",
                "evaluation.guidance_scale=1",
                f"evaluation.prompts={prompts}",
                "evaluation.preference=composition",
                *overrides,
            ],
        )

    return make


def test_every_tensor_of_the_encoder_moves_and_nothing_else(
    encoder, tiny_config_of_module, tiny_pipeline
):
    folder, session = encoder
    fresh = set_up(tiny_config_of_module(*ENCODER), folder / "cache")
    before = fresh.policy.trainable()
    after = load_file(folder / "adapter" / "model.safetensors")
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())
    unet = DiffusionPipeline.from_pretrained(tiny_pipeline).unet
    trained = session.model.pipeline.unet.state_dict()
    assert all(torch.equal(trained[k], v) for k, v in unet.state_dict().items())


@pytest.mark.slow  # as test_training.py does it without graphs
def test_an_interrupted_training_ends_in_the_same_bits(encoder, tiny_config_of_module, tmp_path):
    whole, _ = encoder
    config = tiny_config_of_module(*ENCODER)
    train(replace(config, training=replace(config.training, steps=3)), tmp_path)
    train(config, tmp_path)
    one, two = (load_file(f / "adapter" / "model.safetensors") for f in (whole, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "objective", slow_but(["inversion_dpo"], ["inversion_dpo", "diffusion_dpo"])
)
def test_preferences_are_trained_under_the_graph(
    encoder, tiny_config_of_module, tmp_path, tiny_pipeline, objective
):
    graph = f"model.scene_graph={encoder[0] / 'adapter'}"
    config = tiny_config_of_module(graph, f"objective.name={objective}", "training.steps=3")
    session = train(config, tmp_path)
    assert all(r["loss"] > 0 for r in read_rows(tmp_path / "metrics.jsonl") if "loss" in r)
    condition = session.cache.condition([0])
    assert condition["graph_links"].shape == (2, 8, 2) and (condition["graph_links"] >= 0).any()
    kept = load_encoder(str(encoder[0] / "adapter")).state_dict()
    now = session.model.pipeline.scene_graph.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())
    DiffusionPipeline.from_pretrained(tiny_pipeline).load_lora_weights(tmp_path / "adapter")


def test_trajectories_depend_on_the_encoder(encoder, tiny_config_of_module):
    from inversion_dpo.data.source import open_pairs
    from inversion_dpo.models.loading import load_model
    from inversion_dpo.trajectories.key import key_of

    names = set()
    for overrides in ((), (f"model.scene_graph={encoder[0] / 'adapter'}",), ENCODER[:1]):
        config = tiny_config_of_module(*overrides)
        model = load_model(config, torch.device("cpu"))
        names.add(key_of(config, open_pairs(config.data), model).name())
    assert len(names) == 3


def test_graph_dropout_leaves_the_prompt(encoder, tiny_config_of_module, tmp_path):
    config = tiny_config_of_module(
        f"model.scene_graph={encoder[0] / 'adapter'}", "data.graph_dropout=1.0", "training.steps=1"
    )
    session = set_up(config, tmp_path)
    condition = session.cache.condition([0, 1])
    text = condition["encoder_hidden_states"].clone()
    training.with_dropout(session, [(0, 0), (1, 0)], condition)
    assert (condition["graph_links"] == -1).all() and not condition["graph_rows"].any()
    assert torch.equal(condition["encoder_hidden_states"], text)


def test_caption_dropout_leaves_the_graph(encoder, tiny_config_of_module, tmp_path):
    config = tiny_config_of_module(*ENCODER, "data.caption_dropout=1.0", "training.steps=1")
    session = set_up(config, tmp_path)
    condition = session.cache.condition([0, 1])
    links = condition["graph_links"].clone()
    training.with_dropout(session, [(0, 0), (1, 0)], condition)
    empty = session.cache.empty["encoder_hidden_states"]
    assert torch.equal(condition["encoder_hidden_states"], empty.expand(4, -1, -1))
    assert torch.equal(condition["graph_links"], links) and (links >= 0).any()


def test_a_run_of_an_encoder_is_evaluated_against_captions_alone(
    encoder, tiny_config_of_module, tmp_path
):
    config = tiny_config_of_module(*ENCODER)
    metrics = evaluate(tmp_path, config, models=(None, str(encoder[0] / "adapter")))
    assert metrics["n_prompts"] == 3
    again = tiny_config_of_module(f"model.scene_graph={encoder[0] / 'adapter'}")
    pipeline = load_policy_pipeline(again, None)
    assert pipeline.scene_graph is not None


def test_prompts_bring_their_own_graphs(encoder, tiny_config_of_module, tmp_path):
    graph = SceneGraph.from_json(next(rows(1, 0))["scene_graph"])
    images = []
    for name, given in (("a", graph.to_dict()), ("b", None), ("c", graph.to_json())):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"prompt": "a photograph", "scene_graph": given}) + "\n")
        config = tiny_config_of_module(
            f"model.scene_graph={encoder[0] / 'adapter'}",
            f"evaluation.prompts={file}",
            "evaluation.scorer=null",
        )
        found, _ = sampled(config, None, tmp_path / "memo", ["a photograph"], "reference")
        images.append(found[0])
    assert (images[0] == images[2]).all()
    assert len(list((tmp_path / "memo").glob("*.parquet"))) == 2


def test_a_broken_graph_is_named_by_its_row(pair_file, tiny_config_of_module, encoder, tmp_path):
    table = pq.read_table(pair_file).to_pylist()
    table[3]["scene_graph"] = '{"items": 3}'
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    config = tiny_config_of_module(
        f"model.scene_graph={encoder[0] / 'adapter'}", f"data.pairs={tmp_path / 'p.parquet'}"
    )
    with pytest.raises(DataError, match=r"row 3: scene_graph"):
        set_up(config, tmp_path)


def test_a_folder_of_annotated_images_trains_an_encoder(tiny_config_of_module, tmp_path, pair_file):
    folder = annotated(tmp_path / "data", pair_file)
    config = tiny_config_of_module(*ENCODER, f"data.pairs={folder}", "training.steps=1")
    assert train(config, tmp_path / "run").cache.pairs == 6
    worse = tiny_config_of_module(f"data.pairs={folder}", "objective.name=diffusion_dpo")
    with pytest.raises(DataError, match="no preference among"):
        train(worse, tmp_path / "other")


def annotated(folder, pair_file):
    """Six winners as LAION-SG has them; returns the folder."""
    folder.mkdir()
    graphs = []
    for k, pair in enumerate(read_pairs(pair_file, 6).pairs):
        (folder / f"{k}.png").write_bytes(pair.winner)
        graphs.append(replace(SceneGraph.from_json(pair.scene_graph), name=f"{k}.png"))
    write_annotations(graphs, folder / "annotations.json")
    return folder


def command(capsys, *words):
    """Exit code and what was printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    return int(stop.value.code or 0), capsys.readouterr()


def test_pictures_of_a_file_of_graphs(encoder, tmp_path, pair_file, capsys):
    file = annotated(tmp_path / "data", pair_file) / "annotations.json"
    out = tmp_path / "png"
    code, printed = command(
        capsys, "sample", "--run", encoder[0], "--scene-graph", file, "--output", out
    )
    assert code == 0 and len(list(out.glob("*.png"))) == 6, printed.err
    code, printed = command(
        capsys, "sample", "a star", "--run", encoder[0], "--scene-graph", file, "--output", out
    )
    assert code == 2 and "1 prompt and 6 scene graphs" in printed.err
    rows_ = json.loads(file.read_text())
    rows_[2]["items"][0].pop("label")
    file.write_text(json.dumps(rows_))
    code, printed = command(
        capsys, "sample", "--run", encoder[0], "--scene-graph", file, "--output", out
    )
    assert code == 2 and "annotations.json, row 2: items[0].label is missing" in printed.err
    assert printed.err.count("\n") == 1


def test_a_graph_needs_a_model_that_takes_it(tmp_path, pair_file, capsys, tiny_config_of_module):
    file = annotated(tmp_path / "data", pair_file) / "annotations.json"
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config_of_module()))
    code, printed = command(
        capsys, "sample", "--config", tmp_path / "c.yaml", "--scene-graph", file, "-o", tmp_path
    )
    assert code == 2 and "model.scene_graph" in printed.err


def test_an_encoder_is_exported_with_its_card(encoder):
    folder = export(encoder[0])
    assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    assert "scene-graph encoder" in (folder / "README.md").read_text()


def test_an_encoder_is_not_merged():
    with pytest.raises(ConfigError, match=r"policy.merge"):
        load_config(None, ["policy.kind=scene_graph", "policy.merge=true"])


def test_renders_are_two_exact_pictures_of_one_graph(tmp_path):
    import pyarrow as pa

    made = list(rows(6, 1))
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "r.parquet")
    assert made == list(rows(6, 1)) and made != list(rows(6, 2))
    for pair in read_pairs(tmp_path / "r.parquet").pairs:
        graph = SceneGraph.from_json(pair.scene_graph)
        assert graph.caption == pair.caption
        for image in (pair.winner, pair.loser):
            assert score(graph, detect(decoded(image))).exact == 1


def decoded(data):
    """Encoded image -> uint8 [64, 64, 3]."""
    import numpy as np

    from inversion_dpo.data.images import decode_image

    return np.asarray(decode_image(data, "render"))


def test_denoising_is_the_mean_error_of_both_images():
    from inversion_dpo.maths.losses import denoising

    w, l, k = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.5])
    zero, one, half = torch.zeros(2), torch.ones(2), torch.full((2,), 0.5)
    errors = PairErrors(w, l, zero, zero, zero, zero, zero, k, one, half, half, zero)
    assert denoising(errors, LossSettings(1.0)).loss.tolist() == [2.0, 1.5]
