"""The PNG files of ``inversion-dpo sample``: each says what it shows and how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.data.images import png
from inversion_dpo.evaluation.samples import commits_of, model_places
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.sampler import Prompt, Sampler
from inversion_dpo.run.config import Config
from inversion_dpo.run.disk import atomic_bytes
from inversion_dpo.run.faults import memory_advice
from inversion_dpo.run.fields import ConfigError
from inversion_dpo.run.folder import occupied


@dataclass(frozen=True)
class SampleFile:
    """A file to be: its prompt and seed, and a hash of all that decides its image."""

    path: Path
    prompt: str
    seed: int
    digest: str

    @property
    def text(self) -> dict[str, str]:
        """What the PNG says, as text chunks."""
        return {"prompt": self.prompt, "seed": str(self.seed), "inversion-dpo": self.digest}

    def write(self, image: NDArray[np.uint8]) -> None:
        """Write the image, whole or not at all."""
        atomic_bytes(png(image, self.text), self.path, shared=True)


def sample_files(
    config: Config,
    adapter: Path | None,
    folder: Path,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sources: Sequence[Image.Image | None],
) -> list[SampleFile]:
    """Name the file of each image, and hash what decides it.

    The weights count by the names, sizes and times of their files: to hash them takes longer than
    to sample a few images.

    Args:
        config: of it ``model``, and the steps and guidance of ``evaluation``.
        adapter: folder of the policy; None: the model as it is.
        folder: of the files.
        prompts: texts, or scene graphs with their captions.
        seeds: one for each prompt.
        sources: the image that each prompt edits; nothing, or None each, where none does.
    """
    e, named = config.evaluation, model_places(config, adapter)
    places = [Path(name).expanduser() for name in named]
    tree = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in tree if f.is_file()]
    how = f"{config.model} {e.sample_steps} {e.guidance_scale} {weights}"
    how += f" {commits_of(config, named)}"
    found = []
    for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        graph = prompt if isinstance(prompt, SceneGraph) else None
        source = sources[k] if sources else None
        text = f"{how} {graph.to_json() if graph else ''} {graph.caption if graph else prompt}"
        pixels = source.convert("RGB").tobytes() if source else b""
        digest = hashlib.sha256(text.encode() + pixels).hexdigest()[:16]
        caption = graph.caption if graph else str(prompt)
        found.append(SampleFile(folder / f"{seed:06d}.png", caption, seed, digest))
    return found


def missing(files: Sequence[SampleFile]) -> list[int]:
    """List, by place, the files that are not there yet.

    Raises:
        ConfigError: one is there and shows something else; it is not replaced.
    """
    absent = []
    for k, file in enumerate(files):
        if not file.path.exists():
            absent.append(k)
        elif said(file.path) != file.text:
            raise ConfigError(
                f"{file.path} is there and is not replaced: it was made with another prompt, seed, "
                f"model or setting than {file.prompt!r} has now. Delete it, or choose another "
                "--output"
            )
    return absent


def draw(
    sampler: Sampler,
    files: Sequence[SampleFile],
    prompts: Sequence[Prompt],
    sources: Sequence[Image.Image | None],
) -> None:
    """Draw the files that are missing, in batches; each batch is kept when it is made.

    Args:
        sampler: of the model and its settings.
        files: all of them, in one folder.
        prompts: one for each file.
        sources: the image that each prompt edits, or nothing.

    Raises:
        BusyError: another command draws into that folder.
        ConfigError: one drew a file there meanwhile, with another prompt or other settings.
    """
    size = sampler.config.evaluation.batch_size
    sampler.warn_of_cut(prompts)
    with occupied(files[0].path.parent, run=False):
        places = missing(files)
        for first in range(0, len(places), size):
            part = places[first : first + size]
            given, seeds = [prompts[k] for k in part], [files[k].seed for k in part]
            edited = [sources[k] for k in part] if sources else []
            with memory_advice("sampling"):
                images = sampler.draw(given, seeds, sources=edited, desc="sample")
            for k, image in zip(part, images, strict=True):
                files[k].write(image)


def said(path: Path) -> dict[str, str]:
    """Read what a PNG of ``sample`` says of itself; nothing if it is none."""
    try:
        with Image.open(path) as image:
            text = {str(k): str(v) for k, v in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError):
        return {}
    return text
