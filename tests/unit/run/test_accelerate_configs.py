"""The shipped launch files are what accelerate itself reads, and name layers that exist."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from diffusers import models

FILES = sorted((Path(__file__).parents[3] / "configs/accelerate").glob("*.yaml"))


def test_there_is_one_for_each_case():
    assert {f.stem for f in FILES} == {
        "one-gpu",
        "ddp-8",
        "ddp-2x8",
        "fsdp2-8-sdxl-full",
        "fsdp2-8-flux-lora",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_accelerate_reads_it(file, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    words = ["--config_file", str(file), "-m", "inversion_dpo", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == config.num_processes
    assert arguments.use_fsdp == ("fsdp" in file.stem)
    if arguments.use_fsdp:
        assert int(arguments.fsdp_version) == 2


@pytest.mark.parametrize("file", [f for f in FILES if "fsdp" in f.stem], ids=lambda f: f.stem)
def test_the_layers_that_are_wrapped_exist(file):
    network = models.UNet2DConditionModel if "sdxl" in file.stem else models.FluxTransformer2DModel
    names = yaml.safe_load(file.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert set(names.split(",")) <= set(network._no_split_modules) | {"ResnetBlock2D"}
