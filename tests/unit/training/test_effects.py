"""A setting that changes nothing in a run is refused by name."""

import re

import pytest

from inversion_dpo.compare.methods import METHODS, check
from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.maths.methods import USES
from inversion_dpo.run.config import PRESETS, ConfigError, load_config, load_given, preset_names
from inversion_dpo.run.limits import TAGS
from inversion_dpo.run.settings import every_setting
from inversion_dpo.training.effects import check_effects, load_checked
from inversion_dpo.trajectories.method import chosen_method

IDLE = {  # setting -> what else is set, so that it has no effect
    "objective.soft_labels=true": ["kto", "dspo", "mapo", "sft", "denoising"],
    "objective.safeguard=true": ["sft", "mapo", "denoising"],
    "objective.target=reference": ["diffusion_dpo", "inpo", "dspo", "mapo", "kto", "sft"],
    "objective.link=ipo": ["smpo", "dspo", "mapo", "kto", "sft", "denoising"],
    "objective.label_smoothing=0.1": ["smpo", "dspo", "mapo", "kto", "sft"],
    "objective.beta=7": ["sft", "denoising"],
    "objective.anchor=1": ["nft", "mapo", "dspo", "sft"],
    "objective.sft_weight=1": ["nft", "mapo", "dspo", "sft"],
    "data.label_noise=0.5": ["denoising"],
    "inversion.fixed_point_iterations=3": ["diffusion_dpo", "inpo", "smpo", "kto", "sft"],
    "inversion.t_start=0.1": ["diffusion_dpo", "inpo", "sft"],
    "inversion.keep=2": ["diffusion_dpo", "inpo", "sft"],
    "inversion.guidance_scale=2": ["diffusion_dpo", "sft"],
    "inversion.steps=10": ["diffusion_dpo", "kto", "sft"],
    "inversion.spacing=even": ["diffusion_dpo", "kto", "sft"],
}
CASES = [(key, name) for key, names in IDLE.items() for name in names]
SOFT = ["objective.soft_labels=true"]  # without which smpo is another method


@pytest.mark.parametrize(("override", "name"), CASES)
def test_a_setting_that_the_method_ignores_is_refused(override, name):
    method = [f"objective.name={name}", *SOFT * (name == "smpo")]
    with pytest.raises(ConfigError) as error:
        load_checked(None, [*method, override])
    text, key = str(error.value), override.partition("=")[0]
    why = "needs objective.path=" if key == "objective.target" else f"(not objective.name={name})"
    assert text.startswith(key) and why in text
    assert load_checked(None, method) == load_config(None, method)


def test_a_refusal_names_the_loss_that_was_given_and_not_the_methods_name():
    with pytest.raises(ConfigError, match=r"\(not objective.loss=kto objective.path=noise\)"):
        load_checked(None, ["objective.loss=kto", "objective.path=noise", "objective.link=ipo"])


@pytest.mark.parametrize("override", IDLE)
def test_the_same_setting_is_taken_where_it_has_an_effect(override):
    load_checked(None, [override])


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["policy.kind=full", "policy.dora=true"], "policy.kind=lora"),
        (["policy.kind=full", "policy.rank=4"], "policy.kind=lora"),
        (["policy.kind=full", "policy.alpha=4"], "policy.kind=lora"),
        (["policy.kind=full", "policy.target_modules=[to_q]"], "policy.kind=lora"),
        (["policy.graph_tokens=8"], "policy.kind=scene_graph"),
        (["objective.gradient_factor=0.1"], "objective.beta=auto"),
        (["objective.coupling=0.5"], "objective.path=line or known"),
        (["objective.reference_every=5"], "a path that is not trajectory or released"),
        (["objective.name=sft", "objective.reference_every=5"], "a loss with a reference"),
        (["objective.name=kto", "objective.reference_every=5", "policy.kind=scene_graph"], "kind"),
        (
            ["objective.name=nft", "objective.gap_weighted=true"],
            "the loss dpo, dpo_bounded, dpo_released, dmpo or kto",
        ),
        (["objective.gap_weighted=true", "objective.soft_labels=true"], "soft_labels=false"),
        (["objective.path=line", "inversion.keep=2"], "a method that stores states"),
        (["objective.path=known", "inversion.steps=9"], "a method that inverts"),
        (["objective.safeguard_margin=0.5"], "objective.safeguard=true"),
        (["data.graph_dropout=0.5"], "policy.kind=scene_graph"),
        (["data.revision=main"], "data.pairs=hf:"),
        (["evaluation.parser.url=http://localhost/v1"], "evaluation.scorer="),
        (["build.by=[warmth]"], "build.prompts"),
        (["build.licence=mit"], "build.splits"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_refused(overrides, needs):
    with pytest.raises(ConfigError, match=f"has no effect in this run: it needs .*{needs}"):
        load_checked(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=sft", "inversion.reconstruct=true", "inversion.steps=10"],
        ["objective.name=sft", "objective.link=sigmoid"],  # the default
        ["objective.beta=auto", "objective.gradient_factor=0.1"],
        ["objective.path=known", "objective.coupling=0.5"],
        ["objective.path=stepped", "inversion.steps=9", "objective.reference_every=5"],
        ["objective.path=stepped", "inversion.fixed_point_iterations=1"],
        ["objective.name=kto", "objective.gap_weighted=true", "objective.reference_every=5"],
        ["objective.path=line", "inversion.steps=9", "inversion.t_start=0.2"],
        ["objective.safeguard=true", "objective.safeguard_margin=0.5"],
        ["policy.kind=scene_graph", "policy.graph_tokens=8", "data.graph_dropout=0.5"],
        ["model.scene_graph=encoder", "data.caption_dropout=0.5"],
        ["data.pairs=hf:a/b", "data.revision=main"],
        ["evaluation.scorer=clip,scene-graph", "evaluation.parser.url=http://localhost/v1"],
        ["evaluation.scorer=[clip, scene-graph]", "evaluation.parser.distractors=3"],
        ["build.splits={train: 4}", "build.licence=mit"],
    ],
)
def test_a_setting_that_has_an_effect_is_taken(overrides):
    load_checked(None, overrides)


def test_several_are_counted_and_the_first_is_named():
    with pytest.raises(ConfigError, match=r"^inversion.t_start=0.1 .* \(and 1 more such settings"):
        load_checked(None, ["objective.name=sft", "objective.beta=7", "inversion.t_start=0.1"])


def test_what_the_user_did_not_write_is_not_complained_of(tmp_path, monkeypatch):
    """A packaged preset, a run's own file and a file of every setting were not written by hand."""
    words = ["objective.name=sft"]
    assert load_given("taste", words)[1] == {"objective.name"}
    for name in ("taste", str(PRESETS / "taste.yaml")):
        load_checked(name, words)
    mine = tmp_path / "mine.yaml"
    mine.write_text("inversion: {t_start: 0.1}")
    with pytest.raises(ConfigError, match="inversion.t_start=0.1 has no effect"):
        load_checked(str(mine), words)
    monkeypatch.chdir(PRESETS)
    load_checked("taste.yaml", words)
    saved = mine.rename(tmp_path / "config.yaml")
    load_checked(str(saved), words)


@pytest.mark.parametrize("name", preset_names())
def test_a_packaged_preset_sets_nothing_that_has_no_effect(name):
    check_effects([load_config(name, [])], every_setting())


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_a_compared_method_have_an_effect(name):
    load_checked(None, list(METHODS[name].settings))


def test_a_comparison_takes_a_setting_that_one_of_its_methods_uses():
    plans = {
        name: [*METHODS[name].settings, "objective.soft_labels=true"]
        for name in ("x0", "sft", "kto")
    }
    extra = ["objective.soft_labels=true"]
    check("taste", [plans["x0"], plans["sft"]], extra)
    with pytest.raises(ConfigError, match="objective.soft_labels=true has no effect"):
        check("taste", [plans["kto"], plans["sft"]], extra)


def test_a_comparison_does_not_vary_what_changes_nothing():
    plans = [[*METHODS["sft"].settings, *more] for more in ([], ["objective.beta=7"])]
    with pytest.raises(ConfigError, match="objective.beta=.* has no effect"):
        check("taste", plans, vary=["objective.beta=7"])


@pytest.mark.parametrize("setting", ["objective.loss=kto", "objective.path=noise"])
def test_a_comparison_takes_no_loss_or_path_for_all_its_methods(setting, tmp_path):
    """Every run would have it, under the names of the methods."""
    plans = [[*METHODS[name].settings, setting] for name in ("x0", "kto")]
    key, _, value = setting.partition("=")
    file = tmp_path / "mine.yaml"
    file.write_text(f"objective:\n  {key.partition('.')[2]}: {value}\n")
    for config, extra in (("taste", [setting]), (str(file), [])):
        with pytest.raises(
            ConfigError, match=f"{setting}, typed or in the file, would replace that of every"
        ):
            check(config, plans, extra)
    check("taste", [METHODS["x0"].settings, plans[0]], vary=[setting])


def test_every_tag_is_known():
    words = {
        word
        for setting in every_setting().values()
        if setting.effect
        for word in setting.effect.when.split()
        if "=" not in word and word not in ("and", "or")
    }
    assert words == set(TAGS)
    for name in every_setting()["objective.name"].choices:
        method = chosen_method(load_config(None, [f"objective.name={name}", *SOFT]))
        assert LOSSES[method.loss].uses <= set(TAGS)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["objective.name=kto"], "for the loss dpo, which usually has 2000; kto usually has 1000"),
        (["objective.name=kto"], "objective.beta=5000 was chosen "),
        (["objective.name=kto"], "for example to 2500"),
        (["objective.loss=nft", "objective.path=noise"], "set objective.beta, for example to 1\n"),
        (["objective.name=kto", "objective.beta=5000"], ""),
        (["objective.name=kto", "objective.beta=null"], ""),
        (["objective.name=diffusion_dpo"], ""),
        (["objective.name=sft"], ""),
        (["training.steps=3"], ""),
    ],
)
def test_a_presets_beta_of_another_loss_is_warned_of(settings, warned, caplog):
    load_checked("sdxl", settings, "train")
    assert warned in caplog.text and bool(warned) == bool(caplog.text)


def test_what_a_setting_needs_names_the_losses_that_use_it():
    for tag, text in TAGS.items():
        if text.startswith("the loss "):
            named = set(re.split(", | or ", text.removeprefix("the loss ")))
            assert named == {loss for loss, uses in USES.items() if tag in uses}, tag
