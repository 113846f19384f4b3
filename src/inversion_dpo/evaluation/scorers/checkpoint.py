"""Where a scorer's weights are, and what identifies them: a folder, or a repository of the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.run.disk import sha256_of


class ScorerError(ValueError):
    """A scorer that cannot be loaded or that gave no score; names it and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or a hub repository at a revision; safetensors only, no pickle is ever opened.

    scorer: whose it is, for messages. path: folder or OWNER/NAME. revision: branch, tag or commit.
    """

    scorer: str
    path: str
    revision: str | None = None

    @classmethod
    def at(cls, scorer: str, place: str) -> Checkpoint:
        """A folder, or OWNER/NAME with an optional @REVISION."""
        path, _, revision = place.partition("@")
        return cls(scorer, path, revision or None)

    @property
    def folder(self) -> Path | None:
        """The folder, if it is one; ScorerError if the path can only be one that is missing."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return path
        if self.path.startswith((".", "/", "~")):
            raise ScorerError(self.complaint("there is no such folder"))
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` of transformers takes."""
        place = str(self.folder or self.path)
        revision = {} if self.folder or not self.revision else {"revision": self.revision}
        return {"pretrained_model_name_or_path": place, **revision}

    def file(self, name: str) -> Path:
        """A file of it, downloaded if need be; ScorerError if there is none."""
        if self.folder:
            path = self.folder / name
            if not path.is_file():
                raise ScorerError(self.complaint(f"the folder has no {name}"))
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except Exception as error:  # the hub's own errors and those of the network below
            raise ScorerError(self.complaint(" ".join(str(error).split())[:300])) from error

    def has(self, name: str) -> bool:
        """Whether there is such a file; on the hub, whether it is downloaded or can be."""
        try:
            self.file(name)
        except ScorerError:
            return False
        return True

    def tensors(self, name: str = "model.safetensors") -> dict[str, Tensor]:
        """All tensors of a safetensors file; ScorerError if it is none."""
        try:
            return load_file(self.file(name))
        except SafetensorError as error:
            raise ScorerError(self.complaint(f"{name} is no safetensors file ({error})")) from error

    def identity(self) -> str:
        """A hash of the folder's weights and settings, or the commit on the hub."""
        if self.folder:
            files = sorted(p for e in ("safetensors", "json") for p in self.folder.glob(f"*.{e}"))
            digest = hashlib.sha256("".join(f"{f.name} {sha256_of(f)} " for f in files).encode())
            return digest.hexdigest()[:16]
        parts = self.file("model.safetensors").parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else str(self.revision)

    def complaint(self, reason: str) -> str:
        """One line that names the key, what is wrong and what to do."""
        at = f"@{self.revision}" if self.revision else ""
        return (
            f"evaluation.checkpoints.{self.scorer}={self.path}{at}: {reason}. Give a folder or a "
            "hub repository with safetensors weights (docs/reference/scorers.md)"
        )


def loaded(kind: Any, checkpoint: Checkpoint, complete: bool = True, **settings: Any) -> Any:
    """``kind.from_pretrained`` of transformers; a weight that is missing is an error, not random.

    Args:
        kind: a model or tokenizer class.
        checkpoint: where from.
        complete: whether every weight of the model must be there.
        settings: further arguments.
    """
    if complete:
        settings |= {"output_loading_info": True, "use_safetensors": True}
    try:
        found = kind.from_pretrained(**checkpoint.arguments, **settings)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ScorerError(checkpoint.complaint(reason)) from error
    if not complete:
        return found
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise ScorerError(checkpoint.complaint(f"{len(missing)} weights are missing, {missing[0]}"))
    return model.eval().requires_grad_(False)
