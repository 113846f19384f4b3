"""What the trainer asks of a model family: one small protocol."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from inversion_dpo.data.transforms import Framing as Framing
from inversion_dpo.data.transforms import Size
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.maths.schedule import Schedule

Condition = dict[str, Tensor]  # every tensor has the batch as its first axis
GRAPH_KEYS = ("graph_rows", "graph_links")  # of a condition: the scene graph's
ALONE = "alone_"  # before a name in a condition: what takes its place without the prompt

OVERFLOW = (
    "values that are not finite. Set model.dtype=float32 or bfloat16, or another model.vae: SDXL's "
    "own autoencoder overflows in float16"
)


class ModelError(ValueError):
    """A model that cannot be loaded or is of no supported family; names the remedy."""


@dataclass(frozen=True)
class Use:
    """The settings of ``model`` that a family may depend on.

    size: (height, width) of the images in pixels, which flow models shift their schedule by.
    guidance_embed: guidance that a distilled network gets as an input.
    prompt_chunks: chunks of 75 tokens that CLIP reads of a prompt.
    """

    size: Size
    guidance_embed: float = 1.0
    prompt_chunks: int = 1


class DiffusionModel(Protocol):
    """A frozen pipeline with the network that is to be trained: all that is peculiar to a family.

    A family is a class ``Family(pipeline, use)`` in one file of this folder, and its row in
    :data:`.loading.FAMILIES`. Images are float [B, 3, H, W] in [-1, 1]; latents (B, *) are scaled
    as the network sees them.
    """

    schedule: Schedule  # at the configured size
    pipeline: Any  # the diffusers pipeline
    component: str  # the name in the pipeline of the network that is trained: unet, transformer
    targets: Sequence[str]  # layers that get a LoRA if policy.target_modules names none
    unreached: str | None  # pattern of module names that the output does not depend on
    multiple: int  # the side of an image in pixels is a multiple of it
    chunked: bool  # takes model.prompt_chunks
    # never, may or must: whether a source, the image to be edited, is in the condition; or reads:
    # it must, and the text encoder reads it too, so that the condition is of prompt and source
    edits: str
    reads: Mapping[str, int]  # tokens that each tokenizer reads of a prompt, marks left out
    distilled: str | None  # why it seems distilled to few steps, which training would undo

    def schedule_at(self, size: Size) -> Schedule:
        """Return the schedule at (height, width) in pixels, which is one for most families."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images to latents (B, *), float32, deterministically."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images, with the inverse of :meth:`encode`'s scaling."""

    def condition(
        self,
        prompts: list[str],
        graphs: Sequence[SceneGraph | None] | None = None,
        sources: Sequence[Image.Image] = (),
    ) -> Condition:
        """Encode prompts to what the network is conditioned on, [B, ...] each.

        Where a family's text has no fixed length, the second axis ends with the longest prompt.
        Only where an encoder of scene graphs is installed, ``graphs`` has one for each prompt, or
        None for the empty one. Only where the text encoder reads a source, ``sources`` has one for
        each prompt, at its size.
        """

    def empty(self) -> Condition:
        """Encode no prompt, [1, ...] each: what guidance leads away from."""

    def source_size(self, size: Size) -> Size:
        """Return the size of a source for images of a size; only where the family edits."""

    def edit(self, source: Image.Image) -> dict[str, Any]:
        """Name the pipeline's arguments for a source of that size; only where the family edits."""

    def framing(self, framings: list[Framing]) -> Condition:
        """Encode what the network is told of the images, [B, ...] each; often nothing."""

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict (B, *) in float32: eps, v or a velocity, see schedule.kind.

        Args:
            network: the policy's or the reference's, of the component's class.
            x_t: noisy latents (B, *).
            timesteps: [B], as the schedule has them.
            condition: of the prompts and the images' framing, [B, ...] each; and the latents
                ``source`` (B, *) of the images to be edited, if there are any.
        """

    def combine(self, p_u: Tensor, p_c: Tensor, scale: float) -> Tensor:
        """Guide (B, *), as the family's pipeline does.

        Args:
            p_u: prediction (B, *) without the prompt.
            p_c: prediction (B, *) with it.
            scale: 1 is no guidance.
        """

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Name the pipeline's arguments for so many prompts under guidance ``scale``."""


def empty_prompt(model: DiffusionModel) -> Condition:
    """Encode the empty prompt as any other, zeros where the pipeline says so."""
    return model.condition([""])


def same_schedule(model: DiffusionModel, size: Size) -> Schedule:
    """Return the one schedule of a model, whatever the size."""
    return model.schedule


def no_framing(framings: list[Framing]) -> Condition:
    """Say nothing of the images: most models are not told their size."""
    return {}


def plain_guidance(p_u: Tensor, p_c: Tensor, scale: float) -> Tensor:
    """Compute p_u + scale (p_c - p_u) (Ho & Salimans, 2022, https://arxiv.org/abs/2207.12598).

    Args:
        p_u: prediction (B, *) without the prompt.
        p_c: prediction (B, *) with it.
        scale: 1 is no guidance.
    """
    return p_u + scale * (p_c - p_u)


def plain_call(scale: float, prompts: int) -> dict[str, Any]:
    """Name the guidance as most pipelines do."""
    return {"guidance_scale": scale}


@dataclass(frozen=True)
class Guidance:
    """How far predictions are led away from those of no prompt; scale 1 is no guidance.

    combine: see :meth:`DiffusionModel.combine`. empty: see :meth:`DiffusionModel.empty`.
    """

    scale: float
    empty: Condition
    combine: Callable[[Tensor, Tensor, float], Tensor] = plain_guidance


def guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    guidance: Guidance,
) -> Tensor:
    """Predict under classifier-free guidance, in one pass of twice the batch.

    At scale 1 it is p_c alone, of the batch.

    Args:
        predict: of a model with its network, see :meth:`DiffusionModel.predict`.
        x_t: noisy latents (B, *).
        timesteps: [B].
        condition: of the prompts, [B, ...] each.
        guidance: its scale, its empty prompt and its formula.

    Returns:
        The prediction (B, *).
    """
    if guidance.scale == 1:
        return predict(x_t, timesteps, condition)
    alone = without_prompt(condition, guidance.empty)
    both = {k: joined([alone[k], v]) for k, v in condition.items()}
    p = predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both)
    p_u, p_c = p.chunk(2)
    return guidance.combine(p_u, p_c, guidance.scale)


def without_prompt(condition: Condition, empty: Condition) -> Condition:
    """Replace the condition [B, ...] by the empty prompt's, [1, ...], or by its own ``alone_*``.

    What neither has, the images' framing and their source, stays.
    """
    return {
        k: empty[k].to(v).expand(len(v), *empty[k].shape[1:])
        if k in empty
        else condition.get(ALONE + k, v)
        for k, v in condition.items()
    }


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors [*, L, ...] of perhaps several lengths L: the shorter end in zeros.

    Families without a fixed length of text take zeros, or have a mask that is zero there.
    """
    if len({p.shape[1:2] for p in parts}) > 1:
        most = max(p.shape[1] for p in parts)
        parts = [
            torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in parts
        ]
    return torch.cat(list(parts))


def network_of(model: DiffusionModel) -> nn.Module:
    """Find the network that is trained."""
    network: nn.Module = getattr(model.pipeline, model.component)
    return network


def is_told_guidance(model: DiffusionModel) -> bool:
    """Say whether guidance is an input of the network, as of FLUX.1 and FLUX.2 dev."""
    return bool(getattr(network_of(model).config, "guidance_embeds", False))


def frozen_parts(pipeline: Any) -> dict[str, nn.Module]:
    """List every network of a pipeline by name."""
    return {n: m for n, m in sorted(pipeline.components.items()) if isinstance(m, nn.Module)}


def identity(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over every weight and every module's configuration: what trajectories depend on."""
    digest = hashlib.sha256()
    for module in modules:
        about = getattr(module, "config", {})
        config = about.to_dict() if hasattr(about, "to_dict") else dict(about)
        about_file = {"transformers_version"} | {
            k for k in config if k.startswith("_")
        }  # by whom, where
        settings = {k: v for k, v in config.items() if k not in about_file}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sketch_of(pipeline: Any) -> str:
    """SHA-256 over some numbers of every weight: it tells other weights in a moment, not all.

    Names, shapes and up to 64 evenly spaced values of each tensor count.
    """
    digest = hashlib.sha256()
    for part, module in frozen_parts(pipeline).items():
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            some = flat[:: max(1, math.ceil(len(flat) / 64))].double().cpu().tolist()
            key = name.replace("_orig_mod.", "")  # of a compiled block
            digest.update(f"{part} {key} {tuple(tensor.shape)} {some}".encode())
    return digest.hexdigest()[:16]


def identity_of(pipeline: Any) -> str:
    """SHA-256 over all that a pipeline's latents, conditions and predictions depend on.

    Besides its networks these are its tokenizers and its own switches and numbers, such as SDXL's
    ``force_zeros_for_empty_prompt`` and Wan's ``boundary_ratio``.
    """
    config = getattr(pipeline, "config", {})
    switches = {k: v for k, v in config.items() if isinstance(v, int | float)}  # bool is an int
    switches.pop("requires_safety_checker", None)  # of images that are shown
    parts = [identity(frozen_parts(pipeline).values()), switches]
    for name, part in sorted(pipeline.components.items()):
        words = getattr(part, "tokenizer", part)  # a processor holds one
        if hasattr(words, "get_vocab"):
            parts.append([name, *how_it_splits(words)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def how_it_splits(tokenizer: Any) -> list[Any]:
    """Say all by which a tokenizer turns a text into numbers."""
    rules = tokenizer.get_vocab()
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            rules.pop(of_the_last_call, None)
    named = ("model_max_length", "padding_side", "special_tokens_map", "chat_template")
    return [rules, *(str(getattr(tokenizer, n, None)) for n in named)]
