"""What does a real job cost? ``python benchmarks/job_cost.py [--figures FILE] [--price 3]``.

Hours, bytes and money for 10,000 and 1,000,000 pairs of 1,024 pixels (Stable Diffusion 1.5: 512),
on 1, 8 and 64 cards, beside Diffusion-DPO's. Every pair is visited four times, by all weights of a
UNet and by a LoRA of FLUX.1, without gradient checkpointing; N = 20. A forward pass is counted by
torch on the published configurations, on the meta device; passes and hours are those of
`inversion-dpo train --dry-run`. What a card does comes from the file that `benchmarks/gpu.py`
writes, or else from the one H200 that was measured. Cards share the work without loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from cards import SD15
from model_cost import SDXL
from torch.utils.flop_counter import FlopCounterMode

from inversion_dpo.maths.records import Extent
from inversion_dpo.run.config import load_config
from inversion_dpo.training.cost import H200, Card, Job, job_of
from inversion_dpo.trajectories.storing import form_of

PAIRS, CARDS, VISITS, STEPS = (10_000, 1_000_000), (1, 8, 64), 4, 20
# name -> policy, latent's channels and side, bytes of a condition in 16 bits
MODELS = {
    "Stable Diffusion 1.5": ("full", 4, 64, 2 * 77 * 768),
    "SDXL": ("full", 4, 128, 2 * (77 * 2048 + 1280)),
    "FLUX.1": ("lora", 16, 128, 2 * (512 * 4096 + 768)),
}


def forward(name: str) -> float:
    """Count the operations of one image's forward pass."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        t = torch.zeros(1)
        if name == "FLUX.1":
            network = diffusers.FluxTransformer2DModel(guidance_embeds=True)
            text = {"encoder_hidden_states": torch.zeros(1, 512, 4096), "timestep": t}
            ids = {"img_ids": torch.zeros(4096, 3), "txt_ids": torch.zeros(512, 3), "guidance": t}
            pooled = torch.zeros(1, 768)
            network(torch.zeros(1, 4096, 64), pooled_projections=pooled, **text, **ids)
        elif name == "SDXL":
            unet = diffusers.UNet2DConditionModel(**SDXL)
            added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
            x = torch.zeros(1, 4, 128, 128)
            unet(x, t, torch.zeros(1, 77, 2048), added_cond_kwargs=added)
        else:
            unet = diffusers.UNet2DConditionModel(**SD15)
            unet(torch.zeros(1, 4, 64, 64), t, torch.zeros(1, 77, 768))
    return float(counter.get_total_flops())


def card_of(file: Path | None) -> Card:
    """Take a card's best shares, over settings and batches, out of what gpu.py measured."""
    if file is None:
        return H200
    told: dict[str, Any] = json.loads(file.read_text())
    shares = dict(H200.shares)
    for kind in ("inversion", "lora", "full"):
        work = {"inversion": "invert"}.get(kind, "step")
        found = [
            row["share"]
            for row in told["rows"]
            if row["fits"] and row["work"] == work and kind in ("inversion", row["kind"])
        ]
        shares[kind] = max(found, default=shares[kind])
    return Card(told["device"], told["matmul_flops"], shares, f"{file}, {told['date']}")


def jobs(name: str, pairs: int) -> tuple[Job, Job]:
    """Count our passes, and Diffusion-DPO's."""
    kind = MODELS[name][0]
    settings = [f"policy.kind={kind}", "training.batch_size=1", f"inversion.steps={STEPS}"]
    settings.append(f"training.steps={VISITS * pairs}")
    ours, theirs = (
        load_config(None, [*settings, f"objective.name={method}"])
        for method in ("inversion_dpo", "diffusion_dpo")
    )
    return job_of(ours, pairs), job_of(theirs, pairs)


def lines(card: Card, price: float) -> Iterator[str]:
    """Write the table, hours as inversion + training."""
    yield f"{card.name}: {card.flops / 1e12:.0f} TFLOP/s of a product; shares {card.shares}"
    yield f"({card.source}); {price:g} for an hour of a card\n"
    head = "| model | trained | pairs | cards | hours: inversion + training | Diffusion-DPO's |"
    yield head + " cache, TB | money | Diffusion-DPO's |"
    yield "|---" * 9 + "|"
    for name, (kind, channels, side, text) in MODELS.items():
        flops, latent = forward(name), channels * side**2
        form = form_of(Extent(last=STEPS), None, 1.0, 1.0)
        for pairs in PAIRS:
            ours, theirs = jobs(name, pairs)
            size = pairs * (form.size(latent, (16, 16)) + text) / 1e12
            for cards in CARDS:
                own = ours.hours(flops, card, cards)
                other = sum(theirs.hours(flops, card, cards))
                money = (sum(own) * cards * price, other * cards * price)
                yield (
                    f"| {name} | {kind} | {pairs:,} | {cards} | {own[0]:.2f} + {own[1]:.2f} "
                    f"| {other:.2f} | {size:.3g} | {money[0]:,.0f} | {money[1]:,.0f} |"
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, help="gpu.json, which benchmarks/gpu.py writes")
    parser.add_argument("--price", type=float, default=3.0, help="of a card's hour")
    args = parser.parse_args()
    print("\n".join(lines(card_of(args.figures), args.price)))


if __name__ == "__main__":
    main()
