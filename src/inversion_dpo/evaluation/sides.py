"""The two models that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from inversion_dpo.evaluation.prompt_sets import graphs_by_prompt
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.graph_model import is_encoder
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.folder import read_config


@dataclass(frozen=True)
class Side:
    """A model: what is loaded, and what is put on it.

    adapter: a LoRA (folder or .safetensors file), a scene-graph encoder's folder or a whole
    pipeline's; None: the model of the configuration as it is.
    """

    config: Config
    adapter: Path | None


def side(config: Config, model: str | None) -> Side:
    """What ``--policy`` or ``--reference`` means; ConfigError if it is nothing that can be sampled.

    Args:
        config: whose model a LoRA is put on, and whose settings both sides are sampled with.
        model: the folder of a run, of a LoRA or of a pipeline, a LoRA file, or a hub id; None: the
            configuration's own model.
    """
    if model is None:
        return Side(config, None)
    path = Path(model).expanduser()
    if (path / "config.yaml").is_file():
        if not (path / "adapter").is_dir():
            raise ConfigError(f"{path} is a run without a policy: train it first")
        return Side(replace(config, model=read_config(path).model), path / "adapter")
    weights = (path / "pytorch_lora_weights.safetensors", path / "model_index.json")
    if is_encoder(path):
        return Side(config, path)
    if any(file.is_file() for file in weights) or (path.suffix == ".safetensors" and path.exists()):
        return Side(config, path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"{model} is no model: give the folder of a run, of a LoRA or of a pipeline, a LoRA's "
            ".safetensors file, or a hub id OWNER/NAME"
        )
    return Side(
        replace(
            config, model=replace(config.model, path=model, revision=None, variant=None, lora=None)
        ),
        None,
    )


def graphs_for(config: Config, adapter: Path | None, prompts: list[str]) -> dict[str, SceneGraph]:
    """The scene graphs that the prompt set gives to these prompts, where a model takes any."""
    if not config.model.scene_graph and not (adapter is not None and is_encoder(adapter)):
        return {}
    return graphs_by_prompt(config.evaluation.prompts, set(prompts))
