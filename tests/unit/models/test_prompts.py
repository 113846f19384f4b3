"""Prompts in chunks: one chunk is what the pipelines do, several are windows laid end to end."""

from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler

from inversion_dpo.data.transforms import Framing
from inversion_dpo.maths.inversion import reconstruct
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import adapt
from inversion_dpo.models.prompts import (
    call_arguments,
    chunk_ids,
    encode_clip,
    encode_two_clips,
    overlong,
)
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.training.recipe import train
from tests.sessions import conditional, set_up
from tests.slow import slow_but

LONG = "a large blue cross " * 25  # 100 tokens: 75 and 25
PROMPTS = ["a small red star", "", "a " * 75, "a " * 76, LONG]


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_one_chunk_is_what_the_pipeline_makes(family, pipe):
    pipeline = pipe(family)
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(encode_clip(pipeline, PROMPTS, 1), theirs)


def test_one_chunk_is_what_sdxls_pipeline_makes(pipe):
    pipeline = pipe("sdxl")
    theirs = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    hidden, pooled = encode_two_clips(pipeline, PROMPTS, 1)
    assert torch.equal(hidden, theirs[0]) and torch.equal(pooled, theirs[2])


def test_one_chunk_under_an_attention_mask(fresh):
    """Some text encoders of SD2's descendants ask for one (config.use_attention_mask)."""
    pipe = fresh("sd2")
    without = encode_clip(pipe, PROMPTS, 1)
    pipe.text_encoder.config.use_attention_mask = True
    theirs, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    ours = encode_clip(pipe, PROMPTS, 1)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, without)


def test_windows_by_hand(pipe):
    """100 tokens: 75 between marks, then 25 between marks and the rest padding."""
    # SD2 pads with another token than the end
    tokenizer = pipe("sd2").tokenizer
    words = tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(words) == 100
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    first, second, third = chunk_ids(tokenizer, [LONG], 3).tolist()
    assert first == [begin, *words[:75], end]
    assert second == [begin, *words[75:], end, *[pad] * 50]
    assert third == tokenizer("", padding="max_length", max_length=77).input_ids


def test_chunks_are_encoded_one_by_one(pipe):
    pipeline = pipe("sdxl")
    words = pipeline.tokenizer(LONG, add_special_tokens=False).input_ids
    rest = pipeline.tokenizer.decode(words[75:])
    both, pooled = encode_two_clips(pipeline, [LONG], 2)
    for part, text in ((slice(0, 77), LONG), (slice(77, 154), rest)):
        alone, _ = encode_two_clips(pipeline, [text], 1)
        torch.testing.assert_close(both[:, part], alone)
    _, first = encode_two_clips(pipeline, [LONG], 1)
    torch.testing.assert_close(pooled, first)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_all_prompts_come_out_equally_long(family, pipe):
    model = adapt(pipe(family), 64, prompt_chunks=3)
    assert model.condition(PROMPTS)["encoder_hidden_states"].shape[:2] == (5, 231)
    empty = model.condition([""])["encoder_hidden_states"]
    assert empty.shape[1] == 231 and (not empty.any()) == (family == "sdxl")
    cut, whole = (
        adapt(model.pipeline, 64, prompt_chunks=k).condition([LONG, LONG + "red"]) for k in (1, 2)
    )
    assert torch.equal(*cut["encoder_hidden_states"])
    assert not torch.equal(*whole["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("family", "guidance"),
    slow_but([("sd15", 1.0), ("sdxl", 3.0)], product(["sd15", "sdxl"], [1.0, 3.0])),
)
def test_what_is_trained_is_what_is_sampled(family, guidance, fresh):
    """The pipeline given the chunks goes where our own sampler goes with the trained condition."""
    pipe = fresh(family)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    model = adapt(pipe, 64, prompt_chunks=2)
    condition, empty = model.condition([LONG]), model.condition([""])
    framing = model.framing([Framing((64, 64), (0, 0), (64, 64))])
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, plain = (conditional(model, c | framing) for c in (condition, empty))

    def guided(x, t):
        return plain(x, t) + guidance * (ours(x, t) - plain(x, t))

    with torch.no_grad():
        final = reconstruct(x_T, model.schedule.grid(5, "sampler"), guided, model.schedule.kind)
    theirs = pipe(
        **call_arguments(empty, condition),
        latents=x_T,
        num_inference_steps=5,
        height=64,
        width=64,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    torch.testing.assert_close(final, theirs, rtol=1e-4, atol=1e-4)


def test_samples_depend_on_the_end_of_the_prompt(pipe):
    pipeline = pipe("sd15")
    both = [LONG, LONG + "red star"]
    cut, whole = (
        Sampler(
            pipeline, load_config(None, [f"model.prompt_chunks={k}", "evaluation.sample_steps=2"])
        ).draw(both, [0, 0])
        for k in (1, 2)
    )
    assert (cut[0] == cut[1]).all() and (whole[0] != whole[1]).any()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_families_with_t5_refuse_chunks(family, pipe):
    with pytest.raises(ModelError, match="prompt_chunks=2 is for Stable Diffusion 1, 2 and XL"):
        adapt(pipe(family), 64, prompt_chunks=2)


def test_no_chunks_are_refused():
    with pytest.raises(ConfigError, match="prompt_chunks=0: give a whole number from 1 to 10000"):
        load_config(None, ["model.prompt_chunks=0"])


@pytest.mark.parametrize(
    ("family", "chunks", "expected"),
    [
        ("sd15", 1, {"tokenizer": 2}),
        ("sdxl", 2, {"tokenizer": 0, "tokenizer_2": 0}),
        ("sd3", 1, {"tokenizer": 2, "tokenizer_2": 2, "tokenizer_3": 0}),
        ("flux", 1, {"tokenizer": 2, "tokenizer_2": 0}),
    ],
)
def test_prompts_that_lose_their_end_are_counted(family, chunks, expected, pipe):
    model = adapt(pipe(family), 64, prompt_chunks=chunks)
    assert overlong(model, PROMPTS) == expected


@pytest.mark.parametrize(("part", "limit", "family"), [("_3", 255, "sd3"), ("_2", 511, "flux")])
def test_t5_is_counted_by_what_its_pipeline_reads(part, limit, family, pipe):
    model = adapt(pipe(family), 64)
    name = f"tokenizer{part}"
    length = len(getattr(model.pipeline, name)("red " * 10, add_special_tokens=False).input_ids)
    words = "red " * (limit * 10 // length)  # as many as are read, then one more
    assert overlong(model, [words, words + "red"])[name] == 1


@pytest.fixture
def long_captions(pair_file, tmp_path):
    """Eight pairs, three with a caption of 120 words."""
    rows = pq.read_table(pair_file).to_pylist()[:8]
    for k in (0, 3, 7):
        rows[k]["caption"] = "a small red star " * 30
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "long.parquet")
    return f"data.pairs={tmp_path / 'long.parquet'}"


def test_a_run_says_how_many_captions_are_cut(tiny_config, long_captions, tmp_path, caplog):
    for _ in ("made", "found"):  # the cache remembers
        caplog.clear()
        session = set_up(tiny_config(long_captions, "inversion.steps=2"), tmp_path)
        inner = session.model.pipeline.tokenizer.model_max_length - 2
        assert f"of 8 captions the end is cut: 3 by tokenizer (reads {inner} tok" in caplog.text
    assert "model.prompt_chunks=2 reads" in caplog.text
    caplog.clear()
    chunks = -(-120 // inner)
    more = (f"model.prompt_chunks={chunks}", "inversion.steps=2")
    set_up(tiny_config(long_captions, *more), tmp_path)
    assert "is cut" not in caplog.text


def test_chunks_train_with_dropped_prompts_and_guidance(tiny_config, long_captions, tmp_path):
    overrides = ["model.prompt_chunks=3", "data.prompt_dropout=0.5", "inversion.guidance_scale=2"]
    few = ("training.steps=2", "inversion.steps=3")
    config = tiny_config(long_captions, *few, *overrides)
    session = train(config, tmp_path / "run")
    inner = session.model.pipeline.tokenizer.model_max_length
    condition = session.cache.condition([0, 1])["encoder_hidden_states"]
    assert condition.shape[:2] == (4, 3 * inner)
    torch.testing.assert_close(
        condition[:1], session.model.condition(["a small red star " * 30])["encoder_hidden_states"]
    )
