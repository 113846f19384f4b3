"""Train the model of drawn pictures: ``python -m tools.drawn.pretrain --output FOLDER``.

Fetches the pictures, then five stages, each resumable from its last checkpoint: the autoencoder; a
picture encoder and a text encoder that learn which name goes with which picture (Radford et al.,
2021, https://arxiv.org/abs/2103.00020); the denoiser with both frozen (v-prediction, Salimans & Ho
2022, https://arxiv.org/abs/2202.00512); labellers and judges (:mod:`tools.drawn.judges`); and
``publish``, which writes a plain diffusers folder. Autoencoder and denoiser start from the embedded
pipeline's.
The base sees what :mod:`tools.drawn.groups` lets it see, and no caption names a hand.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from inversion_dpo.run.config import PACKAGE
from inversion_dpo.run.disk import atomic_text
from tools.drawn.fetch import Emoji, fetch, load
from tools.drawn.groups import of_group
from tools.drawn.judges import (
    HAND,
    READER,
    WIDTH,
    Judges,
    accuracy,
    matching,
    train_hand,
    train_reader,
    write_reader,
)
from tools.drawn.pictures import (
    PictureEncoder,
    Pictures,
    moved,
    seen_by_base,
    seen_by_judges,
    worn,
)
from tools.embedded.architecture import (
    LATENT_CHANNELS,
    SCHEDULER,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenize,
)
from tools.stages import Checkpointed, Log, loop, publish, v_error, workshop_parser

PROMPTS = {  # file -> groups whose names it holds
    "prompts-evaluation.txt": ("noto", "twemoji"),
    "prompts-pairs.txt": ("pairs", "both"),
}
CHANNELS = 16  # of a latent; drawings have more detail than the embedded world's shapes
SHORT = 20  # tokens that hold every caption; what follows is padding, which no token before sees
M = TypeVar("M", bound=nn.Module)


def warm(network: M, part: str) -> M:
    """Give a network the embedded pipeline's weights; what is new of it keeps its random start.

    A dimension that grew holds the old entries first; mean and log-variance grow each for itself.
    """
    own = network.state_dict()
    path = PACKAGE / "assets/pipeline" / part / "diffusion_pytorch_model.safetensors"
    for name, old in load_file(path).items():
        new = own[name]
        if new.shape == old.shape:
            new.copy_(old)
            continue
        places = [old_places(n, o) for n, o in zip(new.shape, old.shape, strict=True)]
        new[torch.meshgrid(*places, indexing="ij")] = old
    network.load_state_dict(own)
    return network


def old_places(new: int, old: int) -> Tensor:
    """Return where the old entries of a dimension stand in the new one."""
    if (new, old) == (2 * CHANNELS, 2 * LATENT_CHANNELS):
        half = torch.arange(LATENT_CHANNELS)
        return torch.cat([half, CHANNELS + half])
    return torch.arange(old)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, along rows and along columns."""
    return x.diff(dim=-1), x.diff(dim=-2)


def train_vae(
    out: Path, seen: Pictures, steps: int, batch: int, seed: int, log: Log
) -> AutoencoderKL:
    """Reconstruction (MSE, L1, L1 of edges) with a weak KL term; returns the averaged model."""
    torch.manual_seed(seed)
    vae = warm(build_vae(CHANNELS), "vae").to(memory_format=torch.channels_last)
    state = Checkpointed({"vae": vae}, out / "vae.safetensors", lr=1.5e-3, ema=0.99)

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randint(len(seen.pixels), (batch,), generator=g)
        x = moved(seen.pixels[pick], g, flip=True).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(g)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        return (y - x).square().mean() + 0.2 * (y - x).abs().mean() + 0.2 * sharp + 1e-4 * kl

    loop(state, steps, 1.5e-3, loss_at, log, every=100)
    state.load_ema()
    return vae.eval()


def train_names(
    out: Path, seen: Pictures, tokenizer: CLIPTokenizer, steps: int, batch: int, seed: int, log: Log
) -> CLIPTextModel:
    """Let names and pictures find each other; writes the labellers' reader."""
    torch.manual_seed(seed + 2)
    text, look = build_text_encoder(tokenizer), PictureEncoder(WIDTH)
    scale = nn.Linear(1, 1, bias=False)  # its one weight is the logarithm of the temperature
    nn.init.constant_(scale.weight, 3.0)
    modules = {"text": text, "look": look, "scale": scale}
    state = Checkpointed(modules, out / "names.safetensors", 1e-3, ema=0.99)
    ids = torch.stack([tokenize(tokenizer, c)[:, :SHORT] for c in seen.captions])
    rows = torch.tensor([e.row for e in seen.emoji])

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + 900_007 + step)
        pick = torch.randperm(len(rows), generator=g)[:batch]
        form = torch.randint(2, (len(pick),), generator=g)
        names = F.normalize(text(ids[form, pick]).pooler_output, dim=-1)
        views = F.normalize(look(worn(seen.pixels[pick], g)), dim=-1)
        return matching(names @ views.T * scale.weight.exp().clamp(max=100), rows[pick])

    loop(state, steps, 1e-3, loss_at, log, every=100)
    state.load_ema()
    with torch.no_grad():
        known = text.eval()(ids[0]).pooler_output
    write_reader(out / "labellers", look.eval(), known, seen.captions[0])
    return text.requires_grad_(False)


@torch.no_grad()
def encoded(
    seen: Pictures, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, 16, 8, 8] of unit variance; hidden captions [2, N, 32, 128] and the empty one."""
    z = torch.cat([vae.encode(p).latent_dist.mean for p in seen.pixels.split(64)])
    vae.register_to_config(scaling_factor=1.0 / z.std().item())

    def hidden(captions: list[str]) -> Tensor:
        parts = tokenize(tokenizer, captions).split(128)
        return torch.cat([text(part).last_hidden_state for part in parts])

    captions = torch.stack([hidden(c) for c in seen.captions])
    return z.contiguous() / z.std(), captions, hidden([""])[0]


def train_denoiser(
    out: Path,
    z: Tensor,
    hidden: Tensor,
    empty: Tensor,
    steps: int,
    batch: int,
    seed: int,
    log: Log,
) -> UNet2DConditionModel:
    """Train the denoiser on v-prediction; captions dropped one time in ten."""
    torch.manual_seed(seed + 1)
    unet = warm(build_unet(CHANNELS), "unet").to(memory_format=torch.channels_last)
    state = Checkpointed({"unet": unet}, out / "denoiser.safetensors", lr=1e-3, ema=0.999)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + 500_009 + step)
        pick = torch.randint(len(z), (batch,), generator=g)
        form = torch.randint(2, (batch,), generator=g)
        dropped = torch.rand(batch, 1, 1, generator=g) < 0.1
        x_0, c = z[pick], torch.where(dropped, empty, hidden[form, pick])
        u = (torch.rand(1, generator=g) + torch.arange(batch) / batch) % 1.0  # stratified
        t = (1000 * u).long().clamp(max=999)
        return v_error(unet, x_0, c, t, alphas, g)

    loop(state, steps, 1e-3, loss_at, log, every=500)
    state.load_ema()
    return unet.eval()


def log_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def train_judges(out: Path, seen: Pictures, unseen: Pictures, steps: int, seed: int) -> None:
    """Train the labellers' classifier, then the judges; a reader learns all it can in a third."""
    train_hand(out / "labellers", seen, steps, 32, seed + 10, log_line)
    train_hand(out / "judges", unseen, steps, 32, seed + 20, log_line)
    train_reader(out / "judges", unseen, max(1, steps // 3), 64, seed + 30, log_line)


def write_more(out: Path, emoji: list[Emoji], seen: Pictures, unseen: Pictures) -> None:
    """Put judges, their accuracy and the prompts beside the pipeline."""
    for role in ("judges", "labellers"):
        (out / "model" / role).mkdir(exist_ok=True)
        for file in (HAND, READER):
            shutil.copy(out / role / file, out / "model" / role / file)
    found = {
        "judges": accuracy(Judges(out / "judges"), seen),
        "labellers": accuracy(Judges(out / "labellers"), unseen),
    }
    log_line(json.dumps(found))
    atomic_text(json.dumps(found, indent=1), out / "model" / "accuracy.json")
    for name, groups in PROMPTS.items():
        names = [f"{e.name}\n" for e in of_group(emoji, *groups)]
        atomic_text("".join(names), out / "model" / name)


def main() -> None:
    """Run every stage that is not finished yet."""
    steps = {"--vae-steps": 1200, "--names-steps": 400, "--steps": 9000, "--judge-steps": 900}
    args = workshop_parser(__doc__, steps, 32).parse_args()
    out, seed = args.output, args.seed
    for folder in (out, out / "judges", out / "labellers"):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    images, emoji = load(fetch(out))
    seen, unseen = seen_by_base(images, emoji), seen_by_judges(images, emoji)
    log_line(f"{len(emoji)} emoji; the base sees {len(seen.pixels)} pictures")
    words = sorted({word for e in seen.emoji for word in f"{e.category} {e.name}".split()})
    tokenizer = build_tokenizer(out / "tokenizer", words)
    vae = train_vae(out, seen, args.vae_steps, args.batch // 2, seed, log_line)
    text = train_names(out, seen, tokenizer, args.names_steps, args.batch * 2, seed, log_line)
    z, hidden, empty = encoded(seen, vae, text, tokenizer)
    unet = train_denoiser(out, z, hidden, empty, args.steps, args.batch, seed, log_line)
    train_judges(out, seen, unseen, args.judge_steps, seed)
    publish(out / "model" / "pipeline", vae, unet.half(), text, tokenizer)  # else over 30 MB
    write_more(out, emoji, seen, unseen)
    log_line(f"wrote {out / 'model'} on {platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
