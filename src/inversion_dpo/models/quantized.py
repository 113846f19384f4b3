"""Keep a frozen network's large weights in 8 or 4 bits, or in main memory, for a LoRA over them.

The linear layers in the network's blocks are held in fewer bits and multiplied out each time they
are used, in the forward and in the backward pass. Convolutions and what lies outside the blocks
stay as they are. It needs no library and no GPU. ``int8`` and ``fp8`` have a scale per row, as
torchao's weight-only forms; ``nf4`` has one per 64 weights, and bitsandbytes' numbers. Weights that
are kept in main memory come to the device in the same moments, in few bits or whole.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inversion_dpo.models.base import ModelError

# 4-bit NormalFloat: Dettmers et al., 2023, appendix E (https://arxiv.org/abs/2305.14314)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
BLOCK = 64  # weights that share a scale
MOST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}  # the largest number that is stored
LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 1e-30, torch.float32: 1e-30}  # above 0
IN_BLOCK = re.compile(r"\.\d+\.")  # in the names of a network's repeated layers


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in few bits; ``weight`` multiplies it out in the layer's precision.

    ``stored`` has one byte a weight, or half of one; ``scale`` is as precise as the weight was.
    Of the kind None the weight is whole, and only kept in main memory.
    """

    def __init__(self, linear: nn.Linear, kind: str | None, offload: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.bias, self.offload = kind, linear.bias, offload
        self.place = linear.weight.device  # where it computes
        w = linear.weight.detach()
        if kind is None:
            self._parameters["weight"] = nn.Parameter(w, requires_grad=False)
            return
        rows = F.pad(w.flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK) if kind == "nf4" else w
        scale = (rows.float().abs().amax(1, keepdim=True) / MOST[kind]).to(w.dtype)
        scale = scale.clamp(min=LEAST[w.dtype])  # of a row of zeros
        q = (rows.float() / scale.float()).clamp(-MOST[kind], MOST[kind])
        if kind == "nf4":
            levels = torch.tensor(NF4, device=w.device)
            nearest = torch.bucketize(q, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
            q = nearest[:, 0] * 16 + nearest[:, 1]
        else:
            q = q.round().to(torch.int8) if kind == "int8" else q.to(torch.float8_e4m3fn)
        self.stored = nn.Parameter(q.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Multiply the weight out, [out, in]; a copy, so that changing it changes nothing."""
        return self.whole([*self.held().values()][-1].dtype)  # the scale's, or its own

    def held(self) -> dict[str, nn.Parameter]:
        """List what the weight is made of: itself, or what is stored and its scale."""
        own = self._parameters.items()
        return {name: p for name, p in own if name != "bias" and p is not None}

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Multiply the weight out, [out, in], on the device where it computes."""
        stored, *scales = (p.to(self.place, non_blocking=True) for p in self.held().values())
        if not scales:
            return stored.to(dtype)
        scale = scales[0].to(dtype)
        if self.kind == "nf4":
            pairs = F.embedding(stored.int(), _pairs(dtype, self.place))
            flat = (pairs.view(-1, BLOCK) * scale).flatten()
            size = self.out_features, self.in_features
            return flat[: size[0] * size[1]].view(size)
        form = torch.int8 if self.kind == "int8" else torch.float8_e4m3fn
        return stored.view(form).to(dtype) * scale

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Go to another device, as all modules do; what is offloaded stays where it is."""
        kept = self.held() if self.offload else {}
        for name in kept:
            del self._parameters[name]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.place = fn(torch.empty(0, device=self.place)).device
        for name, p in kept.items():
            p.data = p.data.pin_memory() if self.place.type == "cuda" else p.data
            self._parameters[name] = p
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer, in autocast's precision where that is on."""
        on, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(on):
            dtype = torch.get_autocast_dtype(on)
        product: Tensor = _Product.apply(input.to(dtype), self)  # type: ignore[no-untyped-call]
        return product


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Map a byte to its two numbers, [256, 2]."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.cartesian_prod(levels, levels)


class _Product(torch.autograd.Function):
    """x W^T + b. autograd would keep W for the way back: all weights, multiplied out, at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.whole(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.whole(gradients[0].dtype), None


def quantize(
    network: nn.Module, kind: str | None, setting: str = "quantize", offload: bool = False
) -> None:
    """Replace the linear layers in a network's blocks, but those kept in another precision.

    Args:
        network: whose layers are replaced.
        kind: ``int8``, ``fp8`` or ``nf4``; None leaves the numbers as they are.
        setting: of ``model`` that asks for it, for messages.
        offload: whether the weights stay in main memory.

    Raises:
        ModelError: there is none.
    """
    dtype, replaced = network.dtype, 0
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and IN_BLOCK.search(name) and layer.weight.dtype == dtype:
            place, _, last = name.rpartition(".")
            setattr(network.get_submodule(place), last, QuantizedLinear(layer, kind, offload))
            replaced += 1
    if not replaced:
        raise ModelError(
            f"{type(network).__name__} has no linear layer in its blocks: leave out model.{setting}"
        )
