"""The three journeys of docs/tutorial/journeys.md, at small scale on the tiny pipeline."""

import importlib.util
from pathlib import Path

import pytest

from inversion_dpo.run.config import to_yaml
from tests.slow import slow_but

FILE = Path(__file__).parents[2] / "examples" / "journeys.py"
GOALS = {
    "spreadsheet": ("plain diffusers loads mine/adapter", "mine/report.html"),
    "labels": ("the policy is preferred in", "mine/adapter/pytorch_lora_weights.safetensors"),
    "methods": ("report:", "compared/report.html"),
}


@pytest.mark.parametrize(
    "name",
    slow_but(["labels"], GOALS),
)
def test_a_journey_arrives(name, tiny_config, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("journeys", FILE)
    journeys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(journeys)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config("training.steps=2")))
    words = ["--folder", str(tmp_path / "empty"), "--config", str(tmp_path / "tiny.yaml")]
    journeys.main([name, *words, "training.steps=3"])
    said, made = GOALS[name]
    assert said in capsys.readouterr().out and (tmp_path / "empty" / made).is_file()
