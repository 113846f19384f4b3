"""Overrides as people type them."""

import pytest

from inversion_dpo.run.config import ConfigError, load_config


def test_a_bare_no_is_a_precision():
    assert load_config(None, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_columns_are_renamed_one_by_one():
    config = load_config(None, ["data.columns.caption=text", "data.columns.jpg_0=first"])
    assert config.data.columns == {"caption": "text", "jpg_0": "first"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.fit=squeeze"], "data.fit='squeeze' is not one of pad, crop"),
        (["data.format=parqet"], "did you mean 'parquet'"),
        (["data.prompt_dropout=1.5"], "data.prompt_dropout must lie between 0 and 1"),
        (["training.optimizer=sgd"], "adamw, adamw8bit, adafactor"),
        (["inversion.spacing=evn"], "did you mean 'even'"),
        (["inversion.keep=2", "objective.target=transition"], "needs the neighbour"),
        (["inversion.max_error=0.1"], "inversion.reconstruct=true"),
        (["inversion.keep=0"], "inversion.keep must be positive"),
        (["objective.guidance_scale=0"], "objective.guidance_scale=0.0 must be positive"),
        (["inversion.guidance_scale=nan"], "inversion.guidance_scale=nan must be positive"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_dataset_whose_images_could_stand_in_two_pairs_is_refused_before_it_is_sampled():
    splits = ["build.splits={train: 4}", "build.mining=pareto"]
    with pytest.raises(ConfigError, match="build.once=true"):
        load_config("taste", splits)
    load_config("taste", [*splits, "build.once=true"])
    load_config("taste", [splits[0], "build.mining=best_worst"])
