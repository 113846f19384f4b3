"""Encoded images to pixels in [-1, 1], and back."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, ImageStat, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    import torch

MAX_IMAGE_PIXELS = 2**26  # a larger image is refused before it is decoded
FORMATS = ("JPEG", "PNG", "WEBP", *(["AVIF"] if features.check("avif") else []))
_OTHERS = {  # what a file is instead, by its first bytes
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*": "a TIFF",
    b"MM\0*": "a TIFF",
    b"\0\0\0\x0cJXL": "a JPEG XL",
    b"\xff\x0a": "a JPEG XL",
    b"<": "HTML, SVG or XML, maybe the error page of a download",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` brings the image",
}
_PNG_TURNED = (b"eXIf", b"type exif", b"adobe.xmp")  # say how a PNG lies, even behind its pixels


class DataError(ValueError):
    """Bad user data. The message names the file, the row and the remedy."""


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode an AVIF, JPEG, PNG or WebP to RGB, upright by its EXIF, transparency over white.

    DataError, which calls it ``where``, is for any other file, a truncated one and a huge one.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is over {MAX_IMAGE_PIXELS} pixels")
        if (frames := _frames(image)) > 1:
            raise ValueError(f"it is an animation of {frames} frames")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            levels, clear = np.asarray(image).astype(np.int64), image.info.get("transparency", -1)
            image = Image.fromarray(np.where(levels == clear, 255, levels >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        unknown = isinstance(error, UnidentifiedImageError)
        raise DataError(
            f"{where}: the image cannot be read ({_kind(data) if unknown else error}); it "
            f"must be one complete AVIF, JPEG, PNG or WebP of at most {MAX_IMAGE_PIXELS} pixels: "
            "write it again or drop the row"
        ) from error


def _kind(data: bytes) -> str:
    """Say what data is that is no image we read."""
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "it is a HEIC, as phones write; export it as JPEG"
    found = next((kind for start, kind in _OTHERS.items() if data.startswith(start)), "")
    return f"it is {found}" if found else "it is of no known kind"


def _frames(image: Image.Image) -> int:
    """Count the pictures of an animation; those in a phone's JPEG (MPO) are views of one."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def picture_size(data: bytes, where: str) -> tuple[int, int]:
    """Read (height, width) of an upright picture, from its header; DataError as for decoding."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            plain = image.format == "PNG" and not any(mark in data for mark in _PNG_TURNED)
            if _frames(image) == 1 and (plain or image.format != "PNG"):  # or getexif() decodes it
                width, height = image.size if plain else upright_size(image)
                return height, width
    except Exception:  # the decoder says what is wrong
        pass
    width, height = decode_image(data, where).size
    return height, width


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Give (width, height) as EXIF's orientation turns the picture."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def is_picture(data: bytes) -> bool:
    """Tell whether data begins as an image that we read, unlike the error page of a download."""
    with suppress(DataError):
        return min(picture_size(data, "")) > 0
    return False


def one_colour(image: Image.Image | NDArray[np.uint8]) -> bool:
    """Tell whether no channel varies by more than 2 of 255 levels: there is no picture in it."""
    whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
    extremes = ImageStat.Stat(whole).extrema  # numpy takes many times as long
    return all(high - low <= 2 for low, high in extremes)


def one_colour_text(found: Sequence[str], total: int) -> str:
    """Say how many of all samples are of one colour, name the first ones, and what to do."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"{len(found)} of {total} samples are of one colour ({'; '.join(found[:3])}{more}): a "
        "safety checker hid the picture, or the autoencoder overflowed (set model.dtype=float32 "
        "or another model.vae)"
    )


def png(image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """Encode uint8 [H, W, 3] losslessly, with text that the file says of itself."""
    buffer, about = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        about.add_itxt(key, value)
    Image.fromarray(image).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def data_uri(encoded: bytes) -> str:
    """Write a PNG's bytes as a ``data:`` address, which needs no file."""
    return "data:image/png;base64," + b64encode(encoded).decode("ascii")


def stack_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Stack images of one size, at least one, to float32 [B, 3, height, width] in [-1, 1]."""
    import torch

    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
