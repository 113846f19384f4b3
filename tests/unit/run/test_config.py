"""Settings as people type them, their limits, and what they say about themselves."""

import re
from dataclasses import asdict, replace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from inversion_dpo.data.rankings import SCHEMES
from inversion_dpo.data.transforms import FITS
from inversion_dpo.evaluation.publish import KINDS
from inversion_dpo.making_pairs.mining import MINERS
from inversion_dpo.maths.losses import LINKS, LOSSES
from inversion_dpo.maths.methods import METHODS, PATHS
from inversion_dpo.maths.targets import TARGETS, WEIGHTS
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.settings import every_setting


def test_a_bare_no_is_a_precision():
    assert load_config(None, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_columns_are_renamed_one_by_one():
    config = load_config(None, ["data.columns.caption=text", "data.columns.jpg_0=first"])
    assert config.data.columns == {"caption": "text", "jpg_0": "first"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.fit=squeeze"], "data.fit=squeeze: give one of drop, pad, crop"),
        (["data.format=parqet"], "did you mean 'parquet'"),
        (["data.prompt_dropout=1.5"], "data.prompt_dropout=1.5: give a number from 0 to 1"),
        (["training.optimizer=sgd"], "adamw, adamw8bit, adafactor"),
        (["inversion.spacing=evn"], "did you mean 'even'"),
        (["inversion.keep=2", "objective.target=transition"], "needs the neighbour"),
        (["inversion.max_error=0.1"], "inversion.reconstruct=true"),
        (["objective.name=DPO"], "did you mean 'inversion_dpo' or 'diffusion_dpo'"),
        (["build.mix={2/1:1}"], "mix.2/1:1=null: give a number above 0, after a colon and a space"),
        (["inversion.keep=0"], "inversion.keep=0: give a whole number of at least 1"),
        (["training.steps=1e3"], "steps=1000.0: give a whole number of at least 1, written 1000"),
        (["training.steps=1e20"], "of at least 1, at most 1,000,000,000"),
        ([f"training.steps={10**20}"], "of at least 1, at most 1,000,000,000"),
        (["policy.rank=1000000"], "policy.rank=1000000: give a whole number from 1 to 10000"),
        (["model.resolution=100000"], "from 1 to 9999 or text such as 832x1216"),
        (["model.resolution=10000x10"], "from 1 to 9999 or text such as 832x1216"),
        (["objective.guidance_scale=0"], "objective.guidance_scale=0: give a number above 0"),
        (["inversion.guidance_scale=nan"], "inversion.guidance_scale=nan: give a number above 0"),
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


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("objective.name", METHODS),
        ("objective.loss", LOSSES),
        ("objective.path", PATHS),
        ("objective.target", TARGETS),
        ("objective.link", LINKS),
        ("objective.weighting", WEIGHTS),
        ("data.ranking", SCHEMES),
        ("data.fit", ["drop", *FITS]),
        ("build.mining", MINERS),
        ("policy.kind", KINDS),
    ],
)
def test_choices_are_those_of_the_table(key, table):
    """The configuration imports no other room, so each list of choices stands in two places."""
    assert every_setting()[key].choices == tuple(table)


def test_a_tracker_is_one_of_accelerate():
    names = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    assert set(every_setting()["training.tracker"].choices) - {"auto", "none"} <= names


@pytest.mark.parametrize("key", every_setting())
def test_every_setting_explains_itself(key):
    setting = every_setting()[key]
    assert re.fullmatch(r"[A-Z].*[.?]", setting.text), setting.text
    assert len(setting.text.split()) <= 25 and setting.range


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=1.5",
        "training.steps=true",
        "training.steps=null",
        "model.resolution=64px",
        "model.t5=1",
        "model.path=true",
        "training.learning_rate='1'",
        "training.learning_rate=.inf",
        "training.learning_rate=1e400",
        "evaluation.guidance_scale=.nan",
        "evaluation.scorer=[]",
        "evaluation.scorer={a: 1}",
        "evaluation.parser.timeout=0",
        "policy.target_modules=to_q",
        "build.splits.train=0",
        "build.samples=1",
        "training.seed=-1",
        "policy.alpha=1e9",
        "training.learning_rate=1e6",
        "training.weight_decay=-1",
        "training.max_grad_norm=1e10",
        "evaluation.guidance_scale=1e6",
        "objective.guidance_scale=1e6",
        "objective.beta=1e12",
        "objective.beta=nan",
        "objective.anchor=1e9",
        "evaluation.parser.timeout=1e12",
        "build.mix.2/1=.inf",
        "build.guidance_scales=[1e6]",
    ],
)
def test_an_error_names_the_key_and_what_may_stand_there(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(f"{key}=") and ": give " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_can_be_copied_with_changes():
    config = load_config("taste", [])
    other = replace(config, training=replace(config.training, steps=7))
    assert (other.training.steps, config.training.steps) == (7, 80)
    assert asdict(other)["training"] == asdict(config)["training"] | {"steps": 7}
    with pytest.raises(ValueError, match="steps"):
        replace(config.training, steps=0)


def test_what_is_written_is_read_back(tmp_path):
    words = ["objective.beta=300", "data.columns.caption=no text", "build.by=['a, b', 'no']"]
    config = load_config("composition", words)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "saved.yaml"), []) == config


def test_a_group_may_be_empty_and_may_not_be_a_value(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("training:\n  # steps: 3\nevaluation: {parser: }\n")
    assert load_config(str(file), []) == load_config(None, [])
    file.write_text("training: 3\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: training=3: training is a group"):
        load_config(str(file), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {step: 3}", "unknown key 'training.step'; did you mean 'training.steps'"),
        ("training.steps: 3", "training.steps is one word: write it as training: {steps: 3}"),
        ("training: {steps: 0}", "training.steps=0: give a whole number of at least 1"),
        ("training: {steps: 1.5}", "training.steps=1.5: give"),
        ("- 1", "a configuration is keys and values"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(file), ["training.seed=3"])
    assert str(error.value).startswith(f"{file}: {message}")


def test_a_run_of_another_version_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("training: {colour: red}")
    with pytest.raises(ConfigError, match="unknown key .*; if another version of inversion-dpo wr"):
        load_config(str(tmp_path / "config.yaml"), [])


def test_smpo_without_soft_labels_is_another_method():
    with pytest.raises(ConfigError, match="set objective.soft_labels=true"):
        load_config(None, ["objective.name=smpo"])
