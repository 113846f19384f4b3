"""Speed and memory of a training step at SDXL's size: ``python benchmarks/model_cost.py``.

On a GPU: SDXL's UNet with random weights in bfloat16 at 1024 pixels. With --miniature, and where
there is no GPU, the tiny UNet of the same classes: it says nothing of SDXL, but shows that this
runs. Times, in turn, the bare forward and backward and the step on a trajectory's states (errors,
loss, clipping and optimizer included), for a LoRA of rank 64 and for all weights. Prints pairs per
second, the share of the device's measured matmul rate, and peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workshop import write_tiny

from inversion_dpo.data.transforms import Framing
from inversion_dpo.maths.losses import as_pair_errors, dpo, squared_error
from inversion_dpo.maths.records import LossSettings
from inversion_dpo.models.base import Condition, DiffusionModel, frozen_parts
from inversion_dpo.models.loading import adapt
from inversion_dpo.run.fields import PolicyConfig
from inversion_dpo.training.policy import FullPolicy, LoraPolicy
from inversion_dpo.training.run_files import peak_memory

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
HOW = PolicyConfig(rank=64, alpha=64, target_modules=ATTENTION)
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def model_of(miniature: bool, device: torch.device, kind: str) -> DiffusionModel:
    """SDXL's adapter around a random UNet; frozen weights in bfloat16 on a GPU under LoRA."""
    with tempfile.TemporaryDirectory() as root:
        pipeline = DiffusionPipeline.from_pretrained(write_tiny("sdxl", Path(root) / "tiny"))
    if not miniature:
        with torch.device(device):
            pipeline.register_modules(unet=UNet2DConditionModel(**SDXL))
    half = device.type == "cuda" and kind == "lora"
    pipeline.unet.to(device, torch.bfloat16 if half else torch.float32)
    for part in frozen_parts(pipeline).values():
        part.requires_grad_(False).eval()
    return adapt(pipeline, 1024)


def count() -> None:
    """Print the work of SDXL's UNet and encoder on one image of 1024 pixels; runs nothing."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**SDXL)
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(3, 3, down, up, (128, 256, 512, 512), layers_per_block=2)
        extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        with FlopCounterMode(display=False) as first:
            unet(
                torch.zeros(1, 4, 128, 128),
                torch.zeros(1),
                torch.zeros(1, 77, 2048),
                added_cond_kwargs=extra,
            )
        with FlopCounterMode(display=False) as second:
            vae.encode(torch.zeros(1, 3, 1024, 1024))
    weights = sum(p.numel() for p in unet.parameters())
    print(
        f"UNet: {weights / 1e9:.3f} billion weights, {first.get_total_flops() / 1e12:.2f} TFLOP "
        f"forward; encoder: {second.get_total_flops() / 1e12:.2f} TFLOP"
    )


def inputs(model: DiffusionModel, pairs: int, device: torch.device) -> tuple[Tensor, Condition]:
    """Random states and conditions of the network's own shapes, winners then losers."""
    config = model.pipeline.unet.config
    side, pooled = config.sample_size, config.projection_class_embeddings_input_dim
    pooled -= 6 * config.addition_time_embed_dim
    framing = model.framing([Framing((side * 8, side * 8), (0, 0), (side * 8, side * 8))])
    condition = {
        "encoder_hidden_states": torch.randn(2 * pairs, 77, config.cross_attention_dim),
        "text_embeds": torch.randn(2 * pairs, pooled),
        "time_ids": framing["time_ids"].repeat(2 * pairs, 1),
    }
    x_t = torch.randn(2 * pairs, 4, side, side, device=device)
    return x_t, {k: v.to(device) for k, v in condition.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / timed(lambda: a @ b, device) for _ in range(10))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kind: str, miniature: bool, pairs: int, repeats: int, device: torch.device) -> None:
    """Print one row of the table."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = model_of(miniature, device, kind)
    policy = LoraPolicy(model, HOW, 0) if kind == "lora" else FullPolicy(model)
    network: nn.Module = policy.network
    network.enable_gradient_checkpointing()  # type: ignore[operator]
    network.train()
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    x_t, condition = inputs(model, pairs, device)
    t = torch.full([2 * pairs], 500, device=device)
    target, reference = torch.randn_like(x_t), torch.randn_like(x_t)

    def predict() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model.predict(network, x_t, t, condition)

    def bare() -> None:
        squared_error(target, predict()).mean().backward()

    def step() -> None:
        optimizer.zero_grad()
        policy_error = squared_error(target, predict())
        errors = as_pair_errors(policy_error, squared_error(target, reference))
        dpo(errors, LossSettings(2000.0)).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        bare()
    step()
    times = [(timed(bare, device), timed(step, device)) for _ in range(repeats)]
    bare_s, step_s = (statistics.median(column) for column in zip(*times, strict=True))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    share = counter.get_total_flops() / step_s / matmul_rate(device, dtype)
    print(
        f"| {kind} | {pairs} | {1e3 * bare_s:.0f} | {1e3 * step_s:.0f} | {pairs / step_s:.2f} "
        f"| {share:.0%} | {peak_memory(device):.0f} |",
        flush=True,
    )


def main() -> None:
    """One row for LoRA, one for all weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--count", action="store_true", help="only count a forward's operations")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.count:
        return count()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    miniature = args.miniature or device.type == "cpu"
    print(f"{'miniature, ' if miniature else ''}{device.type}\n")
    print("| trained | pairs | bare, ms | step, ms | pairs/s | of the matmul rate | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("lora", "full"):
        measure(kind, miniature, args.pairs, args.repeats, device)


if __name__ == "__main__":
    main()
