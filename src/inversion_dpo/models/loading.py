"""Load a diffusers pipeline, from a folder or a hub id, and find its adapter."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors import safe_open

from inversion_dpo.data.buckets import Resolution, buckets, square
from inversion_dpo.data.buckets import named as named_size
from inversion_dpo.models.base import (
    DiffusionModel,
    ModelError,
    Use,
    frozen_parts,
    is_told_guidance,
    network_of,
)
from inversion_dpo.models.folders import (
    ENCODERS,
    LARGEST,
    NETWORKS,
    folder_fault,
    folder_of,
    index_of,
    variant_of,
)
from inversion_dpo.models.graph_encoder import SceneGraphEncoder, install, shape_for
from inversion_dpo.models.graph_model import SceneGraphModel, load_encoder
from inversion_dpo.models.intact import (
    check_channels,
    check_names,
    check_values,
    check_vocabularies,
    check_whole,
)
from inversion_dpo.models.likeness import misread_text
from inversion_dpo.models.lora import add_lora, lora_file, merge_lora, warn_of_start
from inversion_dpo.models.one_file import configuration_of, encoders_in, load_single_file
from inversion_dpo.models.parts import (
    check_encoders,
    check_lora,
    check_place,
    given_parts,
    kind_of,
    load_part,
    named,
    skeleton,
)
from inversion_dpo.models.quantized import quantize
from inversion_dpo.models.schedules import few_steps
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.folder import going_on

logger = logging.getLogger(__name__)
FAMILIES = {  # of diffusers' pipelines: file in this folder, and class
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "FluxKontextPipeline": ("flux", "Flux"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "Flux2KleinPipeline": ("flux_2", "Flux2"),
    "Flux2Pipeline": ("flux_2", "Flux2"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "QwenImageEditPipeline": ("qwen_image", "QwenImage"),
    "QwenImageEditPlusPipeline": ("qwen_image", "QwenImage"),
    "ChromaPipeline": ("chroma", "Chroma"),
    "Krea2Pipeline": ("krea_2", "Krea2"),
    "WanPipeline": ("wan", "Wan"),
    "SanaPipeline": ("sana", "Sana"),
    "Lumina2Pipeline": ("lumina_2", "Lumina2"),
}
TRUSTED = (
    "a file says not whose latents it makes, and is taken for this model's autoencoder. Its folder "
    "or hub id would be compared"
)
DISTILLED = re.compile(  # in names
    "turbo|lightning|schnell|sprint|flash|distill|consistency|causvid|lightx2v|fastwan|hyper-?sd"
    "|hyper-?flux|(?<![a-z])(lcm|tcd|pcm|dmd2?)(?![a-z])"
    r"|(?<![\dv.])[1248][-_]?steps?(?![a-z]|[-_]?\d)",
    re.IGNORECASE,
)


def load_pipeline(m: ModelConfig, device: torch.device | None = None) -> Any:
    """Load a diffusers pipeline, safetensors only, with its LoRA merged and its graph encoder.

    A safety checker stays where it is: it would replace pictures that are measured or paired.

    Args:
        m: a hub id in it is looked up in the local hub cache when offline.
        device: where the pipeline goes, the CPU by default.

    Raises:
        ModelError: says what cannot be loaded, and what to do.
    """
    path = os.path.expanduser(resolve(m.path))
    how: dict[str, Any] = {"use_safetensors": True, "torch_dtype": getattr(torch, m.dtype)}
    single = Path(path).is_file()
    with named("model.path", m.path):
        check_place(path)
        source = configuration_of(path, m.config) if single else path
        index = index_of(source, None if single else m.revision)
        family_of(str(index.get("_class_name")))
        parts = given_parts(source, index, m)
    if m.t5 and index.get(LARGEST[0], [""])[0] is None:
        logger.warning("%s has no T5 (%s): CLIP alone reads its prompts", m.path, LARGEST[0])
    if single and not m.config:
        logger.warning("model.config is not set: %s is built as %s", m.path, source)
    if single and not m.network and kind_of(path) == "network":
        return load_pipeline(replace(m, path=source, network=m.path, config=None), device)
    network = next((n for n in NETWORKS if n in index), "")
    for key, part, name in (("vae", "vae", m.vae), ("network", network, m.network)):
        if name:
            with named(f"model.{key}", name):
                parts[part] = load_part(name, part, source, m)
                if part == "vae" and Path(name).expanduser().is_file():
                    logger.info("model.vae=%s: %s", name, TRUSTED)
    with named("model.path", m.path):
        if single:
            pipeline = load_single_file(path, source, index, how | parts)
        else:
            pipeline = _from_pretrained(path, m, how | parts)
            folder = folder_of(path, m.revision)
            for text in check_names(pipeline, folder, parts):
                logger.warning(text)
            check_encoders(pipeline, folder, m.variant)
        check_vocabularies(pipeline, folder_of(source, None if single else m.revision))
    if m.lora:
        with named("model.lora", m.lora):
            add_lora(pipeline, m.lora)
            merge_lora(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    _make_small(pipeline, network, m)
    with named("model.path", m.path):
        for loaded in frozen_parts(pipeline).values():
            check_whole(loaded)
        pipeline.to(device)
        check_values(pipeline)
    if device is not None and device.type == "cuda":
        channels_last(pipeline)
    if m.scene_graph:
        install(pipeline, load_encoder(m.scene_graph), m.prompt_chunks)
    return pipeline


def _from_pretrained(path: str, m: ModelConfig, how: dict[str, Any]) -> Any:
    """Load a pipeline's folder or hub id; one that is there in fp16 alone, in fp16."""
    # DiffusionPipeline passes over a given part that its pipeline could do without, as Wan's
    folder, kind = Path(path), getattr(diffusers, index_of(path, m.revision)["_class_name"])
    how |= {"revision": m.revision}
    variant = variant_of(folder, m.variant) if folder.is_dir() else m.variant
    try:
        return kind.from_pretrained(path, variant=variant, **how)
    except OSError as error:
        if variant or folder.is_dir():
            raise
        try:
            return kind.from_pretrained(path, variant="fp16", **how)
        except OSError:
            raise error from None


def _make_small(pipeline: Any, network: str, m: ModelConfig) -> None:
    """Hold the network and the text encoders in few bits or in main memory, as the settings say."""
    rows = dict.fromkeys(ENCODERS, ("quantize_text", m.quantize_text))
    rows[network] = "quantize", m.quantize
    for part, (setting, bits) in rows.items():
        if (bits or m.offload) and (module := getattr(pipeline, part, None)) is not None:
            quantize(module, bits, setting if bits else "offload", m.offload)


def channels_last(pipeline: Any) -> None:
    """Lay out convolutions' weights as a GPU's kernels read them; no number changes."""
    for part in frozen_parts(pipeline).values():
        if max((p.ndim for p in part.parameters()), default=0) == 4:  # those of video have 5
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_model(m: ModelConfig) -> DiffusionModel:
    """Look for the model and its parts, and return it without weights.

    Raises:
        ModelError: a part is missing or damaged, or a setting does not fit; it names the setting.
    """
    path = os.path.expanduser(resolve(m.path))
    with named("model.path", m.path):
        check_place(path)
        single = Path(path).is_file()
        source = configuration_of(path, m.config) if single else path
        index = index_of(source, m.revision)
        family_of(str(index.get("_class_name")))
        network = next((n for n in NETWORKS if n in index), "")
        given = ["vae"] * bool(m.vae) + [*NETWORKS] * bool(m.network)
        if fault := folder_fault(Path(path), given + [*LARGEST] * (not m.t5)):
            raise ModelError(fault)
        held = (network, "vae") if single and kind_of(path) == "pipeline" else (network,)
        for part in {*held}.difference(given) if single else ():
            load_part(m.path, part, source, m, read=False)
        if single and "vae" in held:
            encoders_in(path, source, index, torch.float32, read=False)
    if m.revision and Path(path).exists():
        raise ModelError(
            f"model.revision={m.revision} has no effect: {m.path} is not on the hub. Leave it out"
        )
    if m.variant and Path(path).exists() and variant_of(Path(path), m.variant) != m.variant:
        raise ModelError(
            f"model.variant={m.variant} has no effect: {m.path} has no such files. Leave it out"
        )
    for key, part in (("vae", "vae"), ("network", network), ("scene_graph", "")):
        if name := getattr(m, key):
            with named(f"model.{key}", name):
                check_place(os.path.expanduser(name))
                place = Path(name).expanduser()
                configs = [place / name / "config.json" for name in ("", key, *NETWORKS)]
                if part and place.is_dir() and not any(file.is_file() for file in configs):
                    raise ModelError("the folder has no config.json: give that of a network")
                if part:
                    load_part(name, part, source, m, read=False)
    if m.lora:
        check_lora(m, m.lora, "model.lora")
        warn_of_start(m, lora_file(m.lora))
    _warn_of_runs(m)
    pipeline = skeleton(m)
    with named("model.path", m.path):
        if Path(path).is_dir():
            check_names(pipeline, Path(path), given)
            check_encoders(pipeline, Path(path), m.variant)
        if Path(source).is_dir():
            check_vocabularies(pipeline, Path(source))
    return adapted(pipeline, m)


def _warn_of_runs(m: ModelConfig) -> None:
    """Warn of a run's policy, also a merged one, from before its training was continued."""
    for name in filter(None, (m.path, m.network, m.lora)):
        place = Path(resolve(name)).expanduser().absolute()
        run = next((p for p in place.parents[:2] if (p / "config.yaml").is_file()), place)
        ends = place.relative_to(run).parts[:1] in (("adapter",), ("merged",))
        if ends and (text := going_on(run)):
            logger.warning(text)


def adapted(pipeline: Any, m: ModelConfig) -> DiffusionModel:
    """Do :func:`adapt` by the settings; ModelError also for one that its family does not take."""
    model = adapt(pipeline, m.resolution, m.guidance_embed, m.prompt_chunks)
    for key in _idle(model):
        if (value := getattr(m, key)) != getattr(ModelConfig(), key):
            raise ModelError(
                f"model.{key}={value} has no effect with {type(pipeline).__name__}: leave it out"
            )
    return model


def _idle(model: DiffusionModel) -> list[str]:
    """List the settings that a family does not take."""
    used = {
        "t5": hasattr(model.pipeline, "text_encoder_3"),
        "guidance_embed": is_told_guidance(model),
        "prompt_chunks": model.chunked,
    }
    return [key for key, does in used.items() if not does]


def fitted(m: ModelConfig, base: ModelConfig) -> ModelConfig:
    """Leave out of a whole pipeline's settings those that only the base's family takes.

    Args:
        m: the settings of the base, with another pipeline's path.
        base: the model that these settings were written for.

    Raises:
        ModelError: a configuration cannot be read, or the family is not supported.
    """
    with named("model.path", m.path):
        model = adapt(skeleton(m), m.resolution)
    idle = _idle(model)
    if m.vae and type(model.pipeline) is not type(skeleton(base)):
        idle.append("vae")
    return replace(m, **{key: getattr(ModelConfig(), key) for key in idle})


def load_model(config: Config, device: torch.device) -> DiffusionModel:
    """Load the configured pipeline as the frozen model; weights to be trained are in float32.

    With ``policy.kind=scene_graph`` and no ``model.scene_graph`` a new encoder is installed, which
    is what will be trained.
    """
    m, p = config.model, config.policy
    pipeline = load_pipeline(m, device)
    if p.kind == "scene_graph" and not m.scene_graph:
        shape = shape_for(pipeline, p.graph_tokens, p.graph_width, p.graph_layers)
        install(pipeline, SceneGraphEncoder(shape, config.training.seed), m.prompt_chunks)
    model = adapted(pipeline, m)
    if any(side % model.multiple for size in buckets(m.resolution) for side in size):
        raise ModelError(
            f"model.resolution={m.resolution} makes sizes that are no multiples of "
            f"{model.multiple} pixels, as this pipeline needs them: set a multiple of "
            f"{16 * model.multiple}, or one size, such as {named_size(square(m.resolution))}"
        )
    if p.kind == "full":
        network_of(model).float()
    if text := misread_text(model, square(m.resolution)):
        logger.warning(text)
    return model


def few_steps_text(model: DiffusionModel, m: ModelConfig) -> str | None:
    """Say that a model seems to be distilled to few steps, and why."""
    scheduler = model.pipeline.scheduler
    why = model.distilled or few_steps(scheduler) or name_of_few_steps(m) or _lora_of_few_steps(m)
    if not why:
        return None
    return (
        f"{Path(m.path).name} seems to be distilled to few steps ({why}): training undoes that, "
        "and pairs are inverted inexactly. Train its base model"
    )


def _lora_of_few_steps(m: ModelConfig) -> str | None:
    """Tell from the header that kohya's programs write that a LoRA's base was of few steps."""
    if not m.lora:
        return None
    with safe_open(lora_file(m.lora), "pt") as opened:
        base = (opened.metadata() or {}).get("ss_sd_model_name", "")
    return f"model.lora was trained on {base}" if DISTILLED.search(base) else None


def name_of_few_steps(m: ModelConfig) -> str | None:
    """Tell from the names of the model, its network and its LoRA that it is of few steps."""
    for key, given in (("path", m.path), ("network", m.network), ("lora", m.lora)):
        *above, name = Path(given or "-").parts
        names = [name, *(n for n in above if n.startswith("models--"))]  # in the hub's cache
        names += above[-1:] if name in NETWORKS else []
        if any(DISTILLED.search(n) for n in names):
            return f"so says the name in model.{key}"
    return None


def family_of(pipeline: type | str) -> tuple[str, str]:
    """Find a pipeline's row of :data:`FAMILIES`, by its class or by the name of that.

    Raises:
        ModelError: it has none.
    """
    kind = getattr(diffusers, pipeline, None) if isinstance(pipeline, str) else pipeline
    for above in getattr(kind, "__mro__", ()):
        if above.__name__ in FAMILIES:
            return FAMILIES[above.__name__]
    name = str(getattr(kind, "__name__", pipeline))
    base = " It is distilled to few steps: train its base model" if DISTILLED.search(name) else ""
    raise ModelError(f"{name} is not supported; supported: {', '.join(FAMILIES)}.{base}")


def adapt(
    pipeline: Any, resolution: Resolution, guidance_embed: float = 1.0, prompt_chunks: int = 1
) -> DiffusionModel:
    """Freeze the pipeline and return its family's adapter, with its scene-graph encoder if any.

    Args:
        pipeline: as loaded.
        resolution: side of the images in pixels, or WIDTHxHEIGHT.
        guidance_embed: the guidance that FLUX.1-dev's network gets as an input.
        prompt_chunks: of 75 tokens, see :mod:`.prompts`; one where the family has T5.

    Raises:
        ModelError: another family, or a setting that this family does not take.
    """
    for part in frozen_parts(pipeline).values():
        part.requires_grad_(False).eval()
    file, name = family_of(type(pipeline))
    family = getattr(import_module(f"inversion_dpo.models.{file}"), name)
    use = Use(square(resolution), guidance_embed, prompt_chunks)
    check_channels(getattr(pipeline, family.component), pipeline.vae)
    model: DiffusionModel = family(pipeline, use)
    if any(side % model.multiple for side in use.size):
        raise ModelError(
            f"model.resolution={resolution} must be a multiple of {model.multiple} for this "
            "pipeline"
        )
    if prompt_chunks > 1 and not model.chunked:
        raise ModelError(
            f"model.prompt_chunks={prompt_chunks} is for Stable Diffusion 1, 2 and XL; "
            f"{type(pipeline).__name__} reads long prompts at once: set model.prompt_chunks=1"
        )
    encoder = getattr(pipeline, "scene_graph", None)
    return model if encoder is None else cast(DiffusionModel, SceneGraphModel(model, encoder))
