"""Put a LoRA, DoRA, LoHa or LoKr file on a pipeline: every tensor of it, or none.

Programs spell the same matrices differently. diffusers, peft (``base_model.model.`` before the
names), bare module names and kohya (``lora_unet_``, dots as underscores) lead to the same layers;
names of the original networks are translated by diffusers. A file of which a part fits no layer is
refused: diffusers would load the rest, or nothing, without an error.
LoHa and LoKr: Yeh et al., 2023, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.quantized import QuantizedLinear

WEIGHTS = "pytorch_lora_weights.safetensors"
NAMED = (WEIGHTS, "adapter_model.safetensors")  # as diffusers and peft name the file
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
GIVEN = "given"  # the adapter's name in the pipeline
NETWORK = "lora_unet_|lora_transformer_|unet\\.|transformer\\.|(?:model\\.)?diffusion_model\\."
STARTS = {  # of a key -> the pipeline's part; a T5 is the second encoder of some pipelines
    "lora_te3_|te3_|text_encoder_3\\.": ("text_encoder_3", "text_encoder_2"),
    "lora_te2_|te2_|text_encoder_2\\.": ("text_encoder_2",),
    "lora_te1?_|te1?_|text_encoder\\.": ("text_encoder",),
    f"{NETWORK}|": ("unet", "transformer"),
}
KEY = re.compile(
    r"(.+?)[._](?:(?P<A>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<B>lora_B|lora_up|lora\.up|lora_linear_layer\.up)"
    r"|(?P<own>lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"|(?:lora\.down\.weight\.|lora\.down\.|lora_linear_layer\.down\.weight\.)?(?P<alpha>alpha))"
    r"(?:\.(?!weight)\w+)?(?:\.weight)?"
)
Matrices = dict[str, Tensor]  # of a layer: A and B, alpha, or what LoHa and LoKr have
Layers = dict[tuple[str, str], Matrices]  # (the pipeline's part, the layer's name) -> matrices


def lora_file(name: str) -> Path:
    """Find the file of a LoRA that is named by file, folder or hub id.

    Raises:
        ModelError: there is none, or a folder holds several.
    """
    place = Path(name).expanduser()
    if not place.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError("nothing is there: give a file, folder or hub id")
        place = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*config.json"]))
    files = [place] if place.is_file() else [place / n for n in NAMED if (place / n).is_file()]
    files = files[:1] or sorted(place.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        held = "several files: name one" if len(files) > 1 else "no .safetensors file"
        pickles = [f for f in ([place] if place.is_file() else place.iterdir()) if _pickled(f)]
        remedy = (
            f"; {pickles[0].name} can run code and is not opened: convert it" if pickles else ""
        )
        raise ModelError(f"{place} holds {held}{remedy}")
    return files[0]


def _pickled(file: Path) -> bool:
    return file.suffix in PICKLED


def add_lora(pipeline: Any, name: str) -> None:
    """Put a LoRA on the pipeline as an adapter, for :func:`merge_lora`; LoHa and LoKr are merged.

    Args:
        pipeline: of diffusers.
        name: file, folder or hub id.

    Raises:
        ModelError: a tensor of the file fits no layer of the pipeline; counts and an example.
    """
    weights, changes = read_lora(pipeline, lora_file(name))
    for (part, layer), change in changes.items():
        module = getattr(pipeline, part).get_submodule(layer)
        if isinstance(module, QuantizedLinear):
            raise ModelError("LoHa and LoKr cannot be added to few bits: set model.quantize=null")
        module.weight.data += change.to(module.weight)
    for part in sorted({key.split(".")[0] for key in weights}):
        network = getattr(pipeline, part)
        if hasattr(network, "load_lora_adapter"):
            network.load_lora_adapter(weights, prefix=part, adapter_name=GIVEN)
        else:
            pipeline.load_lora_into_text_encoder(
                weights, None, network, prefix=part, adapter_name=GIVEN
            )
    _check(pipeline, weights, name)


def read_lora(pipeline: Any, file: Path) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """Read a file for a pipeline, whose weights may lie on the meta device.

    Returns:
        LoRA matrices under diffusers' names, their scale multiplied in, and the changes of weights
        that LoHa and LoKr make, by part and layer.

    Raises:
        ModelError: a tensor of the file fits no layer of the pipeline.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}): fetch it again") from error
    beside = file.with_name("adapter_config.json")
    if not settings and beside.is_file():
        settings = json.loads(beside.read_text())
    weights, changes = dict[str, Tensor](), dict[tuple[str, str], Tensor]()
    for (part, layer), matrices in find_layers(pipeline, tensors).items():
        weight = getattr(pipeline, part).get_submodule(layer).weight
        scale = _scale(matrices, settings, part, layer)
        if not all(matrix.isfinite().all() for matrix in matrices.values()):
            raise ModelError(
                f"its matrices for {part}.{layer} are not finite: train or fetch it anew"
            )
        try:
            if "A" not in matrices:
                changes[part, layer] = _change(matrices, scale, weight.shape)
                continue
            _product(matrices, weight.shape)
        except RuntimeError as error:
            raise ModelError(
                f"its matrices for {part}.{layer} do not fit a weight of {[*weight.shape]}: give a "
                "LoRA of this model"
            ) from error
        if part not in pipeline._lora_loadable_modules:
            raise ModelError(f"it has a LoRA for {part}, which {_kind(pipeline)} cannot take")
        down, up = matrices["A"], matrices["B"].float() * scale
        ones = (1,) * (weight.ndim - 2)  # of a convolution, which some write as a matrix
        key = f"{part}.{layer}.lora_"
        weights[f"{key}A.weight"] = down.reshape(len(down), *weight.shape[1:])
        weights[f"{key}B.weight"] = up.reshape(len(up), -1, *ones)
        if "lora_magnitude_vector" in matrices:
            weights[f"{key}magnitude_vector"] = matrices["lora_magnitude_vector"]
    return weights, changes


def merge_lora(pipeline: Any) -> None:
    """Add the LoRA that is loaded into a pipeline to its weights, and remove it."""
    held = [p for p in pipeline._lora_loadable_modules if getattr(pipeline, p, None) is not None]
    pipeline.fuse_lora(components=held)
    pipeline.unload_lora_weights()


def find_layers(pipeline: Any, tensors: Mapping[str, Tensor]) -> Layers:
    """Sort a file's tensors by the pipeline's layers; ModelError if one fits none."""
    layers, strange = _sorted(pipeline, tensors)
    if strange and hasattr(pipeline, "lora_state_dict"):
        layers, strange = _sorted(pipeline, _translated(pipeline, tensors) or tensors)
    halves = {"A", "B"}
    for (part, layer), matrices in layers.items():
        if len(halves & matrices.keys()) == 1 or not matrices.keys() - {"alpha"}:
            strange.append(f"{part}.{layer} (half a pair)")
    if strange or not layers:
        example = strange[0] if strange else next(iter(tensors), "an empty file")
        count = len(strange) or len(tensors)
        raise ModelError(
            f"{count} of {len(tensors)} tensors fit no layer of {_kind(pipeline)}, for example "
            f"{example!r}: give a LoRA of this model"
        )
    return layers


def _kind(pipeline: Any) -> str:
    return type(pipeline).__name__


def _sorted(pipeline: Any, tensors: Mapping[str, Tensor]) -> tuple[Layers, list[str]]:
    """Sort tensors by layer; with them the keys that name none."""
    layers, strange, tables = Layers(), list[str](), dict[str, dict[str, str]]()
    for key, tensor in tensors.items():
        bare = key.removeprefix("base_model.model.")
        start, parts = next((s, p) for s, p in STARTS.items() if re.match(s, bare))
        part = next((p for p in parts if getattr(pipeline, p, None) is not None), None)
        found = KEY.fullmatch(re.sub(f"^(?:{start})", "", bare).removeprefix("base_model.model."))
        if part is None or found is None:
            strange.append(key)
            continue
        if part not in tables:
            modules = getattr(pipeline, part).named_modules()
            tables[part] = {n.replace(".", "_"): n for n, m in modules if hasattr(m, "weight")}
        layer = next((tables[part][n] for n in _spellings(found[1]) if n in tables[part]), None)
        name = found["own"] or str(found.lastgroup)
        if layer is None or name in layers.get((part, layer), {}):
            strange.append(key)
        else:
            layers.setdefault((part, layer), {})[name] = tensor
    return layers, strange


def _spellings(layer: str) -> Iterator[str]:
    """Yield what a layer may be called in the pipeline, dots as underscores."""
    flat = layer.replace(".", "_").replace("_processor_", "_")
    for name in (flat, flat.removeprefix("text_model_"), f"text_model_{flat}"):
        yield name
        yield f"{name}_0"  # to_out was a list later


def _translated(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let diffusers translate the original network's names; nothing if it cannot do all."""
    left, more = dict(tensors), {}
    if hasattr(pipeline, "unet"):
        more["unet_config"] = pipeline.unet.config
    if any("dora_scale" in key for key in tensors):  # which diffusers would leave out
        return {}
    try:
        found = pipeline.lora_state_dict(left, **more)
    except (ValueError, KeyError, AttributeError, IndexError):
        return {}
    weights, alphas = found if isinstance(found, tuple) else (found, None)
    if 0 < len(left) < len(tensors) or len(weights) < sum("alpha" not in k for k in tensors):
        return {}
    return weights | {k: torch.as_tensor(v) for k, v in (alphas or {}).items()}


def _scale(matrices: Matrices, settings: Mapping[str, Any], part: str, layer: str) -> float:
    """Find the factor of a layer's product: alpha over the rank; 1 if nothing is said of alpha."""
    named = {k.removeprefix(f"{part}."): v for k, v in settings.items()}
    ranks = [len(m) for name, m in matrices.items() if name == "A" or name.endswith("_b")]
    if not ranks and "r" not in named:
        return 1.0  # LoKr with whole factors
    rank = ranks[-1] if ranks else named["r"]
    patterns = (named.get("alpha_pattern") or {}).items()
    own = [v for name, v in patterns if re.fullmatch(rf"(.*\.)?({name})", layer)]
    alpha = (own or [named.get("lora_alpha", named.get("alpha", rank))])[0]
    if "alpha" in matrices:
        alpha = float(matrices["alpha"])
    return float(alpha) / (math.sqrt(rank) if named.get("use_rslora") else rank)


def _change(matrices: Matrices, scale: float, shape: torch.Size) -> Tensor:
    """Multiply out what LoHa (a Hadamard product) or LoKr (a Kronecker product) adds, [shape]."""
    m = {name: tensor.float() for name, tensor in matrices.items()}

    def factor(name: str, core: str) -> Tensor:
        if name in m:
            return m[name]
        a, b = m[f"{name}_a"], m[f"{name}_b"]
        if core in m:  # of a convolution
            return torch.einsum("ijkl,jr,ip->prkl", m[core], b, a)
        return a @ b.flatten(1)

    if "hada_w1_a" in m:
        whole = factor("hada_w1", "hada_t1") * factor("hada_w2", "hada_t2")
    else:
        w1, w2 = factor("lokr_w1", ""), factor("lokr_w2", "lokr_t2")
        whole = torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2)
    return scale * whole.reshape(shape)


def _product(matrices: Matrices, shape: torch.Size) -> None:
    """Try the sizes of a LoRA's matrices; RuntimeError if they do not make a weight."""
    down, up = (matrices[x].flatten(1).to("meta") for x in "AB")
    (up @ down).reshape(shape)


def _check(pipeline: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Compare what the pipeline holds with what was loaded, tensor by tensor."""
    lost = []
    for key, tensor in weights.items():
        part, _, rest = key.partition(".")
        layer, _, matrix = rest.removesuffix(".weight").rpartition(".")
        module: nn.Module = getattr(pipeline, part).get_submodule(layer)
        held: Any = getattr(module, matrix, {})
        if GIVEN not in held or not torch.equal(held[GIVEN].weight, tensor.to(held[GIVEN].weight)):
            lost.append(key)
    if lost:
        raise ModelError(
            f"{len(lost)} of {len(weights)} tensors of {name} did not reach {_kind(pipeline)}, for "
            f"example {lost[0]!r}"
        )
