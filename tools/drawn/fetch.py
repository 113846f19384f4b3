"""Fetch the pictures of two hands: ``python -m tools.drawn.fetch --output FOLDER``.

The npm packages ``emoji-datasource-google`` (Noto, Apache-2.0) and ``emoji-datasource-twitter``
(Twemoji, CC BY 4.0) come in a pinned version. Their bytes must have the digests written here, which
are the registry's ``dist.integrity``. Nothing is unpacked to disk: pictures and names are read from
the archive and written into one file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from inversion_dpo.run.disk import atomic_bytes, atomic_save

VERSION = "16.0.0"
PACKAGES = {  # hand -> package's last word, sha512 in base64
    "noto": (
        "google",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "twemoji": (
        "twitter",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
}
HANDS = tuple(PACKAGES)
SIZE = 64
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")
MOST = 1 << 22  # bytes of one file of an archive


class FetchError(RuntimeError):
    """An archive could not be fetched or is not the one that is pinned."""


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points, its name and category in words, and its place in the file."""

    code: str
    name: str
    category: str
    row: int


def registry() -> str:
    """Return npm's registry; ``npm_config_registry`` names another, as for npm itself."""
    return os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")


def archive(hand: str, folder: Path) -> bytes:
    """Return a package's archive, from ``folder`` or the registry; FetchError if it is spoiled."""
    word, digest = PACKAGES[hand]
    name = f"emoji-datasource-{word}"
    path = folder / f"{name}-{VERSION}.tgz"
    if path.exists():
        data = path.read_bytes()
    else:
        address = f"{registry()}/{name}/-/{path.name}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            raise FetchError(
                f"{address}: {error}; check the network, or npm_config_registry"
            ) from error
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != digest:
        raise FetchError(
            f"{path}: not the archive that is pinned (its sha512 differs): remove the file and run "
            "the command again"
        )
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_bytes(data, path)
    return data


def read_archive(data: bytes, word: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return emoji.json and the 64-pixel pictures by file name; any other file is passed over."""
    about: list[dict[str, Any]] = []
    pictures = {}
    wanted = re.compile(rf"package/img/{word}/{SIZE}/([0-9a-f-]+\.png)")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            found = wanted.fullmatch(member.name)
            if not member.isreg() or not (found or member.name == "package/emoji.json"):
                continue
            if member.size > MOST:
                raise FetchError(f"{member.name}: {member.size} bytes, at most {MOST} are expected")
            file = tar.extractfile(member)
            content = file.read() if file else b""
            if found:
                pictures[found[1]] = content
            else:
                about = json.loads(content)
    return about, pictures


def on_white(png: bytes) -> NDArray[np.uint8]:
    """Decode a picture and lay it on white: uint8 [64, 64, 3]."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.size != (SIZE, SIZE):
            raise FetchError(f"a picture of {image.size} pixels where {SIZE}x{SIZE} is expected")
        layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    return np.asarray(Image.alpha_composite(ground, layer).convert("RGB"))


def words(text: str) -> str:
    """Lower-case words with single spaces: ``"YO-YO"`` -> ``"yo yo"``."""
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", text.lower().replace("&", "and")).split())


def wanted(entry: dict[str, Any]) -> bool:
    """Say whether an emoji takes part: one character, of a category that does, by both hands."""
    both = all(entry.get(f"has_img_{word}") for word, _ in PACKAGES.values())
    return both and entry["category"] in CATEGORIES and "200D" not in entry["unified"].split("-")


def collect(archives: dict[str, bytes]) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Return pictures [N, 2, 64, 64, 3] in the order of HANDS, and code, name and category each."""
    read = {hand: read_archive(archives[hand], PACKAGES[hand][0]) for hand in HANDS}
    kept: dict[str, dict[str, str]] = {}
    images = []
    for entry in sorted(read[HANDS[0]][0], key=lambda e: e["unified"]):
        name = words(entry["name"])
        if not wanted(entry) or name in kept:
            continue
        kept[name] = {"code": entry["unified"], "category": words(entry["category"]), "name": name}
        images.append(np.stack([on_white(read[hand][1][entry["image"]]) for hand in HANDS]))
    if not kept:
        raise FetchError("the archives hold no emoji that takes part")
    return torch.from_numpy(np.stack(images)), list(kept.values())


def fetch(folder: Path) -> Path:
    """Write ``pictures.safetensors`` into ``folder`` unless it is there."""
    path = folder / "pictures.safetensors"
    if not path.exists():
        images, about = collect({hand: archive(hand, folder) for hand in HANDS})
        atomic_save({"images": images}, path, {"emoji": json.dumps(about)})
    return path


def load(path: Path) -> tuple[torch.Tensor, list[Emoji]]:
    """Read what :func:`fetch` wrote: pictures uint8 [N, 2, 64, 64, 3] and their emoji."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["emoji"])
        return file.get_tensor("images"), [Emoji(**e, row=k) for k, e in enumerate(about)]


def main() -> None:
    """Fetch, check and read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="archives and pictures")
    path = fetch(parser.parse_args().output)
    print(f"{len(load(path)[1])} emoji by {' and '.join(HANDS)} in {path}")


if __name__ == "__main__":
    main()
