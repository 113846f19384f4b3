"""What the matrices of a LoRA, DoRA, LoHa or LoKr make of a layer, and at which scale.

LoHa and LoKr: Yeh et al., 2023, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.originals import Place

MAGNITUDE = "lora_magnitude_vector"  # of a DoRA
Matrices = dict[str, Tensor]  # of a place: A and B, alpha, or what LoHa and LoKr have


def made_of(place: Place, matrices: Matrices, scale: float, shape: torch.Size) -> Matrices:
    """Make A [r, in], B [out, r] at its scale, and a DoRA's magnitude [out]; or the change [shape].

    Args:
        place: where they go.
        matrices: of the file.
        scale: of their product.
        shape: of the modules' weights, below one another.

    Raises:
        ModelError: matrices of few bits, not finite, or of other shapes.
    """
    what = f"its matrices for {place.part}.{place.modules[0]}"
    if not all(m.is_floating_point() for name, m in matrices.items() if name != "alpha"):
        raise ModelError(f"{what} are whole numbers, of few bits: give them in bf16")
    if not all(matrix.isfinite().all() for matrix in matrices.values()):
        raise ModelError(f"{what} are not finite: train or fetch it anew")
    kohya = matrices.get("dora_scale")  # the norms of rows, or of columns
    norm = matrices.get(MAGNITUDE, kohya)
    columns = kohya is not None and ("A" not in matrices or len(kohya) != shape[0])
    if columns or (norm is not None and place.swapped):
        raise ModelError(f"{what} are of a kind of DoRA that peft cannot compute: merge it first")
    try:
        if "A" not in matrices:
            return {"change": _rows(place, _change(matrices, scale, shape))}
        down, up = matrices["A"].flatten(1), matrices["B"].flatten(1).float() * scale
        (up.to("meta") @ down.to("meta", up.dtype)).reshape(shape)
        made = {"A": down, "B": _rows(place, up)}
        return made if norm is None else made | {MAGNITUDE: norm.reshape(shape[0])}
    except RuntimeError as error:
        raise ModelError(
            f"{what} do not fit a weight of {[*shape]}: give a LoRA of this model"
        ) from error


def change_of(made: Matrices, weight: Tensor) -> Tensor:
    """Multiply out what A, B and a DoRA's magnitude change of a weight, [out, in].

    Args:
        made: by :func:`made_of`.
        weight: of the layer; it may lie on the meta device.
    """
    change = (made["B"] @ made["A"].float()).to(weight.device)
    if MAGNITUDE not in made:
        return change
    whole = weight.detach().float() + change
    norms = made[MAGNITUDE].to(whole) / whole.norm(dim=1)
    return whole * norms[:, None] - weight.detach()


def _rows(place: Place, rows: Tensor) -> Tensor:
    """Bring rows [out, ...] into diffusers' order."""
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows


def scale_of(matrices: Matrices, settings: Mapping[str, Any], place: Place) -> float:
    """Find the factor of a layer's product: alpha over the rank; 1 if nothing is said of alpha.

    Args:
        matrices: of the layer.
        settings: of the file, as peft writes them.
        place: the layer.

    Raises:
        ModelError: ranks or alphas that contradict one another, or are no numbers.
    """
    named = {k.removeprefix(f"{place.part}."): v for k, v in settings.items()}
    ranks = [len(m) for name, m in matrices.items() if name == "A" or name.endswith("_b")]
    if not ranks and "r" not in named:
        return 1.0  # LoKr with whole factors
    rank = ranks[-1] if ranks else _told(named, "rank", named["r"], place)
    if not rank or ("alpha" in matrices and matrices["alpha"].numel() != 1):
        raise ModelError(f"{place.modules[0]} has a rank of 0, or several alphas: fetch it again")
    if "alpha" in matrices:
        alpha = float(matrices["alpha"])
    else:
        alpha = _told(named, "alpha", named.get("lora_alpha", named.get("alpha", rank)), place)
        if _told(named, "rank", named.get("r", rank), place) != rank:
            raise ModelError(
                f"{place.modules[0]} has a rank of {rank}, and the file's settings say another, "
                "by which its scale is not known: fetch it again"
            )
    return alpha / (math.sqrt(rank) if named.get("use_rslora") else rank)


def _told(settings: Mapping[str, Any], what: str, usual: Any, place: Place) -> float:
    """Read the alpha or rank of a layer from settings: its pattern's, or the usual one."""
    try:
        pattern = (settings.get(f"{what}_pattern") or {}).items()
        own = [value for name, value in pattern if _matches(name, place)]
        number = float((own or [usual])[0])
    except (AttributeError, TypeError, ValueError, re.error):
        number = math.nan
    if not math.isfinite(number):
        raise ModelError(
            f"the file's settings give no number as the {what} of {place.modules[0]}: fetch it "
            "again"
        )
    return number


def _matches(name: str, place: Place) -> bool:
    """Say whether a name of settings is a layer's; of CLIP it may be the former one."""
    layer = place.modules[0]
    return any(re.fullmatch(rf"(.*\.)?({name})", n) for n in (layer, f"text_model.{layer}"))


def unheard_text(settings: Mapping[str, Any], layers: Mapping[Place, Matrices]) -> str | None:
    """Say which layers settings scale that the file has not; they may have other names there.

    Raises:
        ModelError: settings of a DoRA, whose magnitudes the file lacks.
    """
    lost = list[str]()
    for key, value in settings.items():
        part, _, what = key.rpartition(".")
        own = {place: m for place, m in layers.items() if part in ("", place.part)}
        if what == "alpha_pattern":
            lost += [n for n in value or () if not any(_matches(n, place) for place in own)]
        held = set[str]().union(*own.values())
        if what == "use_dora" and value and own and held.isdisjoint((MAGNITUDE, "dora_scale")):
            raise ModelError("it lacks the magnitudes of the DoRA that it is: fetch it again")
    if not lost:
        return None
    return f"its settings scale {len(lost)} layers that it does not have, for example {lost[0]!r}"


def _change(matrices: Matrices, scale: float, shape: torch.Size) -> Tensor:
    """Multiply out what LoHa (a Hadamard product) or LoKr (a Kronecker product) adds, [shape]."""
    m = {name: tensor.float() for name, tensor in matrices.items()}

    def factor(name: str, core: str) -> Tensor:
        if name in m:
            return m[name]
        if lost := [f"{name}_{end}" for end in "ab" if f"{name}_{end}" not in m]:
            raise ModelError(f"it lacks {lost[0]}, of the factors of LoHa or LoKr: fetch it again")
        a, b = m[f"{name}_a"], m[f"{name}_b"]
        if core in m:  # of a convolution
            return torch.einsum("ijkl,jr,ip->prkl", m[core], b, a)
        return a @ b.flatten(1)

    if "hada_w1_a" in m:
        whole = factor("hada_w1", "hada_t1") * factor("hada_w2", "hada_t2")
    else:
        w1, w2 = factor("lokr_w1", ""), factor("lokr_w2", "lokr_t2")
        whole = torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2.contiguous())
    return scale * whole.reshape(shape)
