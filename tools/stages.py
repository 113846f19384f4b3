"""What every workshop shares: stages of training that go on where they stopped, and the folder.

A stage draws its randomness from (seed, stage, step), so a resumed run repeats nothing.
"""

from __future__ import annotations

import math
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from inversion_dpo.run.disk import atomic_folder, atomic_save
from tools.embedded.architecture import SCHEDULER

Log = Callable[[str], None]


def workshop_parser(about: str, steps: Mapping[str, int], batch: int) -> ArgumentParser:
    """Begin a workshop's command line: the folder, steps of each stage, batch and seed.

    Args:
        about: the module's docstring, whose first line explains the command.
        steps: of each stage by its option, ``--vae-steps`` for example.
        batch: of the denoiser.
    """
    parser = ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and the model")
    for option, count in steps.items():
        parser.add_argument(option, type=int, default=count)
    text = "of the denoiser; the autoencoder takes half"
    parser.add_argument("--batch", type=int, default=batch, help=text)
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Checkpointed:
    """Modules, their averaged copy and AdamW moments in one safetensors file."""

    def __init__(self, modules: dict[str, nn.Module], path: Path, lr: float, ema: float) -> None:
        self.path, self.ema_decay, self.step, self.seconds = path, ema, 0, 0.0
        self.params = {f"{n}.{k}": p for n, m in modules.items() for k, p in m.named_parameters()}
        self.ema = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        if path.exists():
            self._load()

    def save(self) -> None:
        """Write beside the old file, then replace it."""
        tensors = {f"param.{k}": p.detach() for k, p in self.params.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, p in self.params.items():
            for name, value in self.optimizer.state[p].items():
                tensors[f"{name}.{k}"] = value
        about = {"step": str(self.step), "seconds": str(self.seconds)}
        atomic_save(tensors, self.path, about)

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as f:
            self.step = int(f.metadata()["step"])
            self.seconds = float(f.metadata()["seconds"])
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(tensors[f"param.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
                self.optimizer.state[p] = {
                    n: tensors[f"{n}.{k}"] for n in ("step", "exp_avg", "exp_avg_sq")
                }

    def update(self, loss: Tensor, lr: float) -> float:
        """One optimizer step and one step of the running average; returns the gradient norm."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.params.values()), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for k, p in self.params.items():
                self.ema[k].lerp_(p, 1 - decay)
        return float(norm)

    def load_ema(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(self.ema[k])


def cosine(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, total - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


def loop(
    state: Checkpointed,
    total: int,
    peak: float,
    loss_at: Callable[[int], Tensor],
    log: Log,
    every: int = 500,
) -> None:
    """Run ``loss_at(step)`` to ``total`` steps, saving every ``every``."""
    start, before, running = time.time(), state.seconds, 0.0
    while state.step < total:
        step = state.step
        loss = loss_at(step)
        norm = state.update(loss, cosine(step, total, peak, warmup=200))
        running += 0.02 * (loss.item() - running) if running else loss.item()
        state.seconds = before + time.time() - start
        if state.step % 50 == 0:
            left = (total - state.step) * state.seconds / state.step / 60
            log(
                f"{state.path.stem} {state.step}/{total} loss {running:.5f} |g| {norm:.3f} "
                f"{state.seconds:.0f}s, {left:.0f} min left"
            )
        if state.step % every == 0 or state.step == total:
            state.save()


def v_error(
    unet: UNet2DConditionModel,
    x_0: Tensor,
    hidden: Tensor,
    t: Tensor,
    alphas: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the v-prediction of latents [B, C, H, W] at timesteps t [B].

    v = sqrt(a) eps - sqrt(1 - a) x_0, ``alphas`` being the schedule's cumulative products.
    """
    eps = torch.randn(x_0.shape, generator=generator)
    a = alphas[t].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
    error: Tensor = (unet(x_t, t, hidden).sample - v).square().mean()
    return error


def publish(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Write the diffusers folder, whole or not at all."""
    pipe = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        unet=unet.to(memory_format=torch.contiguous_format),
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def fill(partial: Path) -> None:
        pipe.save_pretrained(partial, safe_serialization=True)
        for name in ("vocab.json", "merges.txt"):
            if not (partial / "tokenizer" / name).exists():
                shutil.copy(Path(tokenizer.name_or_path) / name, partial / "tokenizer" / name)

    atomic_folder(folder, fill)
    return pipe
