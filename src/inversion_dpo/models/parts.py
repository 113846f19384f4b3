"""Parts of a pipeline from the files that people have, and what to do about damaged ones."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DDIMScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from torch import nn

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.folders import (
    ENCODERS,
    LARGEST,
    NETWORKS,
    OF_DIFFUSERS,
    SHARD,
    UNUSED,
    folder_remedy,
    held_variant,
    index_of,
    json_fault,
    keys_of,
    network_fault,
)
from inversion_dpo.models.intact import (
    WRAPPERS,
    check_loaded,
    check_settings,
    check_shapes,
    shapes_of,
)
from inversion_dpo.models.lora import NAMED, PICKLED, lora_file, read_lora
from inversion_dpo.models.lora_names import KEY
from inversion_dpo.models.one_file import (
    CLIPS,
    check_marks,
    configuration_of,
    network_in,
    unread_text,
)
from inversion_dpo.models.prompts import ImagesAndText
from inversion_dpo.run.config import resolve
from inversion_dpo.run.fields import ModelConfig

logger = logging.getLogger(__name__)
HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
SUFFIXES = (".safetensors", ".gguf", *PICKLED)
FITTING = (  # settings in which a part must be as the pipeline's own
    *("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim"),
    *("caption_channels", "cap_feat_dim", "text_dim", "text_hidden_dim"),
    *("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std"),
)
Kind = Literal["pipeline", "lora", "network"]
ALONE = {  # what is no pipeline, and what to do with it
    "lora": "This is a LoRA: set model.lora to it, and model.path to its base",
    "network": "This is one network: set model.network to it, and model.path to its base",
}


@contextmanager
def named(key: str, name: str) -> Iterator[None]:
    """Turn whatever goes wrong into one line that names the setting and the remedy."""
    try:
        yield
    except ModelError as error:
        told = f"{key}={name}" in str(error)
        raise ModelError(str(error) if told else f"{key}={name}: {error}") from error
    except Exception as error:  # damaged files and wrong names end in nearly any error
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        if "tiktoken" in reason:  # which transformers names where sentencepiece is not installed
            raise ModelError(
                f"{key}={name}: it has a tokenizer in SentencePiece's format alone, which needs "
                "two more packages: pip install sentencepiece protobuf"
            ) from error
        raise ModelError(
            f"cannot load {key}={name}: {reason}. {_remedy(error, key, name)}"
        ) from error


def check_place(path: str) -> None:
    """Refuse what is no folder, hub id or safetensors file; ModelError with the remedy."""
    place = Path(path)
    if place.suffix == ".gguf":
        raise ModelError("GGUF is not read: give bf16 safetensors, and set model.quantize")
    if place.suffix in PICKLED:
        raise ModelError("only .safetensors files are read: others can run code. Convert it")
    of_disk = path.startswith(("/", ".")) or place.suffix in SUFFIXES or not HUB.fullmatch(path)
    if of_disk and not place.exists():
        raise ModelError("nothing is there: give a folder, a .safetensors file or OWNER/NAME")
    if place.is_file() and place.suffix != ".safetensors" and not keys_of(place):
        raise ModelError(
            "it is no safetensors file, and no others are read: convert it, or fetch another one"
        )
    if place.is_file() and SHARD.search(place.stem):
        raise ModelError("this is one of several files: give the folder that holds them all")
    if place.exists() and kind_of(path) == "lora":
        raise ModelError(ALONE["lora"])


def kind_of(name: str) -> Kind | None:
    """Say what a file, folder or hub id holds; None if it is none of these."""
    place = Path(name).expanduser()
    if place.is_file():
        keys = keys_of(place)
        if not keys and place.suffix == ".safetensors":
            raise ModelError("it is damaged or not complete: fetch it again")
        if any(KEY.fullmatch(key) or key.startswith("lora_") for key in keys):
            return "lora"
        whole = any(WRAPPERS.sub("", key).startswith(CLIPS) for key in keys)
        return ("pipeline" if whole else "network") if keys else None
    if not place.exists() and HUB.fullmatch(name):
        place = Path(snapshot_download(name, allow_patterns=["*.json"]))
    if (place / "model_index.json").is_file():
        return "pipeline"
    if any((place / file).is_file() for file in (*NAMED, "adapter_config.json")):
        return "lora"
    if any((place / part / "config.json").is_file() for part in ("", *NETWORKS)):
        return "network"
    return "lora" if any(kind_of(str(f)) == "lora" for f in place.glob("*.safetensors")) else None


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline's folder, with the parts of its own folder that were never loaded."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    origin = Path(pipeline.config.get("_name_or_path") or os.devnull)
    if not (origin / "model_index.json").is_file():
        return
    theirs, ours = (json.loads((f / "model_index.json").read_text()) for f in (origin, folder))
    for name in UNUSED:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)
            ours[name] = theirs[name]
    checked = "requires_safety_checker"
    ours |= {checked: theirs[checked]} if checked in theirs else {}
    (folder / "model_index.json").write_text(json.dumps(ours, indent=2) + "\n")


def load_part(
    name: str, part: str, source: str, m: ModelConfig, read: bool = True
) -> nn.Module | None:
    """Load one network of a pipeline from a folder, a pipeline's folder, a hub id or a file.

    Args:
        name: where it is.
        part: its name in the pipeline, for example vae.
        source: the pipeline, which says the class, and how the network in a bare file is built.
        m: says precision and variant. A file of another variant is taken where only that is there.
        read: whether to read the weights. Without, configuration, names and shapes are compared.
    """
    path = os.path.expanduser(name)
    check_place(path)
    revision = m.revision if source == os.path.expanduser(m.path) else None
    index, precision = index_of(source, revision), getattr(torch, m.dtype)
    kind = getattr(diffusers, index[part][1])
    if Path(source).is_dir() and not (Path(source) / part / "config.json").is_file():
        raise ModelError(
            f"{source} has no {part}/config.json, which says what fits there: fetch that file; the "
            "weights beside it are not needed"
        )
    config = kind.load_config(source, subfolder=part, revision=revision)
    if Path(path).is_file():
        if part in NETWORKS:
            place = {"subfolder": "scheduler", "revision": revision}
            check_marks(path, DDIMScheduler.load_config(source, **place))  # any class reads it
        if read and part in NETWORKS and (text := unread_text(path, whole=False)):
            logger.warning(text)
        return network_in(path, part, kind, config, precision, read)
    first: Exception | None = None
    for how in _places(Path(path), part, m.variant):
        try:
            own = kind.load_config(path, **{k: v for k, v in how.items() if k != "variant"})
            _check_fit(kind, own, config)
            check_settings(part, kind, own)
            if not read:
                _check_held(kind, own, Path(path) / (how["subfolder"] or ""))
                return None
            network, info = kind.from_pretrained(
                path, use_safetensors=True, torch_dtype=precision, output_loading_info=True, **how
            )
        except OSError as error:
            first = first or error
        else:
            check_loaded(network, info["missing_keys"], info["unexpected_keys"])
            return cast(nn.Module, network)
    raise first or ModelError("there is no such network")


def _check_held(kind: Any, own: Mapping[str, Any], folder: Path) -> None:
    """Compare the names in a network's folder with its configuration's; of a hub id nothing."""
    if not folder.is_dir():
        return
    if fault := network_fault(folder):
        raise ModelError(fault)
    held = shapes_of(folder.glob(f"{OF_DIFFUSERS}*.safetensors"))
    if not held:
        raise ModelError(
            f"no file named {OF_DIFFUSERS}*.safetensors in {folder}: fetch its weights"
        )
    with init_empty_weights():
        network: nn.Module = kind.from_config(own)
    check_shapes(network, held, str(folder))
    names = network.state_dict().keys()
    if hasattr(network, "decoder"):  # of an autoencoder, whose former names diffusers knows
        check_loaded(network, () if len(held) >= len(names) else names - held.keys(), ())
    else:
        check_loaded(network, names - held.keys(), held.keys() - names)


def _places(folder: Path, part: str, variant: str | None) -> list[dict[str, str | None]]:
    """List the subfolders and variants to try: of a folder what is there, of a hub id all."""
    if not folder.is_dir():
        both = product((None, part), dict.fromkeys((variant, None, "fp16")))
        return [{"subfolder": subfolder, "variant": v} for subfolder, v in both]
    subfolder = part if (folder / part).is_dir() else None
    return [{"subfolder": subfolder, "variant": held_variant(folder / (subfolder or ""), variant)}]


def _check_fit(kind: Any, own: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a network that takes other inputs than the pipeline gives, or is of another class."""
    usual = {k: p.default for k, p in inspect.signature(kind).parameters.items() if k in FITTING}
    if "architectures" in own:  # of a text encoder
        own = {"_class_name": own["architectures"][0]}
    for key, value in {"_class_name": kind.__name__, **usual}.items():
        ours, theirs = (config.get(key, value) for config in (own, expected))
        if ours != theirs:
            raise ModelError(
                f"its {key} is {ours}, the pipeline's {theirs}: it belongs to another model"
            )


def given_parts(source: str, index: Mapping[str, Any], m: ModelConfig) -> dict[str, Any]:
    """List what ``from_pretrained`` is not to load: parts that are left out, or made otherwise.

    Args:
        source: the folder or hub id of the pipeline.
        index: model_index.json of it.
        m: says which parts are left out.
    """
    largest = (n for n in LARGEST if not m.t5 or index.get(n) == [None, None])
    left_out = (*UNUSED, "transformer_2", *largest)
    parts: dict[str, Any] = {n: None for n in left_out if n in index}
    if index.get("processor", ["", ""])[1] == ImagesAndText.__name__:
        how = {"subfolder": "processor", "revision": m.revision}
        parts["processor"] = ImagesAndText.from_pretrained(source, **how)
    return parts | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def skeleton(m: ModelConfig) -> Any:
    """Make the pipeline from configurations alone: no weight is read, its networks have none.

    Raises:
        ModelError: a configuration or tokenizer cannot be read.
    """
    path = os.path.expanduser(resolve(m.path))
    with named("model.path", m.path):
        source = configuration_of(path, m.config) if Path(path).is_file() else path
        index = index_of(source, m.revision)
        parts = given_parts(source, index, m)
        with init_empty_weights():
            for part in (*NETWORKS, *ENCODERS, "vae", "scheduler"):
                library, class_name = index.get(part) or ("", "")
                if part in parts or not library:
                    continue
                place = {"subfolder": part, "revision": m.revision}
                parts[part] = _without_weights(library, class_name, source, place)
        kind = getattr(diffusers, index["_class_name"])  # DiffusionPipeline reads Wan's transformer
        return kind.from_pretrained(source, revision=m.revision, **parts)


def _without_weights(library: str, name: str, source: str, place: dict[str, Any]) -> Any:
    """Make one part of a pipeline from its configuration.

    Args:
        library: diffusers or transformers.
        name: of its class in the library.
        source: folder or hub id of the pipeline.
        place: the part's subfolder, and the revision.
    """
    part, libraries = place["subfolder"], {"diffusers": diffusers, "transformers": transformers}
    made: Any = getattr(libraries.get(library), name, None)
    if made is None:
        raise ModelError(
            f"model_index.json asks for {library}.{name} as {part}, which is not there: name a "
            "class of diffusers or transformers, perhaps of a newer version"
        )
    if library == "transformers":
        about, _ = made.config_class.get_config_dict(source, **place)
        check_settings(part, made.config_class, about)
        return made(made.config_class.from_pretrained(source, **place))
    about = made.load_config(source, **place)
    if part != "scheduler" and (own := about.get("_class_name", name)) != name:
        raise ModelError(
            f"model_index.json says that {part} is {name}, and its config.json {own}: one of the "
            "two is of another model"
        )
    check_settings(part, made, about)
    return made.from_config(about)


def check_encoders(pipeline: Any, folder: Path, variant: str | None) -> None:
    """Refuse text encoders that their files fill in part; the library draws the rest at random.

    Args:
        pipeline: from the folder's configurations, with or without weights.
        folder: of the pipeline.
        variant: of the files that are read, where a part has it.

    Raises:
        ModelError: counts what is missing, with an example.
    """
    for part in ENCODERS:
        encoder, place = getattr(pipeline, part, None), folder / part
        if encoder is None or not any(place.glob("*.safetensors")):
            continue
        how = {"use_safetensors": True, "device_map": "meta", "output_loading_info": True}
        read = type(encoder).from_pretrained
        told = read(place, variant=held_variant(place, variant), **how)[1]  # by headers alone
        lost = sorted(n for n in told["missing_keys"] if not n.startswith("lm_head"))  # unread
        if lost:
            kind, beside = type(encoder).__name__, min(told["unexpected_keys"], default="")
            others = f". It holds others, for example {beside!r}" if beside else ""
            raise ModelError(
                f"{place} lacks {len(lost)} of the weights that {kind} has, for example "
                f"{lost[0]!r}{others}: fetch it again, or save it with {kind}.save_pretrained"
            )


def check_lora(m: ModelConfig, name: str, key: str) -> None:
    """Check that a LoRA fits the model's layers, from configurations alone; ModelError if not.

    Args:
        m: the model.
        name: file, folder or hub id of the LoRA.
        key: the setting that names it, for the error.
    """
    pipeline = skeleton(m)
    with named(key, name):
        read_lora(pipeline, lora_file(name))


def _remedy(error: Exception, key: str, name: str) -> str:
    """Say what to do about an error, from its text and from what lies at the place."""
    text, place = " ".join(str(error).split()), Path(resolve(name)).expanduser()
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    damaged = [f for f in files if f.suffix == ".safetensors" and not keys_of(f)]
    if damaged:
        return f"{damaged[0]} is damaged or not complete: fetch it again"
    if isinstance(error, GatedRepoError):
        return "Accept its licence on the hub and log in (hf auth login)"
    if key == "model.path" and not place.is_file():
        if (place / "adapter").is_dir():
            whole = (place / "adapter" / "model_index.json").is_file()
            base = "model.path" if whole else "model.path to its base, and model.lora"
            return f"This is a run: set {base} to its adapter/"
        with suppress(Exception):  # a hub id that is not reached
            if (kind := kind_of(name)) in ALONE:
                return ALONE[str(kind)]
    if fault := next((f for file in place.rglob("*.json") if (f := json_fault(file))), None):
        return fault
    if place.is_file() and key == "model.path":
        return (
            "Set model.config to the folder or hub id of a diffusers pipeline of this family; of a "
            "file with one network set model.network instead"
        )
    if re.search("not fully cached|outgoing traffic|(?i:connect)|not appear to have", text):
        return (
            "Check the name and model.revision; it is neither a folder here nor in the hub's cache "
            f"(HF_HOME), and the hub is not reached: download it first (hf download {name})"
        )
    if "variant=" in text:
        return "Set model.variant to one that is there, or to null"
    if place.is_dir() and key == "model.path":
        return folder_remedy(place)
    if place.is_file():
        return "Give a file of the same model as the pipeline in model.path"
    folders = [place, *(place / part for part in (*NETWORKS, "vae"))]
    if fault := next((f for p in folders if p.is_dir() and (f := network_fault(p))), None):
        return fault
    if "no file named" in text and ".safetensors" in text:
        return (
            "Set model.variant if its files carry one, e.g. fp16; weights in .bin are not opened: "
            "convert them to safetensors"
        )
    return "It needs config.json and safetensors weights of this model"
