"""Malicious files are not run, paths do not lead out, secrets are not written down."""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from inversion_dpo.cli import main
from inversion_dpo.config import ConfigError, load_config, to_yaml
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import load_pipeline

SECRETS = {"HF_TOKEN": "hf_SECRETSECRETSECRET", "WANDB_API_KEY": "wandb5ecret5ecret5ecret"}


class Mine:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_the_malicious_file_would_bite(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Mine(tmp_path / "hit")))
    assert (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickled_weights_file_is_not_opened(
    tiny_pipeline: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    """In place of safetensors, as torch.save writes them: a zip of a pickle, or a bare one."""
    folder, hit = tmp_path / "pipeline", tmp_path / "hit"
    shutil.copytree(tiny_pipeline, folder)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    payload = pickle.dumps(Mine(hit))
    if zipped:
        with zipfile.ZipFile(folder / "unet" / name, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3")
    else:
        (folder / "unet" / name).write_bytes(payload)
    with pytest.raises(ModelError, match="safetensors"):
        load_pipeline(str(folder))
    assert not hit.exists()


def test_secrets_of_the_environment_stay_out_of_the_run(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config("training.steps=1")))
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit):
        main(["train", "-c", str(preset), "-o", str(tmp_path / "run")])
    printed = capsys.readouterr()
    texts = [caplog.text, printed.out, printed.err]
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    texts += [p.read_bytes().decode("latin-1") for p in files]
    assert len(texts) > 6
    for value in SECRETS.values():
        assert not any(value in text for text in texts)


def test_a_configuration_cannot_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OmegaConf's own ``${oc.env:NAME}`` would copy a token into config.yaml."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    preset = tmp_path / "run.yaml"
    preset.write_text("model:\n  path: ${oc.env:HF_TOKEN}\n")
    with pytest.raises(ConfigError, match="interpolation"):
        load_config(str(preset), [])
    with pytest.raises(ConfigError, match="interpolation"):
        load_config(None, ["model.path=${oc.env:HF_TOKEN}"])
