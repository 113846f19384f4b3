"""Train the embedded pipeline from scratch: ``python -m tools.embedded.pretrain``.

Four stages, each resumable from its last checkpoint: the autoencoder; the text encoder, which
learns to read a caption's objects and their whereabouts, as CLIP's is trained before the
diffusion model; the denoiser with both frozen (v-prediction, Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512); then ``publish``, which writes a plain diffusers
``StableDiffusionPipeline`` folder.
Every step draws its randomness from (seed, stage, step), so a resumed run repeats nothing.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from inversion_dpo.run.disk import atomic_save
from inversion_dpo.world.captions import COLOURS, RELATIONS, SHAPES, SIZES
from inversion_dpo.world.drawing import Scene
from inversion_dpo.world.scene_prompts import scenes
from tools.embedded.architecture import (
    SCHEDULER,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenize,
)
from tools.embedded.painting import render
from tools.stages import Checkpointed, Log, loop, publish, v_error, workshop_parser


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images -> float [B, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_batches(batch: int, seed: int, start: int) -> Iterator[Tensor]:
    """Fresh renders for each step from ``start`` on."""
    for step in itertools.count(start):
        stream = scenes("train", seed + 7919 * (step + 1))
        yield to_pixels([render(s) for s in itertools.islice(stream, batch)])


def train_vae(out: Path, steps: int, batch: int, seed: int, log: Log) -> AutoencoderKL:
    """Reconstruction (MSE + 0.1 L1) with a weak KL term; returns the averaged model."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    state = Checkpointed({"vae": vae}, out / "vae.safetensors", lr=2e-3, ema=0.995)
    batches = scene_batches(batch, seed, state.step)

    def loss_at(step: int) -> Tensor:
        x = next(batches).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (y - x).square().mean() + 0.1 * (y - x).abs().mean() + 2e-4 * kl

    loop(state, steps, 2e-3, loss_at, log)
    state.load_ema()
    return vae.eval()


@torch.no_grad()
def latent_dataset(
    out: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int, log: Log
) -> tuple[Tensor, Tensor]:
    """Latents [count, 8, 8, 8] of unit variance and token ids [count, 32]; kept on disk."""
    path = out / "latents.safetensors"
    if not path.exists():
        latents, captions, stream = [], [], scenes("train", seed)
        for done in range(0, count, 256):
            chunk = list(itertools.islice(stream, min(256, count - done)))
            captions += [s.graph.caption for s in chunk]
            latents.append(vae.encode(to_pixels([render(s) for s in chunk])).latent_dist.mean)
            if done % 25600 == 0:
                log(f"latents {done}/{count}")
        z = torch.cat(latents).contiguous()
        vae.register_to_config(scaling_factor=1.0 / z.std().item())
        ids = tokenize(tokenizer, captions).to(torch.int16)
        atomic_save({"z": z, "ids": ids}, path)
    tensors = load_file(path)
    scale = 1.0 / tensors["z"].std().item()
    vae.register_to_config(scaling_factor=scale)
    return tensors["z"] * scale, tensors["ids"].long()


READ_CLASSES = (len(SHAPES) + 1, len(COLOURS), len(SIZES), len(RELATIONS) + 1)
OBJECTS = 4
UNKNOWN = -100  # cross_entropy's own "no target"


def reading_targets(stream: list[Scene]) -> tuple[Tensor, Tensor]:
    """List what a caption's reader is asked, per scene and object slot.

    Classes [B, 4, 4] (shape, colour, size, relation to the next) and positions [B, 4, 2] in
    [-1, 1]; an absent object has shape class 6 and no other target.
    """
    classes = torch.full((len(stream), OBJECTS, len(READ_CLASSES)), UNKNOWN)
    classes[:, :, 0] = len(SHAPES)
    places = torch.full((len(stream), OBJECTS, 2), torch.nan)
    for b, scene in enumerate(stream):
        for k, item in enumerate(scene.graph.items):
            size, colour = item.attributes
            classes[b, k] = torch.tensor(
                [SHAPES.index(item.label), COLOURS.index(colour), SIZES.index(size), len(RELATIONS)]
            )
            places[b, k] = torch.tensor(scene.positions[k]) / 32 - 1
        for k, relation in enumerate(scene.graph.relations):
            classes[b, k, 3] = RELATIONS.index(relation.relation)
    return classes, places


def train_text(
    out: Path, tokenizer: CLIPTokenizer, steps: int, batch: int, seed: int, log: Log
) -> CLIPTextModel:
    """Read captions: the last four positions, always padding, learn to hold one object each."""
    torch.manual_seed(seed + 2)
    text = build_text_encoder(tokenizer)
    head = nn.Linear(128, sum(READ_CLASSES) + 2)
    state = Checkpointed({"text": text, "head": head}, out / "text.safetensors", 1e-3, ema=0.99)
    if state.step < steps:
        stream = list(itertools.islice(scenes("train", seed + 3), 40_000))
        ids = tokenize(tokenizer, [s.graph.caption for s in stream])
        classes, places = reading_targets(stream)

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + 900_007 + step)
        pick = torch.randint(len(ids), (batch,), generator=g)
        read = head(text(ids[pick]).last_hidden_state[:, -OBJECTS:])
        *parts, place = read.split([*READ_CLASSES, 2], dim=-1)
        known = ~places[pick].isnan()
        loss = (place - places[pick])[known].square().mean()
        for k, logits in enumerate(parts):
            loss = loss + F.cross_entropy(logits.flatten(0, 1), classes[pick][:, :, k].flatten())
        return loss

    loop(state, steps, 1e-3, loss_at, log)
    state.load_ema()
    return text.eval().requires_grad_(False)


LAYOUT_NOISE = 600  # above this timestep an object's place can hardly be read off x_t


def timesteps_of_batch(batch: int, generator: torch.Generator) -> Tensor:
    """Stratified timesteps [batch]: half over all, half where the layout is decided."""
    u = (torch.rand(1, generator=generator) + torch.arange(batch) * 2 / batch) % 1.0
    low = torch.where(torch.arange(batch) < batch // 2, 0, LAYOUT_NOISE)
    return (low + u * (1000 - low)).long().clamp(max=999)


def train_denoiser(
    out: Path,
    z: Tensor,
    ids: Tensor,
    empty: Tensor,
    text: CLIPTextModel,
    steps: int,
    batch: int,
    seed: int,
    log: Log,
) -> tuple[UNet2DConditionModel, float]:
    """Train the denoiser on v-prediction; captions dropped one time in ten."""
    torch.manual_seed(seed + 1)
    unet = build_unet().to(memory_format=torch.channels_last)
    state = Checkpointed({"unet": unet}, out / "denoiser.safetensors", lr=1e-3, ema=0.9995)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + 500_009 + step)
        pick = torch.randint(len(z), (batch,), generator=g)
        x_0, tokens = z[pick], ids[pick]
        tokens = torch.where(torch.rand(batch, 1, generator=g) < 0.1, empty, tokens)
        t = timesteps_of_batch(batch, g)
        with torch.no_grad():
            c = text(tokens).last_hidden_state
        return v_error(unet, x_0, c, t, alphas, g)

    loop(state, steps, 1e-3, loss_at, log)
    state.load_ema()
    return unet.eval(), state.seconds


def main() -> None:
    """Run every stage that is not finished yet."""
    steps = {"--vae-steps": 1600, "--text-steps": 1200, "--steps": 7500}
    parser = workshop_parser(__doc__, steps, 64)
    parser.add_argument("--scenes", type=int, default=80_000)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count() or 1)

    def log(line: str) -> None:
        print(line, flush=True)

    tokenizer = build_tokenizer(args.output / "tokenizer")
    vae = train_vae(args.output, args.vae_steps, args.batch // 2, args.seed, log)
    z, ids = latent_dataset(args.output, vae, tokenizer, args.scenes, args.seed, log)
    empty = tokenize(tokenizer, [""])
    text = train_text(args.output, tokenizer, args.text_steps, args.batch * 2, args.seed, log)
    unet, seconds = train_denoiser(
        args.output, z, ids, empty, text, args.steps, args.batch, args.seed, log
    )
    publish(args.output / "pipeline", vae, unet, text, tokenizer)
    log(
        f"denoiser trained in {seconds:.0f} s on {platform.machine()}, {os.cpu_count()} cores; "
        f"wrote {args.output / 'pipeline'}"
    )


if __name__ == "__main__":
    main()
