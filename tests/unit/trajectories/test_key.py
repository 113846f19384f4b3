"""What a run's trajectories depend on: equal keys share a cache, and no others."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

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
    ["objective.beta=7", "training.steps=9", "policy.rank=2", "inversion.reconstruct=true"],
)
def test_other_settings_do_not(override):
    assert key(override) == key()


def test_the_weights_the_schedule_and_the_pairs_count():
    other = model()
    other.pipeline.scheduler.config["steps"] = 500
    keys = [key(), key(of=model(2.0)), key(of=other)]
    assert len({k.name() for k in keys}) == 3
    assert keys[0].pairs == "of the pairs"


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
    assert plain.reference_guidance == 1.0 and plain.steps == 10


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


def test_what_does_not_go_together_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="needs objective.path=trajectory"):
        chosen_method(config("objective.name=sft", "objective.target=transition"))
    method = chosen_method(config("objective.name=kto", "objective.path=trajectory"))
    assert (method.loss, method.path, method.target) == ("kto", "trajectory", "x0")
