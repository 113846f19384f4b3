"""A model conditioned on prompt and scene graph: the adapter of its family, and a graph encoder.

The condition holds a graph as text embeddings of its rows and the links between them; its tokens
are computed where the network is called, so that the encoder can be trained by the same step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.base import (
    GRAPH_KEYS,
    Condition,
    DiffusionModel,
    ModelError,
    empty_prompt,
)
from inversion_dpo.models.graph_encoder import GraphShape, SceneGraphEncoder

logger = logging.getLogger(__name__)
KIND = "inversion-dpo scene-graph encoder"
TEXTS = 256  # embedded at a time


def rows_of(graph: SceneGraph | None) -> tuple[list[str], list[tuple[int, int]]]:
    """Put a graph's items, then its triples, into words, and link the rows.

    Links are (subject's row, object's row) of a triple and twice its own row of an item.
    """
    if graph is None:
        return [], []
    place = {item.item_id: k for k, item in enumerate(graph.items)}
    texts, links = [item.name for item in graph.items], [(k, k) for k in range(len(place))]
    for r in graph.relations:
        a, b = place[r.item1], place[r.item2]
        texts.append(f"{texts[a]} {r.relation} {texts[b]}")
        links.append((a, b))
    return texts, links


@torch.no_grad()
def embed_texts(model: DiffusionModel, texts: Sequence[str]) -> Tensor:
    """Embed texts [N, D]: the mean of the text encoder's outputs over the tokens of each."""
    tokenizer, parts = model.pipeline.tokenizer, []
    length = tokenizer.model_max_length
    for start in range(0, len(texts), TEXTS):
        part = list(texts[start : start + TEXTS])
        hidden = model.condition(part)["encoder_hidden_states"].float()
        mask = tokenizer(
            part, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).attention_mask.to(hidden)[..., None]
        parts.append((hidden[:, :length] * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def graph_condition(
    model: DiffusionModel, graphs: Sequence[SceneGraph | None], most: int
) -> Condition:
    """Make ``graph_rows`` [B, most, D] and ``graph_links`` [B, most, 2]; zeros and -1 for no row.

    A graph of more rows loses the last of them: triples first, then items.

    Args:
        model: its text encoder embeds the words.
        graphs: B of them; None is the empty graph.
        most: rows of a graph.
    """
    every = [rows_of(graph) for graph in graphs]
    unique = {text: k for k, text in enumerate(dict.fromkeys(t for ts, _ in every for t in ts))}
    width = model.pipeline.unet.config.cross_attention_dim
    rows = torch.zeros(len(every), most, width)
    links = torch.full((len(every), most, 2), -1)
    embedded = embed_texts(model, list(unique)).cpu() if unique else rows
    for k, (texts, linked) in enumerate(every):
        kept = min(most, len(texts))
        if kept:
            rows[k, :kept] = embedded[[unique[t] for t in texts[:kept]]]
            links[k, :kept] = torch.tensor(linked[:kept])
    return dict(zip(GRAPH_KEYS, (rows, links), strict=True))


class SceneGraphModel:
    """A Stable Diffusion or SDXL adapter whose condition is a prompt and a scene graph."""

    empty = empty_prompt  # and the empty graph

    def __init__(self, inner: DiffusionModel, encoder: SceneGraphEncoder) -> None:
        self.inner, self.encoder = inner, encoder

    def __getattr__(self, name: str) -> Any:
        """All else is the family's."""
        return getattr(self.__dict__["inner"], name)

    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """Encode prompts as the family does, and the graphs; None is the empty graph."""
        given, most = graphs or [None] * len(prompts), self.encoder.shape.tokens
        if not self.encoder.warned and any(len(rows_of(g)[0]) > most for g in given):
            self.encoder.warned = True
            logger.warning(
                "scene graphs of more than %d items and triples lose the last of them: the encoder "
                "was made for so many (policy.graph_tokens)",
                most,
            )
        return self.inner.condition(prompts) | graph_condition(self.inner, given, most)

    def embedded(self, condition: Condition) -> Condition:
        """Append the graph's tokens to the prompt's embeddings."""
        rows, links = (condition[key] for key in GRAPH_KEYS)
        hidden = condition["encoder_hidden_states"]
        tokens = self.encoder(rows, links).to(hidden)
        others = {k: v for k, v in condition.items() if k not in GRAPH_KEYS}
        return others | {"encoder_hidden_states": torch.cat([hidden, tokens], 1)}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict as the family does, under prompt and graph."""
        return self.inner.predict(network, x_t, timesteps, self.embedded(condition))


def save_encoder(
    encoder: SceneGraphEncoder,
    folder: Path,
    base: str = "",
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        encoder: what is written.
        folder: where; it is made.
        base: name of the model that the encoder was made for.
        tensors: the weights, if they are not the encoder's own.
    """
    about = {"kind": KIND, "base_model": base, **asdict(encoder.shape)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    whole = encoder.state_dict() if tensors is None else tensors
    weights = {k: v.detach().cpu().contiguous() for k, v in whole.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_encoder(folder: Path) -> bool:
    """Say whether a folder holds a scene-graph encoder."""
    try:
        return bool(json.loads((folder / "config.json").read_text())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_encoder(path: str) -> SceneGraphEncoder:
    """Load a frozen encoder from its folder; ModelError if the folder holds none."""
    folder = Path(path).expanduser()
    if not is_encoder(folder):
        raise ModelError(
            f"model.scene_graph={path}: no scene-graph encoder (config.json and model.safetensors) "
            "there; policy.kind=scene_graph trains one into RUN/adapter"
        )
    about: dict[str, Any] = json.loads((folder / "config.json").read_text())
    try:
        shape = GraphShape(**{k: about[k] for k in GraphShape.__dataclass_fields__})
        encoder = SceneGraphEncoder(shape)
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model.scene_graph={path} is damaged ({reason}); train again") from error
    return encoder.requires_grad_(False).eval()
