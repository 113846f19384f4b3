"""``inversion-dpo config``, the reference page of the settings, completion, the version."""

from importlib.metadata import version

import pytest
import yaml

from inversion_dpo.cli.main import main
from inversion_dpo.cli.options import complete_preset, complete_setting
from inversion_dpo.run.config import load_config, preset_names
from inversion_dpo.run.settings import commented, every_setting
from tools.settings_page import PAGE, page


def printed(capsys, *words):
    """What a command writes to standard output; nothing else, as that it was stopped by SIGTERM."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, error = capsys.readouterr()
    assert (stop.value.code or 0, error) == (0, "")
    return out


@pytest.mark.parametrize("name", preset_names())
def test_the_printed_preset_is_the_preset(capsys, tmp_path, name):
    file = tmp_path / "mine.yaml"
    file.write_text(printed(capsys, "config", name))
    assert load_config(str(file), []) == load_config(name, [])
    assert yaml.safe_load(file.read_text())["training"]["steps"]


def test_every_setting_is_printed_with_its_sentence():
    text = commented(load_config(None, []), [])
    assert len([line for line in text.splitlines() if line and "#" not in line[:6]]) == (
        len(every_setting()) + len({key.rpartition(".")[0] for key in every_setting()})
    )
    flat = " ".join(text.replace("#", "").split())
    assert all(" ".join(s.text.split()) in flat for s in every_setting().values())


def test_odd_text_survives(tmp_path):
    odd = ["no", "1e-4", "a, b: {c}", "#x", "null", "é\u202e\x07", "it's", "", "a:", "~", "0x1"]
    file = tmp_path / "mine.yaml"
    config = load_config("taste", ["training.learning_rate=1e-5"])
    config.data.columns = {f"k{text}": text for text in odd}
    config.build.by = odd
    file.write_text(commented(config, []), encoding="utf-8")
    assert load_config(str(file), []) == config


def test_overrides_are_printed_and_what_has_no_effect_is_commented_out(capsys):
    text = printed(capsys, "config", "objective.name=sft", "training.steps=7")
    tree = yaml.safe_load(text)
    assert tree["training"]["steps"] == 7 and tree["objective"]["name"] == "sft"
    assert "beta" not in tree["objective"] and "  # beta: 1000.0\n" in text


def test_the_reference_page_is_up_to_date():
    """If this fails: python -m tools.settings_page."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_version(capsys):
    assert printed(capsys, "--version").strip() == version("inversion-dpo")


def test_the_shell_completes_presets_keys_and_choices():
    assert complete_preset("sd") == ["sd15", "sd35", "sdxl"]
    assert [key for key, _ in complete_setting("training.eval")] == ["training.eval_every="]
    fits = [key for key, _ in complete_setting("data.fit=")]
    assert fits == ["data.fit=drop", "data.fit=pad", "data.fit=crop"]
    assert complete_setting("nothing=") == []
