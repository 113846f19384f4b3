"""Locate and identify a scorer's weights: a folder, or a repository on the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.run.disk import sha256_of
from inversion_dpo.run.words import counted

logger = logging.getLogger(__name__)
_CLIP = "text_projection"  # in transformers' spelling and in open_clip's
TENSORS = {  # scorer -> part of a name that a tensor of its weights has, and others' do not
    "clip": _CLIP,
    "pickscore": _CLIP,
    "hpsv2": _CLIP,
    "hpsv21": _CLIP,
    "imagereward": "blip.",
    "mps": "cross_model.",
    "geneval": "class_predictor.",
    "compbench": "text_decoder.",
    "compbench-spatial": "objectness_head.",
    "aesthetic": "layers.0.bias",
    "aesthetic25": "scoring_head.",
    "hpsv3": "rm_head.",
}


class ScorerError(ValueError):
    """A scorer cannot be loaded or gives no score; the text names it and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or a hub repository at a revision; safetensors only, no pickle is ever opened.

    scorer: its owner, for messages. path: folder or OWNER/NAME. revision: branch, tag or commit.
    """

    scorer: str
    path: str
    revision: str | None = None

    @classmethod
    def at(cls, scorer: str, place: str) -> Checkpoint:
        """Parse a folder, or OWNER/NAME with an optional @REVISION.

        Raises:
            ScorerError: a revision of a folder, which has none.
        """
        path, _, revision = place.partition("@")
        if Path(place).expanduser().is_dir():
            return cls(scorer, place)
        found = cls(scorer, path, revision or None)
        if revision and Path(path).expanduser().is_dir():
            raise ScorerError(found.complaint("a folder has no revision", "Leave out the @"))
        return found

    @property
    def folder(self) -> Path | None:
        """The folder, if the path is one; ScorerError if the path names a missing folder."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return path
        if self.path.startswith((".", "/", "~")):
            raise ScorerError(self.complaint("there is no such folder"))
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for ``from_pretrained`` of transformers."""
        place = str(self.folder or self.path)
        revision = {} if self.folder or not self.revision else {"revision": self.revision}
        return {"pretrained_model_name_or_path": place, **revision}

    def file(self, name: str) -> Path:
        """Return the path of a file, downloaded if necessary; ScorerError without such a file."""
        if self.folder:
            path = self.folder / name
            if not path.is_file():
                raise ScorerError(self.complaint(f"the folder has no {name}"))
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except GatedRepoError as error:
            reason = "the hub shows it only to those who accept its licence"
            text = "Do so on its page and log in (`hf auth login`)"
            raise ScorerError(self.complaint(reason, text)) from error
        except Exception as error:  # the hub's own errors and those of the network below
            raise ScorerError(self.complaint(" ".join(str(error).split())[:300])) from error

    def has(self, name: str) -> bool:
        """Tell whether a file exists; offline, whether it lies in the cache.

        Raises:
            ScorerError: the hub cannot be asked; a default must not stand in for its file.
        """
        try:
            self.file(name)
        except ScorerError as error:
            asked = not isinstance(error.__cause__, LocalEntryNotFoundError)
            absent = asked and isinstance(error.__cause__, EntryNotFoundError)
            if self.folder or absent or constants.HF_HUB_OFFLINE:
                return False
            raise
        return True

    def or_else(self, other: str, *files: str) -> Checkpoint:
        """Return another repository of the hub where this place has none of the files."""
        return self if any(map(self.has, files)) else Checkpoint(self.scorer, other)

    def weights(self) -> list[Path]:
        """Find the model's files on the hub: one, or those that an index names."""
        one, index = "model.safetensors", "model.safetensors.index.json"
        if self.has(one) or not self.has(index):
            return [self.file(one)]
        names = json.loads(self.file(index).read_text(encoding="utf-8"))["weight_map"].values()
        return [self.file(name) for name in sorted({*names})]

    def tensors(self, name: str = "model.safetensors") -> dict[str, Tensor]:
        """Load all tensors of a safetensors file; ScorerError for any other file."""
        try:
            return load_file(self.file(name))
        except SafetensorError as error:
            raise ScorerError(self.complaint(f"{name} is no safetensors file ({error})")) from error

    def check(self) -> None:
        """Look for weights, and download the hub's.

        Raises:
            ScorerError: there are none, they are damaged, or another network's.
        """
        files = [*self.folder.glob("*.safetensors")] if self.folder else self.weights()
        if not files:
            raise ScorerError(self.complaint("the folder has no .safetensors file"))
        names: list[str] = []
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    names += opened.keys()
            except (OSError, SafetensorError) as error:
                reason = f"{file.name} is no safetensors file ({error})"
                raise ScorerError(self.complaint(reason)) from error
        part = TENSORS.get(self.scorer, "")
        if not any(part in name for name in names):
            reason = f"these are another network's weights: no tensor's name has {part!r}"
            raise ScorerError(self.complaint(f"{reason}, the first is {min(names, default=None)}"))

    def identity(self) -> str:
        """Hash the folder's weights and settings, or return the commit on the hub."""
        if self.folder:
            files = sorted(p for e in ("safetensors", "json") for p in self.folder.glob(f"*.{e}"))
            digest = hashlib.sha256("".join(f"{f.name} {sha256_of(f)} " for f in files).encode())
            return digest.hexdigest()[:16]
        parts = self.weights()[0].parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else str(self.revision)

    def complaint(self, reason: str, remedy: str = "") -> str:
        """Write one line that names the key, the fault and the remedy."""
        at = f"@{self.revision}" if self.revision else ""
        usual = (
            "Give a folder or a hub repository with safetensors weights (docs/reference/scorers.md)"
        )
        where = f"evaluation.checkpoints.{self.scorer}={self.path}{at}"
        return f"{where}: {reason.rstrip('.')}. {remedy or usual}"


def device() -> str:
    """Name the accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded(kind: Any, checkpoint: Checkpoint, complete: bool = True, **settings: Any) -> Any:
    """Call transformers' ``from_pretrained``; a missing weight is an error, never random.

    Args:
        kind: a model, tokenizer or processor class.
        checkpoint: the weights or the tokenizer.
        complete: whether the class is a model, whose every weight must be there.
        settings: further arguments.

    Raises:
        ScorerError: the checkpoint cannot be loaded, or misses weights, settings or words.
    """
    if complete:
        checkpoint.file("config.json")  # without it transformers builds some other size
        settings |= {"output_loading_info": True, "use_safetensors": True}
    try:
        result = kind.from_pretrained(**checkpoint.arguments, **settings)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ScorerError(checkpoint.complaint(reason)) from error
    if not complete:
        words = getattr(result, "tokenizer", result)
        special = getattr(words, "all_special_ids", None)  # None: of no tokenizer
        if special is not None and len(words) <= len(special):  # made where files are missing
            raise ScorerError(checkpoint.complaint("its tokenizer has no vocabulary"))
        return result
    model, info = result
    if missing := sorted(info["missing_keys"]):
        raise ScorerError(
            checkpoint.complaint(
                f"{counted(len(missing), 'weight is', 'weights are')} missing, {missing[0]}"
            )
        )
    return model.eval().requires_grad_(False)


class Words:
    """Tokenize prompts, padded or cut to ``length``, and count those that lose their end."""

    def __init__(self, scorer: str, length: int) -> None:
        self.scorer, self.length = scorer, length
        self.read: dict[str, bool] = {}  # prompt -> whether it is cut

    def tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Any:
        """Return token numbers and mask, [B, length] each."""
        whole = tokenizer(list(prompts), verbose=False).input_ids
        self.read |= {p: len(n) > self.length for p, n in zip(prompts, whole, strict=True)}
        how = {"padding": "max_length", "truncation": True, "max_length": self.length}
        return tokenizer(list(prompts), **how, return_tensors="pt")

    def conclude(self) -> None:
        """Warn of the prompts that were cut, if any."""
        if cut := [prompt for prompt, is_cut in self.read.items() if is_cut]:
            logger.warning(
                "%s reads %d tokens: the end of %d of %d prompts does not count, such as %r",
                self.scorer,
                self.length,
                len(cut),
                len(self.read),
                cut[0],
            )
