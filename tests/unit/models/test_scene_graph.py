"""Scene graphs as condition: what the encoder computes; without a graph nothing changes."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from inversion_dpo.evaluation.prompt_sets import graph_of_prompt
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.graph_encoder import (
    GraphProjections,
    SceneGraphEncoder,
    cross_attentions,
    install,
    shape_for,
)
from inversion_dpo.models.graph_model import (
    embed_texts,
    graph_condition,
    is_encoder,
    load_encoder,
    rows_of,
    save_encoder,
)
from inversion_dpo.models.loading import adapt
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import PolicyConfig
from inversion_dpo.training.policy import FullPolicy, LoraPolicy
from tests.slow import slow_but

FAMILIES = ("embedded", "sd15", "sdxl")
RED, BLUE, STAR = ("large", "red"), ("small", "blue"), ("small", "black")
TWO = SceneGraph((Item(0, "circle", RED), Item(1, "star", BLUE)), (Relation(0, "left of", 1),))


@pytest.fixture
def pipeline_of(fresh):
    """family -> a fresh pipeline; ``embedded`` is the packaged one."""
    return fresh


def with_encoder(pipeline, tokens=8, live=False):
    """An adapter with a new encoder; ``live``: with a way out that is not zero."""
    encoder = SceneGraphEncoder(shape_for(pipeline, tokens, 16, 2)).requires_grad_(False)
    if live:
        for projection in encoder.projections:
            nn.init.normal_(projection.to_out.weight, std=0.5)
    install(pipeline, encoder)
    return adapt(pipeline, 64)


def predicted(model, condition, seed=0):
    """The prediction at a seeded x_t."""
    count, unet = len(condition["encoder_hidden_states"]), model.pipeline.unet
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, unet.config.in_channels, 8, 8, generator=g).repeat(count, 1, 1, 1)
    return model.predict(unet, x, torch.full((count,), 500), condition)


def framed(model, condition):
    """With SDXL's sizes."""
    from inversion_dpo.data.transforms import Framing

    count = len(condition["encoder_hidden_states"])
    return condition | model.framing([Framing((64, 64), (0, 0), (64, 64))] * count)


def drawn(pipeline, graphs=None, guidance=3.0):
    """Two sampled images as one array."""
    prompts = ["a large red circle", "a small blue star"]
    if graphs:
        prompts = [replace(g, caption=p) for g, p in zip(graphs, prompts, strict=True)]
    return np.stack(sampler(pipeline, 3, guidance).draw(prompts, [0, 1]))


def sampler(pipeline, steps, guidance):
    """Sampling at 64 pixels."""
    given = [f"evaluation.sample_steps={steps}", f"evaluation.guidance_scale={guidance}"]
    return Sampler(pipeline, load_config(None, given), graph_of_prompt)


@pytest.mark.parametrize("family", slow_but(["sdxl"], FAMILIES))
def test_a_new_encoder_changes_no_bit_of_a_sampling_run(pipeline_of, family):
    before = drawn(pipeline_of(family))
    pipeline = pipeline_of(family)
    with_encoder(pipeline)
    assert np.array_equal(drawn(pipeline, [TWO, TWO]), before)
    called = pipeline(
        "a large red circle",
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        height=64,
        width=64,
    )
    plain = pipeline_of(family)(
        "a large red circle",
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        height=64,
        width=64,
    )
    assert torch.equal(called.images, plain.images)


@pytest.mark.parametrize("family", slow_but(["sdxl"], FAMILIES))
def test_of_a_live_encoder_only_a_graph_changes_anything(pipeline_of, family):
    plain = adapt(pipeline_of(family), 64)
    model = with_encoder(pipeline_of(family), live=True)
    prompts = ["a large red circle", "a photograph"]
    want = predicted(plain, framed(plain, plain.condition(prompts)))
    empty = framed(model, model.condition(prompts, [None, SceneGraph(())]))
    assert torch.equal(predicted(model, empty), want)
    both = framed(model, model.condition(prompts, [TWO, None]))
    found = predicted(model, both)
    assert torch.equal(found[1], want[1])  # its neighbour's graph is not its own
    assert (found[0] - want[0]).abs().max() > 1e-3
    with model.encoder.off():
        assert torch.equal(predicted(model, both), want)


def test_guidance_leads_away_from_the_empty_prompt_without_a_graph(pipeline_of):
    pipeline = pipeline_of("embedded")
    model = with_encoder(pipeline, live=True)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    sampler(pipeline, 1, 2.0).draw([replace(TWO, caption="a large red circle")], [0])
    text, tokens = seen[0]
    assert text.shape[:2] == (2, 32) and tokens.shape[:2] == (2, 8)
    assert not tokens[0].any() and tokens[1, :3].any(-1).all() and not tokens[1, 3:].any()
    assert torch.equal(text[:1], model.inner.condition([""])["encoder_hidden_states"])


# ---------------------------------------------------------------- the graph network


def tokens_of(model, graph):
    """Tokens [n, D] of a graph's rows."""
    rows, links = graph_condition(model.inner, [graph], model.encoder.shape.tokens).values()
    tokens = model.encoder(rows, links)[0]
    count = len(rows_of(graph)[0])
    assert not tokens[count:].any()
    return tokens[:count]


def sorted_rows(tokens):
    """A set of tokens in an order of its own."""
    return tokens[torch.argsort(tokens[:, 0])]


CYCLE = SceneGraph(
    (Item(5, "circle", RED), Item(2, "circle", RED), Item(9, "star", BLUE), Item(1, "moon")),
    (Relation(5, "left of", 2), Relation(2, "above", 9), Relation(9, "near", 5)),
)


def test_rows_are_items_then_triples_and_links_are_their_rows():
    texts, links = rows_of(CYCLE)
    assert texts[:4] == ["large red circle", "large red circle", "small blue star", "moon"]
    assert texts[5] == "large red circle above small blue star"
    assert links == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 0)]


def test_the_order_of_items_and_relations_changes_no_token(pipeline_of):
    model = with_encoder(pipeline_of("embedded"))
    want = sorted_rows(tokens_of(model, CYCLE))
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 5):
        items = tuple(CYCLE.items[k] for k in order)
        shuffled = SceneGraph(items, CYCLE.relations[1:] + CYCLE.relations[:1])
        torch.testing.assert_close(sorted_rows(tokens_of(model, shuffled)), want)


def test_repeated_objects_are_two_nodes_and_directions_differ(pipeline_of):
    model = with_encoder(pipeline_of("embedded"))
    twins = tokens_of(model, CYCLE)
    assert len(twins) == 7 and (twins[0] - twins[1]).abs().max() > 1e-3  # in other company
    pair = (Item(0, "circle", RED), Item(1, "circle", RED))
    one = tokens_of(model, SceneGraph(pair, (Relation(0, "above", 1),)))
    assert (one[0] - one[1]).abs().max() > 1e-3  # the upper one and the lower one
    turned = tokens_of(model, SceneGraph(pair, (Relation(1, "above", 0),)))
    torch.testing.assert_close(turned[:2], one[:2].flip(0))
    alone = tokens_of(model, SceneGraph(pair))
    torch.testing.assert_close(alone[0], alone[1])


def test_an_isolated_item_does_not_hear_the_others(pipeline_of):
    model = with_encoder(pipeline_of("embedded"))
    alone = SceneGraph((Item(0, "moon"),))
    torch.testing.assert_close(tokens_of(model, CYCLE)[3], tokens_of(model, alone)[0])


def test_more_rows_than_fit_lose_the_last_and_are_told_of(pipeline_of, caplog):
    model = with_encoder(pipeline_of("embedded"), tokens=5)
    with caplog.at_level(logging.WARNING, "inversion_dpo"):
        condition = model.condition(["a", "b"], [CYCLE, CYCLE])
        model.condition(["a"], [CYCLE])
    assert caplog.text.count("more than 5 items and triples") == 1
    cut = SceneGraph(CYCLE.items, CYCLE.relations[:1])
    want = graph_condition(model.inner, [cut], 5)
    assert torch.equal(condition["graph_links"][:1], want["graph_links"])
    assert torch.equal(condition["graph_rows"][:1], want["graph_rows"])


def test_a_graph_may_hold_more_objects_than_a_caption(pipeline_of):
    model = with_encoder(pipeline_of("embedded"), tokens=32, live=True)
    items = tuple(Item(k, "circle", RED) for k in range(12))
    chain = tuple(Relation(k, "left of", k + 1) for k in range(11))
    whole, less = SceneGraph(items, chain), SceneGraph(items, chain[:-1])
    both = model.condition(["a", "a"], [whole, less])
    found = predicted(model, both)
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_embedded_alike_alone_and_in_company(pipeline_of, family):
    model = adapt(pipeline_of(family), 64)
    texts = ["large red circle", "moon", "a small blue star " * 30]
    every = embed_texts(model, texts)
    assert every.shape == (3, model.pipeline.unet.config.cross_attention_dim)
    torch.testing.assert_close(every[1:2], embed_texts(model, ["moon"]))
    assert every.isfinite().all() and (every[0] - every[1]).abs().max() > 1e-2


def test_the_attention_is_softmax_over_the_tokens_and_nothing():
    torch.manual_seed(0)
    projection = GraphProjections(6, 10, 8)
    nn.init.normal_(projection.to_out.weight)
    query, tokens = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    tokens[0, 2:], tokens[1] = 0, 0
    found = projection(query, tokens, 2)
    k, v = projection.to_k(tokens[0, :2]), projection.to_v(tokens[0, :2])
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        logits = query[0][:, part] @ k[:, part].T / 2.0  # sqrt(4)
        weights = logits.exp() / (1 + logits.exp().sum(-1, keepdim=True))
        heads.append(weights @ v[:, part])
    want = torch.cat(heads, -1) @ projection.to_out.weight.T
    torch.testing.assert_close(found[0], want)
    assert not found[1].any()


# ---------------------------------------------------------------- beside LoRA and full training


def test_a_lora_sees_only_the_unet_and_a_saved_pipeline_is_plain(pipeline_of, tmp_path):
    pipeline = pipeline_of("sd15")
    plain = sorted(pipeline.unet.state_dict())
    model = with_encoder(pipeline, live=True)
    assert sorted(pipeline.unet.state_dict()) == plain
    FullPolicy(model).save(tmp_path / "full")
    again = DiffusionPipeline.from_pretrained(tmp_path / "full")
    assert sorted(again.unet.state_dict()) == plain
    policy = LoraPolicy(model, PolicyConfig(rank=2, alpha=2), 0)
    assert not [n for n in policy.trainable() if "projections" in n]
    policy.save(tmp_path / "lora")
    pipeline_of("sd15").load_lora_weights(tmp_path / "lora")


def test_the_frozen_copy_of_a_full_policy_sees_the_graph_too(pipeline_of):
    model = with_encoder(pipeline_of("sd15"), live=True)
    condition = model.condition(["a circle"], [TWO])
    policy = FullPolicy(model)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with policy.reference(None) as frozen, torch.no_grad():
        want = model.predict(policy.network, x, t, condition)
        torch.testing.assert_close(model.predict(frozen, x, t, condition), want)
        with model.encoder.off():
            assert (model.predict(policy.network, x, t, condition) - want).abs().max() > 1e-3


# ---------------------------------------------------------------- on disk


def test_saved_and_loaded_it_predicts_the_same(pipeline_of, tmp_path):
    model = with_encoder(pipeline_of("sd15"), live=True)
    save_encoder(model.encoder, tmp_path, "a-model")
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["cross_attention_dim"] == 16 and about["base_model"] == "a-model"
    assert list(about["attentions"]) == list(cross_attentions(model.pipeline))
    pipeline = pipeline_of("sd15")
    install(pipeline, load_encoder(str(tmp_path)))
    again = adapt(pipeline, 64)
    one, two = (predicted(m, m.condition(["a circle"], [TWO])) for m in (model, again))
    assert torch.equal(one, two)


def test_an_encoder_of_another_pipeline_is_refused(pipeline_of, tmp_path):
    save_encoder(with_encoder(pipeline_of("sd15")).encoder, tmp_path)
    with pytest.raises(ModelError, match="width 16, the pipeline's have 32"):
        install(pipeline_of("sdxl"), load_encoder(str(tmp_path)))
    about = json.loads((tmp_path / "config.json").read_text())
    places = about["attentions"]
    about["attentions"] = {f"{name}.moved": sizes for name, sizes in places.items()}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="UNet at .*against"):
        install(pipeline_of("sd15"), load_encoder(str(tmp_path)))
    with pytest.raises(ModelError, match="Stable Diffusion 1, 2 or XL"):
        install(pipeline_of("sd3"), load_encoder(str(tmp_path)))


def test_a_damaged_or_missing_encoder_is_named(pipeline_of, tmp_path):
    with pytest.raises(ModelError, match="no scene-graph encoder"):
        load_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"kind": "other"}')
    assert not is_encoder(tmp_path)
    save_encoder(with_encoder(pipeline_of("sd15")).encoder, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is damaged"):
        load_encoder(str(tmp_path))
