"""What a run's trajectories depend on: equal keys share a cache, and no others."""

import hashlib
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from inversion_dpo.maths.records import Extent
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.trajectories.key import NOWHERE, CacheKey, key_of, window
from inversion_dpo.trajectories.method import chosen_method

PAIRS = SimpleNamespace(fingerprint="of the pairs", single=False)


def model(weight=1.0, **parts):
    """A pipeline of one network and a scheduler's configuration."""
    unet = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(unet.weight, weight)
    scheduler = SimpleNamespace(config={"steps": 1000})
    pipeline = SimpleNamespace(components={"unet": unet}, scheduler=scheduler, **parts)
    return SimpleNamespace(pipeline=pipeline)


def config(*overrides):
    return load_config(None, ["inversion.steps=10", *overrides])


def key(*overrides, of=None):
    return key_of(config(*overrides), PAIRS, of or model())


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, (1, 10)),  # the clean end is never trained on
        (0.25, 0.75, (3, 7)),  # 2.5 up, 7.5 down: within the window
        (0.2, 0.7, (2, 7)),
        (0.9, 0.95, (9, 9)),
        (0.92, 0.95, (10, 10)),  # none lies within: the next one up
        (0.0, 0.05, (1, 1)),
    ],
)
def test_the_window_is_what_lies_within(low, high, wanted):
    assert window(config(f"objective.t_min={low}", f"objective.t_max={high}")) == wanted


def test_what_is_inverted_is_what_is_trained_on():
    within = ["objective.t_min=0.25", "objective.t_max=0.75"]
    extent = key(*within, "inversion.fixed_point_iterations=2").extent
    assert (extent.first, extent.last, extent.iterations) == (3, 7, 2)
    assert key(*within, "objective.name=diffusion_dpo").extent == NOWHERE


def test_start_is_the_nearest_index():
    starts = [key(f"inversion.t_start={t}").extent.start for t in (0.0, 0.14, 0.16, 0.3)]
    assert starts == [0, 1, 2, 3]


def test_a_name_is_sixteen_digits_of_everything():
    one = key()
    assert len(one.name()) == 16 and int(one.name(), 16) >= 0
    assert replace(one).name() == one.name()
    names = set()
    for field in fields(CacheKey):
        value = getattr(one, field.name)
        other = value + 1 if isinstance(value, (int, float)) else f"other than {value}"
        names.add(replace(one, **{field.name: other}).name())
    assert len(names) == len(fields(CacheKey)) and one.name() not in names


@pytest.mark.parametrize(
    "override",
    [
        "data.fit=crop",
        "data.flip=true",
        "model.resolution=128",
        "model.guidance_embed=2",
        "model.prompt_chunks=2",
        "model.dtype=bfloat16",
        "data.mask=differ",
        "inversion.steps=9",
        "inversion.spacing=even",
        "inversion.guidance_scale=2",
        "inversion.fixed_point_iterations=1",
        "inversion.t_start=0.1",
        "inversion.batch_size=2",
        "inversion.keep=2",
        "objective.t_max=0.5",
        "objective.t_min=0.5",
        "objective.guidance_scale=2",
        "training.mixed_precision=bf16",
    ],
)
def test_a_setting_that_changes_trajectories_changes_the_key(override):
    assert key(override).name() != key().name()


@pytest.mark.parametrize(
    "override",
    [
        "objective.beta=7",
        "objective.target=transition",
        "training.steps=9",
        "training.seed=9",  # which only draws who is mirrored
        "policy.rank=2",
        "inversion.reconstruct=true",
        "inversion.batch_size=65",  # 32 pairs at once, as of 64 images
    ],
)
def test_other_settings_do_not(override):
    assert key(override) == key()


def test_the_weights_the_schedule_and_the_pairs_count():
    other = model()
    other.pipeline.scheduler.config["steps"] = 500
    keys = [key(), key(of=model(2.0)), key(of=other)]
    assert len({k.name() for k in keys}) == 3
    assert keys[0].pairs == "of the pairs"


def splitting(words):
    """A tokenizer that knows these words."""
    rules = Tokenizer(WordLevel({w: k for k, w in enumerate(words)}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="?", pad_token="?")


def reading(tokenizer, **switches):
    """A model whose prompts go through this tokenizer, or a processor that holds one."""
    found = model(config=switches)
    found.pipeline.components["words"] = tokenizer
    return found


def test_what_turns_prompts_into_numbers_counts():
    """The same weights read other numbers of a prompt, so its conditions are others."""
    one, same, other, short = (splitting(w) for w in ("?ab", "?ab", "?ba", "?ab"))
    short.model_max_length = 7
    held = SimpleNamespace(tokenizer=other)
    slow = SimpleNamespace(get_vocab=lambda: {"a": 0})  # of no rules but its words
    found = [key(of=reading(t)).name() for t in (one, other, short, slow)]
    assert len({key().name(), *found}) == 5
    same("a", padding="max_length", truncation=True, max_length=3)  # leaves its mark inside
    assert key(of=reading(same)).name() == found[0]
    assert key(of=reading(held)).name() == found[1]


def test_a_pipelines_own_switches_count():
    """SDXL's empty prompt is zeros by one of them; where a file lies counts nothing."""
    plain = key(of=reading(None)).name()
    zeros = reading(None, force_zeros_for_empty_prompt=True)
    ratio = reading(None, boundary_ratio=0.9)
    assert len({plain, *(key(of=m).name() for m in (zeros, ratio))}) == 3
    elsewhere = reading(None, _name_or_path="there", requires_safety_checker=True)
    assert plain == key(of=elsewhere).name()


def test_the_order_in_which_a_schedule_is_written_does_not_count():
    one, other = model(), model()
    one.pipeline.scheduler.config = {"steps": 1000, "kind": "v"}
    other.pipeline.scheduler.config = {"kind": "v", "steps": 1000}
    assert key(of=one) == key(of=other)


def test_a_single_image_is_no_pair_of_it_with_itself():
    alone = SimpleNamespace(fingerprint=PAIRS.fingerprint, single=True)
    found = key_of(config(), alone, model())
    assert found.single and found.sides == 1 and found.name() != key().name()
    assert not key().single and key().sides == 2


def test_how_paths_would_be_made_makes_no_difference_where_there_are_none():
    noise = "objective.name=diffusion_dpo"
    plain = key(noise)
    for override in (
        "inversion.guidance_scale=2",
        "inversion.t_start=0.1",
        "inversion.keep=2",
        "inversion.fixed_point_iterations=1",
        "objective.guidance_scale=2",
    ):
        assert key(noise, override) == plain
    assert plain.reference_guidance == 1.0 and plain.steps == 10 and plain.extent.last == 0


@pytest.mark.parametrize(("size", "per_shard"), [(1, 1), (2, 1), (5, 2), (6, 3)])
def test_a_batch_is_whole_pairs(size, per_shard):
    assert key(f"inversion.batch_size={size}").pairs_per_shard == per_shard


def test_a_straight_line_needs_the_top_alone_and_known_noise_no_path():
    line = key("objective.path=line", "objective.t_max=0.5", "objective.guidance_scale=3")
    assert (line.extent.first, line.extent.last, line.endpoint) == (10, 10, "recovered")
    assert line.reference_guidance == line.guidance_scale == 1  # nothing is stored to be compared
    known = key("objective.path=known", "inversion.guidance_scale=2")
    assert (known.extent, known.endpoint, known.guidance_scale) == (NOWHERE, "known", 1)
    assert known == replace(key("objective.name=diffusion_dpo"), endpoint="known")
    assert known.smaller() == line.smaller() == {} and known.pair_size(10, 3) == 83
    with pytest.raises(ConfigError, match="set data.flip=false"):
        key("objective.path=known", "data.flip=true")


def test_the_released_script_trains_every_state_of_its_own_grid():
    released = "objective.name=inversion_dpo_released"
    found = key(released, "objective.t_min=0.5", "inversion.spacing=even", "inversion.keep=2")
    assert window(config(released, "objective.t_max=0.5")) == (1, 10)
    assert found.spacing == "released" and found.keep == (2, 1, 10)
    assert key("inversion.spacing=even").spacing == "even"
    with pytest.raises(ConfigError, match="inversion.reconstruct=true does not fit"):
        window(config(released, "inversion.reconstruct=true"))


def test_kept_states_are_drawn_from_the_window_and_flips_from_the_seed():
    within = ["objective.t_min=0.25", "objective.t_max=0.75", "objective.guidance_scale=2"]
    found = key("inversion.keep=2", "data.flip=true", "training.seed=5", *within)
    assert found.keep == (2, 3, 7) and found.flip_seed == 5 and found.reference_guidance == 2
    assert key().keep is None and key().flip_seed is None


def test_a_new_encoder_counts_by_its_tokens_and_a_trained_one_by_its_weights():
    def encoder(weight):
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(layer.weight, weight)
        layer.shape = SimpleNamespace(tokens=4)
        return model(scene_graph=layer)

    assert key().scene_graph is None
    new = [key(of=encoder(w)).scene_graph for w in (1.0, 2.0)]
    assert new == ["new 4", "new 4"]
    trained = [key("model.scene_graph=x", of=encoder(w)).scene_graph for w in (1.0, 2.0)]
    assert trained[0] != trained[1] and len(trained[0]) == 64


# ---- a key that is written out


KEY = CacheKey(
    pairs="p",
    fit="crop",
    flip_seed=None,
    model="m",
    schedule="{}",
    resolution=64,
    guidance_embed=1.0,
    steps=10,
    spacing="sampler",
    guidance_scale=1.0,
    extent=Extent(last=3),
    pairs_per_shard=2,
    keep=None,
    precision="bfloat16 bf16",
    prompt_chunks=1,
    scene_graph=None,
    reference_guidance=1.0,
)
WRITTEN = (
    '{"pairs": "p", "fit": "crop", "flip_seed": null, "model": "m", "schedule": "{}", '
    '"resolution": 64, "guidance_embed": 1.0, "steps": 10, "spacing": "sampler", '
    '"guidance_scale": 1.0, "extent": {"start": 0, "first": 1, "last": 3, "iterations": 0}, '
    '"pairs_per_shard": 2, "keep": null, "precision": "bfloat16 bf16", "prompt_chunks": 1, '
    '"scene_graph": null, "reference_guidance": 1.0, "mask": "given", "layout": 8}'
)


def test_a_cache_on_a_disk_is_found_by_the_name_that_it_was_given():
    """Another name inverts everybody's pairs again: only with a new LAYOUT, on purpose."""
    assert KEY.name() == hashlib.sha256(WRITTEN.encode()).hexdigest()[:16]


HALF, WHOLE = "float16 no", "float32 no"  # the network's numbers have 2 bytes, or 4


@pytest.mark.parametrize(
    ("change", "bytes_an_image"),  # of one number of a latent: x_0 has 4
    [
        ({}, 4 + 4 * 2),  # predictions of the states 0 to 3
        ({"precision": HALF}, 4 + 4 * 2),
        ({"precision": WHOLE}, 4 + 4 * 4),
        ({"precision": "float32 bf16"}, 4 + 4 * 2),  # the network's autocast counts
        ({"guidance_scale": 2.0, "reference_guidance": 2.0}, 4 + 4 * 4),  # mixed in float32
        ({"guidance_scale": 2.0, "extent": Extent(first=2, last=3)}, 4 + 2 * 2 + 3 * 4),
        ({"reference_guidance": 2.0, "extent": Extent(first=2, last=3)}, 4 + 2 * 4 + 3 * 2),
        ({"extent": NOWHERE}, 4),
        ({"extent": Extent(3, 3, 3), "endpoint": "recovered"}, 2 + 2),
    ],
)
def test_the_bytes_of_a_pair_by_hand(change, bytes_an_image):
    """Ten numbers of a latent, and 3 bytes of text, which a pair has once."""
    found = replace(KEY, **change)
    assert found.pair_size(10, 3) == 2 * 10 * bytes_an_image + 3
    assert replace(found, single=True).pair_size(10, 3) == 10 * bytes_an_image + 3


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, {}),  # of three states four cannot be kept, the rest is as small as it gets
        ({"extent": Extent(last=4)}, {}),
        ({"extent": Extent(first=3, last=6)}, {}),
        ({"extent": Extent(last=5)}, {"inversion.keep=4": {"keep": (4, 1, 5)}}),
        ({"extent": Extent(first=3, last=9)}, {"inversion.keep=4": {"keep": (4, 3, 9)}}),
        ({"extent": Extent(last=5), "keep": (5, 1, 5)}, {}),
        ({"precision": WHOLE}, {"training.mixed_precision=bf16": {"precision": "bf16"}}),
        ({"guidance_scale": 2.0}, {"inversion.guidance_scale=1": {"guidance_scale": 1.0}}),
    ],
)
def test_what_would_make_a_cache_smaller(change, wanted):
    found = replace(KEY, **change)
    assert found.smaller() == {k: replace(found, **other) for k, other in wanted.items()}


def test_what_does_not_go_together_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="needs objective.path=trajectory"):
        chosen_method(config("objective.name=sft", "objective.target=transition"))
    method = chosen_method(config("objective.name=kto", "objective.path=trajectory"))
    assert (method.loss, method.path, method.target) == ("kto", "trajectory", "x0")
