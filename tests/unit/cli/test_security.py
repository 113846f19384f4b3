"""Malicious files are not run, paths do not lead out, secrets are not written down."""

from __future__ import annotations

import ast
import io
import logging
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import Dataset
from inversion_dpo.cli.main import Harmless, main
from inversion_dpo.data.images import DataError
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import load_pipeline
from inversion_dpo.run.config import PACKAGE, ConfigError, load_config, to_yaml
from inversion_dpo.run.fields import ModelConfig
from tests.pair_files import open_pairs

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
        load_pipeline(ModelConfig(str(folder)))
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


# ---- archives and links


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path: Path, prefix: str, **odd: Any) -> Path:
    """A shard of one pair whose members' names begin so; ``odd``: the loser is no plain file."""
    with tarfile.open(path, "w") as tar:
        for name, content in {"txt": b"a", "winner.png": png(9), "loser.png": png(5)}.items():
            info = tarfile.TarInfo(f"{prefix}1.{name}")
            info.size = len(content)
            if odd and name == "loser.png":
                info.size = 0
                for key, value in odd.items():
                    setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("prefix", ["../", "../../", "/tmp/", "a/../../", "C:\\"])
def test_names_in_a_tar_lead_nowhere(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are read into memory: a name is a key and nothing else, and no file is made."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    shard = tar_of(folder / "a.tar", prefix)
    written: list[Any] = []
    for name in ("extract", "extractall", "makefile", "makelink"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *a, **k: written.append(a))
    before = {p for p in tmp_path.rglob("*")}
    (pair,) = open_pairs(shard)
    assert (pair.caption, pair.winner, pair.loser) == ("a", png(9), png(5))
    assert not written and {p for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "odd",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"},
        {"type": tarfile.SYMTYPE, "linkname": "../../secret.png"},
        {"type": tarfile.SYMTYPE, "linkname": "1.winner.png"},
        {"type": tarfile.LNKTYPE, "linkname": "../secret.png"},
        {"type": tarfile.LNKTYPE, "linkname": "1.winner.png"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
        {"type": tarfile.FIFOTYPE},
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, odd: dict[str, Any]) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "data").mkdir()
    shard = tar_of(tmp_path / "data" / "a.tar", "", **odd)
    with pytest.raises(DataError, match="a.tar, row 0, loser: is a link or a device"):
        list(open_pairs(shard))
    with pytest.raises(DataError, match="1 skipped"):
        list(open_pairs(shard, on_bad_row="skip"))


def test_nothing_unpacks_an_archive() -> None:
    """Neither tar nor zip: there is nothing that could leave its folder."""
    names = {"extract", "extractall", "unpack_archive", "ZipFile", "zipfile"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            words = {getattr(node, key, None) for key in ("attr", "id", "name")}
            assert not words & names, f"{file}: {words & names}"


@pytest.mark.parametrize("kind", ["parquet", "tar", "csv", "dataset"])
def test_files_that_are_links_out_of_the_data_are_refused(tmp_path: Path, kind: str) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    row = {"jpg_0": [png(1)], "jpg_1": [png(2)], "label_0": [1.0], "caption": ["a"]}
    name = {"parquet": "a.parquet", "tar": "a.tar", "csv": "metadata.csv"}.get(kind)
    if kind == "parquet":
        Dataset.from_dict(row).to_parquet(outside / "a.parquet")
    elif kind == "tar":
        tar_of(outside / "a.tar", "")
    elif kind == "csv":
        (outside / "metadata.csv").write_text("file_name_winner,file_name_loser,caption\n")
    else:
        Dataset.from_dict(row).save_to_disk(folder)
        name = next(folder.glob("*.arrow")).name
        shutil.move(folder / name, outside / name)
    assert name
    (folder / name).symlink_to(outside / name)
    with pytest.raises(DataError, match="is a link out of"):
        list(open_pairs(folder))
    (folder / name).unlink()
    shutil.move(outside / name, folder / name)
    (tmp_path / "again").symlink_to(folder)  # the folder itself may be named by a link
    if kind != "csv":
        assert len(list(open_pairs(tmp_path / "again"))) == 1


def test_no_text_of_the_data_speaks_to_the_terminal(tmp_path: Path, capfd: Any) -> None:
    """Neither a prompt, nor a column's name, nor a file's name that is no UTF-8."""
    red, blue = b"red\xff.png", b"blue.png"
    for k, name in enumerate((red, blue)):
        Image.new("RGB", (8, 8), (200 * k, 0, 0)).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / os.fsdecode(name))
    for side, name in (("w", red), ("l", blue)):
        (tmp_path / side).mkdir()
        (tmp_path / os.fsdecode(name)).rename(tmp_path / side / os.fsdecode(red))
    (tmp_path / os.fsdecode(b"red\xff.txt")).write_text("a \x1b[31mstar")
    with pytest.raises(SystemExit):
        main(["pairs", "check", str(tmp_path)])
    assert 'prompt "a \\x1b[31mstar": w/red\\udcff.png over' in capfd.readouterr().out
    (tmp_path / "t.csv").write_text("a\x1b[31m,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["pairs", "check", str(tmp_path / "t.csv")])
    assert "other names than we know: a\\x1b[31m, b" in capfd.readouterr().err
    record = logging.LogRecord("x", logging.WARNING, "", 1, "a\x1b[31m\nb", None, None)
    assert Harmless("%(message)s").format(record) == "a\\x1b[31m\nb"
