"""Find and load the two models that an evaluation compares."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from inversion_dpo.data.annotations import is_annotated
from inversion_dpo.data.buckets import Resolution, buckets, nearest, square
from inversion_dpo.data.images import decode_image, picture_size
from inversion_dpo.data.transforms import Size
from inversion_dpo.evaluation.prompt_sets import (
    PromptSet,
    graph_of_prompt,
    intended_graphs,
    read_prompt_set,
)
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.base import sketch_of
from inversion_dpo.models.folders import LARGEST, folder_fault, variant_of
from inversion_dpo.models.graph_model import is_encoder
from inversion_dpo.models.loading import fitted, load_pipeline
from inversion_dpo.models.lora import add_lora, lora_file, warn_of_start
from inversion_dpo.models.parts import HUB, check_lora, kind_of, named
from inversion_dpo.models.sampler import Sampler, no_graph
from inversion_dpo.run.config import Config, ConfigError, resolve
from inversion_dpo.run.disk import read_json, sha256_of
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.folder import REFERENCE, read_config, run_file
from inversion_dpo.run.processes import current_team

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """A model, and what is put on it.

    adapter: a LoRA (folder or .safetensors file) or a scene-graph encoder's folder; None for the
    configuration's model as it is.
    """

    config: Config
    adapter: Path | None


def side(config: Config, model: str | None) -> Side:
    """Resolve ``--policy`` or ``--reference`` to a model that can be sampled.

    Args:
        config: its model carries a LoRA that is given, and its settings sample both sides. A
            network or a pipeline that is given stands for itself, without ``model.lora``.
        model: the folder of a run, a LoRA or a pipeline, a LoRA file, or a hub id; None for the
            configuration's own model.

    Raises:
        ConfigError: the value is none of these, or a run without a policy.
    """
    if model is None:
        return Side(config, None)
    path = Path(model).expanduser()
    if (path / "config.yaml").is_file():
        adapter = adapter_of(path, ", or name one with --policy")
        return side(replace(config, model=read_config(path).model), str(adapter))
    if is_encoder(path):
        return Side(config, path)
    m, kind = config.model, None
    if path.exists() or HUB.fullmatch(model):
        with named("model", model):
            kind = kind_of(model)
    if kind == "lora":
        check_lora(m, model, "LoRA")
        adapter = path if path.exists() else lora_file(model)
        refuse_twice(m, adapter)
        warn_of_start(m, lora_file(str(adapter)))
        return Side(config, adapter)
    if kind == "network":
        return Side(replace(config, model=replace(m, network=model, lora=None)), None)
    if kind is None:
        raise ConfigError(
            f"{model} is no model: give the folder of a run, a LoRA or a pipeline, a .safetensors "
            "file, or a hub id OWNER/NAME"
        )
    if path.is_dir():
        if fault := folder_fault(path, () if m.t5 else LARGEST):
            raise ConfigError(f"{model}: {fault}")
        other = in_folder(m, path)
    else:
        source = m.config or (None if Path(m.path).is_file() else m.path)
        other = replace(m, path=model, revision=None, variant=None, lora=None, network=None)
        other = replace(other, config=source if path.is_file() else None)
    return Side(replace(config, model=fitted(other, m)), None)


def adapter_of(run: Path, remedy: str = "") -> Path:
    """Find the policy in a run's folder; ConfigError if there is none, or no run."""
    if (run / "adapter").is_dir():
        return run / "adapter"
    run_file(run)
    raise ConfigError(f"{run} is a run without a policy: train it first{remedy}")


def refuse_twice(m: ModelConfig, adapter: Path) -> None:
    """Refuse to put a LoRA on a model that has it already; ConfigError names ``model.lora``."""
    if not m.lora:
        return
    with named("model.lora", m.lora):
        same = sha256_of(lora_file(m.lora)) == sha256_of(lora_file(str(adapter)))
    if same:
        raise ConfigError(
            f"{adapter} is the LoRA of model.lora={m.lora}, which the model has already: it would "
            "be added twice. Give another, or set model.lora=null"
        )


def in_folder(m: ModelConfig, folder: Path) -> ModelConfig:
    """Name a whole pipeline's folder, with the rest of the settings, in place of a model."""
    variant = variant_of(folder, m.variant)
    alone = replace(m, path=str(folder), revision=None, variant=variant, config=None)
    return replace(alone, vae=None, lora=None, network=None)


def graphs_for(config: Config, adapter: Path | None, prompts: list[str]) -> dict[str, SceneGraph]:
    """Map prompts to the scene graphs of the prompt set, if the model takes scene graphs.

    Args:
        config: the model's settings.
        adapter: of the policy, if there is one.
        prompts: that are sampled.
    """
    if not config.model.scene_graph and not (adapter is not None and is_encoder(adapter)):
        return {}
    graphs = intended_graphs(read_prompt_set(config.evaluation.prompts, None), no_graph)
    return {p: replace(graph, caption=p) for p, graph in graphs.items() if p in set(prompts)}


def sizes_for(config: Config, prompts: Sequence[str]) -> list[Size]:
    """List the size of each prompt's images in the evaluation, see :func:`sizes_in`."""
    return sizes_in(details_of(config.evaluation.prompts), prompts, config.model.resolution)


def sizes_in(asked: PromptSet, prompts: Sequence[str], resolution: Resolution) -> list[Size]:
    """List the size of each prompt's images: the set's own, near its source's, or the model's."""
    own, sources = asked.size_of, asked.source_of

    def usual(prompt: str) -> Size:
        if (file := sources.get(prompt)) is None:
            return square(resolution)
        return nearest(buckets(resolution), picture_size(file.read_bytes(), str(file)))

    return [own.get(prompt) or usual(prompt) for prompt in prompts]


def sources_for(config: Config, prompts: Sequence[str]) -> list[Path | None]:
    """List the file of the image that each prompt edits, where the prompt set gives one."""
    own = details_of(config.evaluation.prompts).source_of
    return [own.get(prompt) for prompt in prompts]


def opened(file: Path | None) -> Image.Image | None:
    """Decode an image to be edited, if there is one; DataError if it cannot be read."""
    return decode_image(file.read_bytes(), str(file)) if file else None


def details_of(prompts: str) -> PromptSet:
    """Read a prompt set if it is a file that says more than prompts; else it is empty."""
    source = Path(resolve(prompts))
    more = source.suffix.lower() in (".jsonl", ".parquet") and source.is_file()
    if more and not is_annotated(source):
        return read_prompt_set(prompts, None)
    return PromptSet([], [], [])


def sampler_of(config: Config, adapter: Path | None) -> Sampler:
    """Load a model and its adapter, ready to sample as the configuration says."""
    return Sampler(load_policy_pipeline(config, adapter), config, graph_of_prompt)


def warn_of_base(m: ModelConfig, adapter: Path, pipeline: Any) -> None:
    """Warn if a run's policy is put on other weights than it was trained on.

    Args:
        m: the base's settings; where they are not the run's own, other weights are meant.
        adapter: of the policy, in the folder of its run or elsewhere.
        pipeline: the base as it is now.
    """
    near = adapter.absolute().parents[:2]  # the second of a snapshot, or of a file in adapter/
    run = next((p for p in near if (p / REFERENCE).is_file()), None)
    if run is None or not (run / "config.yaml").is_file() or read_config(run).model != m:
        return
    if read_json(run / REFERENCE).get("weights") != sketch_of(pipeline):
        logger.warning(
            "%s was trained on other weights than %s has now, so that its images and scores are of "
            "another model. Restore the weights of the training (on the hub: model.revision), or "
            "train again",
            adapter,
            m.path,
        )


def load_policy_pipeline(config: Config, adapter: Path | None) -> Any:
    """Load the pipeline as users do: the base and a LoRA or graph encoder, or a full folder."""
    m, device = config.model, current_team().device
    if adapter is None:
        return load_pipeline(m, device)
    if (adapter / "model_index.json").exists():
        return load_pipeline(in_folder(m, adapter), device)
    if is_encoder(adapter):
        pipeline = load_pipeline(replace(m, scene_graph=str(adapter)), device)
        warn_of_base(m, adapter, pipeline)
        return pipeline
    refuse_twice(m, adapter)
    pipeline = load_pipeline(m, device)
    warn_of_base(m, adapter, pipeline)
    with named("policy", str(adapter)):
        add_lora(pipeline, str(adapter))
    return pipeline
