"""The folder of a pipeline: what it holds, and what of it is lost, damaged or of another model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.lora import PICKLED

NETWORKS = ("unet", "transformer")  # what is trained is one of these parts
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTED = (*NETWORKS, *ENCODERS, "vae")  # the parts that have weights
LARGEST = ("text_encoder_3", "tokenizer_3")  # T5 of Stable Diffusion 3
OF_DIFFUSERS = "diffusion_pytorch_model"  # begins the names of its files of weights
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # by text to image
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # at the end of a file's name


def keys_of(file: Path) -> list[str]:
    """List the names of a file's tensors; none if it is damaged."""
    with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:
        return list(opened.keys())
    return []


def index_of(source: str, revision: str | None = None) -> dict[str, Any]:
    """Read a pipeline's model_index.json from its folder or hub id; ModelError if it names none."""
    if Path(source).is_dir():
        index = dict(DiffusionPipeline.load_config(source))
    else:
        index = dict(json.loads((folder_of(source, revision) / "model_index.json").read_text()))
    if "_class_name" not in index:
        raise ModelError("its model_index.json names no pipeline: fetch it again")
    return index


def folder_of(source: str, revision: str | None = None) -> Path:
    """Find a pipeline's folder, in the hub's cache if it is a hub id."""
    if Path(source).is_dir():
        return Path(source)
    return Path(hf_hub_download(source, "model_index.json", revision=revision)).parent


def held_variant(folder: Path, variant: str | None) -> str | None:
    """Return the variant if a network's folder has it, else one that it has."""
    held = _variants(folder)
    if variant in held or not held:
        return variant
    return min(held, key=str) if None not in held else None


def variant_of(folder: Path, variant: str | None) -> str | None:
    """Return the variant to load a pipeline's folder by: one that a part has in place of plain."""
    found = [held_variant(folder / part, variant) for part in WEIGHTED if (folder / part).is_dir()]
    return next((v for v in found if v), None)


def folder_remedy(folder: Path) -> str:
    """Say what a pipeline's folder lacks."""
    usual = "The folder needs model_index.json and safetensors weights that fit its configuration"
    return folder_fault(folder) or usual


def json_fault(file: Path) -> str | None:
    """Say that a file is no JSON."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{file} is no JSON ({error}): fetch it again"
    return None


def folder_fault(folder: Path, given: Sequence[str] = ()) -> str | None:
    """Say which parts of a pipeline's folder are lost, damaged or pickles; headers alone are read.

    given: parts that come from elsewhere.
    """
    index = dict[str, Any]()
    if folder.is_dir():
        with suppress(OSError, ValueError, TypeError):
            index = index_of(str(folder))
    lists = {n: v for n, v in index.items() if isinstance(v, (list, tuple)) and len(v) == 2}
    listed = {n: v for n, v in lists.items() if v[0] is None or isinstance(v[1], str)}
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    asked = kind._get_signature_keys(kind)[0] if kind else set()
    idle = {*UNUSED, *given, "transformer_2", "_class_name", *(n for n in LARGEST if n in listed)}
    held = [n for n, v in listed.items() if v[0]]
    if none := sorted({*asked, *listed}.difference(held, idle)):
        return f"model_index.json names no {', '.join(none)}: take a whole pipeline"
    parts = [n for n in held if n not in (*UNUSED, *given, "_class_name")]
    lost = [n for n in parts if not (folder / n).is_dir()]
    if lost:
        less = ", or set model.t5=false" * (not {*lost}.difference(LARGEST))
        parts_lost = f"{', '.join(lost)}, which model_index.json names"
        return f"The folder lacks {parts_lost}: fetch it again{less}"
    return next((fault for part in parts if (fault := _part_fault(folder / part))), None)


def _part_fault(folder: Path) -> str | None:
    """Say what a part of a pipeline lacks."""
    config = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    if folder.name in (*WEIGHTED, "scheduler") and not (folder / config).is_file():
        return f"{folder} lacks {config}: fetch it again"
    if (fault := network_fault(folder)) or folder.name not in WEIGHTED:
        return fault
    name = f"{'model' if folder.name in ENCODERS else OF_DIFFUSERS}*.safetensors"
    weights = any(folder.glob(name))
    return None if weights else f"{folder} has no weights ({name}): fetch it again"


def network_fault(folder: Path) -> str | None:
    """Say what is lost or damaged of a network's weights."""
    names = [f.name for f in folder.iterdir()]
    weights = [n for n in names if n.endswith(".safetensors")]
    tables = [n for n in names if re.search(r"\.safetensors\.index(\.\w+)?\.json$", n)]
    for table in tables:
        if fault := json_fault(folder / table):
            return fault
        shards = set(json.loads((folder / table).read_text())["weight_map"].values())
        if lost := sorted(shards.difference(names)):
            return f"{folder} lacks {', '.join(lost)}, a part of {folder.name}: fetch it again"
        whole = table.removesuffix(".index.json")
        if whole in weights and whole not in shards:
            return (
                f"{folder} holds its weights twice: in {whole}, and in the parts that {table} "
                "lists. Libraries differ in which they read: delete one of the two"
            )
    for name in weights:
        if not keys_of(folder / name):
            return f"{folder / name} is damaged or not complete: fetch it again"
    if not tables and any(SHARD.search(Path(n).stem) for n in weights):
        return f"{folder} lacks the index of its weights (.safetensors.index.json): fetch it again"
    if not weights and any(n.endswith(PICKLED) for n in names):
        what = f"Weights of {folder.name} are pickles, which can run code"
        return f"{what}: convert them to safetensors"
    return None


def _variants(folder: Path) -> set[str | None]:
    """Read the variants of a folder's weights off their names; None is the plain one."""
    stems = [SHARD.sub("", f.stem) for f in folder.glob("*.safetensors")]
    return {stem.partition(".")[2] or None for stem in stems}
