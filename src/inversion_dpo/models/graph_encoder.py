"""A scene graph as condition: an encoder of graphs, and attention to its tokens beside the text.

Items and triples are embedded by the pipeline's own text encoder, exchange messages, and become
one token each. Every cross-attention of the UNet then adds a second attention with the same
queries: attn(x, c) + W_o Attn(W_q x, W_k g, W_v g), decoupled as IP-Adapter has it (Ye et al.,
2023, https://arxiv.org/abs/2308.06721). W_o starts at zero, and a graph without rows gives zero
for ever: both are the model without a graph, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from inversion_dpo.models.base import ModelError


@dataclass(frozen=True)
class GraphShape:
    """What an encoder was made for, and how large it is; kept beside its weights.

    cross_attention_dim: width D of the text embeddings and of the tokens. attentions: name of each
    cross-attention of the UNet, with the widths of its input and of its queries. tokens: most items
    and triples of a graph, M. width, layers: of the message passing.
    """

    cross_attention_dim: int
    attentions: dict[str, list[int]]
    tokens: int = 32
    width: int = 128
    layers: int = 3


def cross_attentions(pipeline: Any) -> dict[str, Any]:
    """List the text cross-attentions of a UNet by name; ModelError if there are none."""
    unet = getattr(pipeline, "unet", None) or nn.Module()
    found = {
        name: module
        for name, module in sorted(unet.named_modules())
        if isinstance(module, Attention) and module.is_cross_attention
    }
    if not found:
        raise ModelError(
            f"{type(pipeline).__name__} has no UNet with cross-attention. A scene graph needs "
            "Stable Diffusion 1, 2 or XL: set model.scene_graph=null and another policy.kind"
        )
    return found


def shape_for(pipeline: Any, tokens: int, width: int, layers: int) -> GraphShape:
    """Shape an encoder for this pipeline; ModelError if it can have none.

    Args:
        pipeline: of a family whose network is a UNet.
        tokens: most objects and relations of a graph.
        width: of the encoder's layers.
        layers: of message passing.
    """
    places = {n: [a.query_dim, a.inner_dim] for n, a in cross_attentions(pipeline).items()}
    return GraphShape(pipeline.unet.config.cross_attention_dim, places, tokens, width, layers)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Two linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


class MessagePassing(nn.Module):
    """One exchange between triples and their items, which does not depend on the rows' order.

    A triple hears its subject and its object; an item hears the mean of the triples that it is
    subject of, and the mean of those that it is object of.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.triple, self.item = mlp(3 * width, width), mlp(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor, links: Sequence[Tensor], is_item: Tensor) -> Tensor:
        """Update rows [B, M, W].

        Args:
            rows: states of items and triples [B, M, W].
            links: subjects and objects, [B, M, M] each: 1 where the row's triple has that item.
            is_item: [B, M, 1].
        """
        heard = [link @ rows for link in links]
        backs = [link.transpose(1, 2) for link in links]
        means = [back @ rows / back.sum(-1, keepdim=True).clamp(min=1) for back in backs]
        triples, items = self.triple(torch.cat([rows, *heard], -1)), torch.cat([rows, *means], -1)
        return self.norm(rows + torch.where(is_item, self.item(items), triples))


class GraphNetwork(nn.Module):
    """Rows of a graph, as text embeddings, to tokens."""

    def __init__(self, text_width: int, width: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(text_width, width)
        self.kind = nn.Embedding(2, width)  # triple, item
        self.layers = nn.ModuleList(MessagePassing(width) for _ in range(layers))
        self.leave = nn.Linear(width, text_width)

    def forward(self, rows: Tensor, links: Tensor) -> Tensor:
        """Make tokens [B, M, D], zero where there is no row.

        rows: text embeddings [B, M, D]. links: [B, M, 2], the rows of a triple's subject and
        object; of an item twice its own row; -1 where there is none.
        """
        there = links[..., 0] >= 0
        is_item = links[..., 0] == torch.arange(links.shape[1], device=links.device)
        speaks = (there & ~is_item)[..., None].to(rows.dtype)
        ends = [F.one_hot(links[..., k].clamp(min=0), links.shape[1]) * speaks for k in (0, 1)]
        states = self.enter(rows) + self.kind(is_item.long())
        for layer in self.layers:
            states = layer(states, ends, is_item[..., None])
        return self.leave(states) * there[..., None]


class GraphProjections(nn.Module):
    """Keys, values and the way out of one cross-attention; the way out starts at zero."""

    def __init__(self, text_width: int, query_dim: int, inner_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(text_width, inner_dim, bias=False)
        self.to_v = nn.Linear(text_width, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, query: Tensor, tokens: Tensor, heads: int) -> Tensor:
        """Attend with queries [B, Q, H * d] to tokens [B, M, D]; rows of zeros are padding.

        One key and one value of zero come first, so that a query may attend to nothing.
        """
        tokens = F.pad(tokens.to(self.to_k.weight.dtype), (0, 0, 1, 0))
        mask = tokens.ne(0).any(-1)
        mask[:, 0] = True
        key, value = self.to_k(tokens), self.to_v(tokens)
        q, k, v = (
            x.to(key.dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        out: Tensor = self.to_out(read.transpose(1, 2).flatten(2))
        return out.to(query.dtype)


class SceneGraphEncoder(nn.Module):
    """All that is trained: the graph network, and projections for each cross-attention.

    It is no part of the UNet: a LoRA does not see it, and a saved pipeline does not hold it.
    """

    def __init__(self, shape: GraphShape, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.enabled, self.warned = shape, True, False
        width = shape.cross_attention_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = GraphNetwork(width, shape.width, shape.layers)
            self.projections = nn.ModuleList(
                GraphProjections(width, *sizes) for sizes in shape.attentions.values()
            )

    def forward(self, rows: Tensor, links: Tensor) -> Tensor:
        """Make tokens of graphs, see :class:`GraphNetwork`, on this module's device."""
        weight = self.network.enter.weight
        tokens: Tensor = self.network(rows.to(weight.device, weight.dtype), links.to(weight.device))
        return tokens

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave graphs out inside: the model without them."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


class GraphAttention:
    """An attention processor: what was there before, and the attention to the graph added."""

    def __init__(self, plain: Any, encoder: SceneGraphEncoder, place: int) -> None:
        self.plain, self.encoder, self.place = plain, encoder, place

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend to a prompt, and to a graph where both are given as (prompt, tokens)."""
        given = encoder_hidden_states
        text, tokens = given if isinstance(given, tuple) else (given, None)
        out: Tensor = self.plain(attn, hidden_states, text, attention_mask, temb)
        if tokens is None or not self.encoder.enabled:
            return out
        query = attn.to_q(hidden_states)
        return out + self.encoder.projections[self.place](query, tokens, attn.heads)


def install(pipeline: Any, encoder: SceneGraphEncoder, prompt_chunks: int = 1) -> None:
    """Make the pipeline's UNet attend to the encoder's tokens; ModelError if it does not fit.

    The pipeline, called with ``prompt_embeds`` to which a graph's tokens are appended, and
    ``negative_prompt_embeds`` with as many rows of zeros, is conditioned on both.

    Args:
        pipeline: its UNet is changed in place.
        encoder: of the shape that fits it.
        prompt_chunks: chunks of 75 tokens that CLIP reads of a prompt.
    """
    check_fits(pipeline, encoder.shape)
    for place, attention in enumerate(cross_attentions(pipeline).values()):
        attention.set_processor(GraphAttention(attention.processor, encoder, place))
    prompt = pipeline.tokenizer.model_max_length * prompt_chunks

    def split(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Part embeddings of prompt and graph in one; those of another length have no graph."""
        hidden = kwargs.get("encoder_hidden_states")
        if isinstance(hidden, Tensor) and hidden.shape[1] == prompt + encoder.shape.tokens:
            kwargs = kwargs | {"encoder_hidden_states": (hidden[:, :prompt], hidden[:, prompt:])}
        return args, kwargs

    pipeline.unet.register_forward_pre_hook(split, with_kwargs=True)
    pipeline.scene_graph = encoder.to(pipeline.unet.device)


def check_fits(pipeline: Any, shape: GraphShape) -> None:
    """Compare a pipeline with what an encoder is for; ModelError names the first difference."""
    here = shape_for(pipeline, shape.tokens, shape.width, shape.layers)
    advice = "use the encoder that was trained on this pipeline (model.scene_graph)"
    if here.cross_attention_dim != shape.cross_attention_dim:
        raise ModelError(
            f"the scene-graph encoder is for text embeddings of width {shape.cross_attention_dim}, "
            f"the pipeline's have {here.cross_attention_dim}: {advice}"
        )
    for name in sorted({*here.attentions, *shape.attentions}):
        ours, theirs = here.attentions.get(name), shape.attentions.get(name)
        if ours != theirs:
            raise ModelError(
                f"the scene-graph encoder does not fit the pipeline's UNet at {name}: widths "
                f"{theirs or 'none'} against {ours or 'none'}: {advice}"
            )
