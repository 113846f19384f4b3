"""Labellers and judges: they say by which hand a picture is drawn, and what it shows.

The *labellers* make preference pairs. They learn from the base's pictures. The *judges* evaluate.
They learn from pictures that the base never saw (:mod:`tools.drawn.groups`): for every prompt of
evaluation they know the emoji by the hand by which the base does not.

Each has a classifier of the hand, and a reader. A reader embeds a picture and looks for the nearest
of the embeddings that it knows by name: for the judges those of pictures, for the labellers those
of names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.run.disk import atomic_save
from tools.drawn.pictures import HandNetwork, PictureEncoder, Pictures, worn
from tools.stages import Checkpointed, Log, loop

WIDTH = 128  # of an embedding
TEMPERATURE = 0.07
TINT = 0.4  # while a reader learns: one emoji has other colours by another hand
FIRST = 5  # a name among so many nearest ones counts as recognised
HAND, READER = "hand.safetensors", "reader.safetensors"


def train_hand(folder: Path, seen: Pictures, steps: int, batch: int, seed: int, log: Log) -> None:
    """Tell Twemoji's hand from Noto's; writes ``folder/hand.safetensors``."""
    torch.manual_seed(seed)
    network = HandNetwork()
    state = Checkpointed({"hand": network}, folder / "hand-training.safetensors", 1e-3, ema=0.98)
    hands = torch.tensor(seen.hands).float()

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randint(len(hands), (batch,), generator=g)
        logits = network(worn(seen.pixels[pick], g))
        return F.binary_cross_entropy_with_logits(logits, hands[pick])

    loop(state, steps, 1e-3, loss_at, log, every=200)
    state.load_ema()
    atomic_save({k: v.half() for k, v in network.state_dict().items()}, folder / HAND)


def train_reader(folder: Path, seen: Pictures, steps: int, batch: int, seed: int, log: Log) -> None:
    """Bring two views of one emoji together, by both hands if it knows both."""
    torch.manual_seed(seed + 1)
    network = PictureEncoder(WIDTH)
    state = Checkpointed(
        {"reader": network}, folder / "reader-training.safetensors", 1e-3, ema=0.98
    )
    rows = torch.tensor([e.row for e in seen.emoji])
    other = partners(rows)

    def loss_at(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + 700_001 + step)
        pick = torch.randperm(len(rows), generator=g)[:batch]
        views = torch.cat([worn(seen.pixels[p], g, TINT) for p in (pick, other[pick])])
        first, second = F.normalize(network(views), dim=-1).chunk(2)
        return matching(first @ second.T / TEMPERATURE, rows[pick])

    loop(state, steps, 1e-3, loss_at, log, every=200)
    state.load_ema()
    with torch.no_grad():
        known = network.eval()(seen.pixels)
    write_reader(folder, network, known, [e.name for e in seen.emoji])


def matching(logits: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of logits [B, B] with all that show the same emoji, ``rows`` [B], as target."""
    same = (rows[:, None] == rows).float()
    target = same / same.sum(1, keepdim=True)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def partners(rows: Tensor) -> Tensor:
    """Find for each picture the other one of its emoji, ``rows`` [N]; itself if there is none."""
    other = (rows[:, None] == rows) & ~torch.eye(len(rows), dtype=torch.bool)
    return torch.where(other.any(1), other.int().argmax(1), torch.arange(len(rows)))


def write_reader(
    folder: Path, network: PictureEncoder, known: Tensor, names: Sequence[str]
) -> None:
    """Write a reader: its network, the embeddings that it knows [K, WIDTH] and their names."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors["known"] = F.normalize(known, dim=-1)
    atomic_save(
        {k: v.half() for k, v in tensors.items()},
        folder / READER,
        {"names": json.dumps(list(names))},
    )


class Judges:
    """The classifier of the hand and the reader of one folder."""

    def __init__(self, folder: Path) -> None:
        self.hand, self.reader = HandNetwork().eval(), PictureEncoder(WIDTH)
        self.hand.load_state_dict(load_file(folder / HAND))
        tensors = load_file(folder / READER)
        self.known = tensors.pop("known").float()
        self.reader.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items()})
        with safe_open(folder / READER, "pt") as file:
            names: list[str] = json.loads(file.metadata()["names"])
        self.names = list(dict.fromkeys(names))
        self.column = torch.tensor([self.names.index(name) for name in names])

    @torch.no_grad()
    def twemoji(self, pixels: Tensor) -> Tensor:
        """Probability [B] that Twemoji's hand drew the pictures, and not Noto's."""
        return torch.sigmoid(self.hand(pixels))

    @torch.no_grad()
    def read(self, pixels: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Place [B] of the right name among all names, 0 first, and its probability [B].

        Raises:
            ValueError: a name that the reader does not know.
        """
        if unknown := sorted(set(names) - set(self.names)):
            raise ValueError(f"the reader does not know {unknown[0]!r}")
        likeness = F.normalize(self.reader(pixels), dim=-1) @ self.known.T
        best = torch.full((len(pixels), len(self.names)), -torch.inf)
        best = best.scatter_reduce(1, self.column.expand_as(likeness), likeness, "amax")
        right = torch.tensor([self.names.index(name) for name in names])[:, None]
        place = (best > best.gather(1, right)).sum(1)
        return place, (best / TEMPERATURE).softmax(1).gather(1, right)[:, 0]

    def scores(
        self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Score images [64, 64, 3]: hand, one of the first places, probability."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        place, probability = self.read(pixels, [p.rpartition(": ")[2] for p in prompts])
        found = {
            "twemoji": self.twemoji(pixels),
            "recognised": (place < FIRST).double(),
            "legible": probability,
        }
        return {name: values.double().numpy() for name, values in found.items()}


def accuracy(judges: Judges, unseen: Pictures) -> dict[str, float]:
    """Accuracy on originals that the judges did not learn from."""
    right = (judges.twemoji(unseen.pixels) > 0.5).int() == torch.tensor(unseen.hands)
    known = [k for k, e in enumerate(unseen.emoji) if e.name in judges.names]
    place, _ = judges.read(unseen.pixels[known], [unseen.emoji[k].name for k in known])
    return {
        "pictures": len(right),
        "hand": right.double().mean().item(),
        "named pictures": len(known),
        "names": len(judges.names),
        "named": (place == 0).double().mean().item(),
        "recognised": (place < FIRST).double().mean().item(),
    }
