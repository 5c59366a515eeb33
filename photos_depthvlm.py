"""Photos from whatever holds them: upright RGB, and the focal length in px that their EXIF data state."""

import base64
import contextlib
import io
import math
import os
import string
import struct
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# Beyond these fields of view, in degrees over the longer side, a focal length is a mistake (millimetres, most often).
FIELD_OF_VIEW = (1.0, 160.0)
CROPPED = 0.02  # an aspect ratio that differs by more from EXIF's is a crop's
SMALLEST_FILE = 32  # bytes; no image is shorter
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
FULL_FRAME_DIAGONAL = math.hypot(36, 24)  # mm, of the film that "35 mm equivalent" refers to
EXIF_IFD, EXIF_FOCAL_LENGTH, EXIF_FOCAL_LENGTH_35MM, EXIF_WIDTH, EXIF_HEIGHT = 0x8769, 37386, 41989, 40962, 40963
EXIF_FOCAL_PLANE_X_RESOLUTION, EXIF_FOCAL_PLANE_UNIT = 41486, 41488
MILLIMETRES = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # a focal plane resolution unit -> mm

Photo = Image.Image | str | Path | bytes | IO[bytes] | dict | np.ndarray | torch.Tensor


def open_photo(image: Photo, name: str) -> tuple[Image.Image, float | None]:
    """
    A photo -> upright RGB image and its EXIF focal length in px at the image's size (`None` without).

    image: a PIL image, a path, a URL, base64 text, the bytes of a file, an open binary file, a `{"bytes", "path"}` of
    `datasets`, or an array (see `from_array`). name: of the photo in messages. Raises `TypeError` for anything else,
    `ValueError` for what cannot be read.
    """
    source = image
    try:
        if isinstance(image, dict) and (image.get("bytes") is not None or image.get("path") is not None):
            image = image["bytes"] if image.get("bytes") is not None else image["path"]
        if isinstance(image, (str, Path)):
            image = image_file(image)
        if isinstance(image, (bytes, bytearray)):
            image = io.BytesIO(image)
        if isinstance(image, (np.ndarray, torch.Tensor)):
            image = from_array(image)
        elif isinstance(image, Path) or hasattr(image, "read"):
            image = open_image_file(image)
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"{name} is a {type(source).__name__}; pass a PIL image, a path, a URL, bytes, a file or an array"
            )
        if 0 in image.size:
            raise ValueError(f"its size is {image.size[0]}x{image.size[1]}")
        image.load()
        focal_length = exif_focal_length(image)
        return to_rgb(ImageOps.exif_transpose(image)), focal_length
    # RuntimeError is what AVIF's decoder raises, struct.error what broken EXIF does
    except (
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
        struct.error,
        Image.DecompressionBombError,
        HTTPException,
    ) as error:
        shown = f" ({str(source)[:200]!r})" if isinstance(source, (str, Path)) else ""
        known = not isinstance(error, UnidentifiedImageError)  # which names a Python object
        reason = " ".join(str(error).split())[:300] if known else "cannot identify its format"
        smaller = " of fewer pixels" if isinstance(error, Image.DecompressionBombError) else ""
        raise ValueError(
            f"{name}{shown} cannot be read as an image: {reason}; pass a whole, readable photo{smaller}"
        ) from error


def open_image_file(file: Path | IO[bytes]) -> Image.Image:
    """`Image.open` of a path or a binary file, HEIC included where pillow-heif is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        with open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            head = opened.read(12)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIC_BRANDS:
            raise
        try:
            import pillow_heif
        except ImportError as error:
            raise ValueError("HEIC is read by a package that is missing: pip install pillow-heif") from error
        pillow_heif.register_heif_opener()
        return Image.open(file)


def image_file(source: str | Path) -> Path | bytes:
    """The file that a path names, or the bytes of a URL or base64 text: whole, unlike `load_image`'s 8-bit RGB."""
    if os.path.isfile(source):
        return Path(source)
    if os.path.isdir(source):
        raise IsADirectoryError("it is a folder")
    source = str(source)
    if source.startswith(("http://", "https://")):
        source = quote(source, safe=string.punctuation)  # of what may not stand in a URL: spaces, umlauts
        with urlopen(Request(source, headers={"User-Agent": "depthvlm"}), timeout=60) as response:
            return response.read()
    try:
        data = base64.b64decode("".join(source.split(",")[-1].split()), validate=True)
    except ValueError:
        data = b""
    if len(data) < SMALLEST_FILE:  # a path, even if its letters happen to be base64
        raise FileNotFoundError("no such file")
    return data


def from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """
    `(H, W)`, `(H, W, C)` or `(C, H, W)` of 1, 3 or 4 channels: 8 bits, floats from 0 to 1, or 16 bits in gray.

    Raises `ValueError` for another shape, type or range, and where the first axis may be the channels as well as the
    last.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[-1] in (1, 3, 4):
        raise ValueError(f"an array of shape {shape} has its channels first or last; pass a PIL image instead")
    if array.ndim == 3 and shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if 0 in shape or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"an array of shape {shape} has no rows, columns and 1, 3 or 4 channels")
    array = array[..., 0] if array.shape[2:] == (1,) else array
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype} holds no grays")
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2):
        return Image.fromarray(array)
    top = 1 if array.dtype.kind in "bf" else 255
    if not (0 <= array.min() and array.max() <= top):  # false for NaN too
        raise ValueError(f"an array of {array.dtype} must hold values from 0 to {top}")
    return Image.fromarray((array * (255 / top) + 0.5).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
            raise ValueError("a float image must hold values from 0 to 1")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("an integer image must hold values from 0 to 65535")
        top = 1 if image.mode == "F" else 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def exif_focal_length(image: Image.Image) -> float | None:
    """
    Focal length in px at the image's size, from its 35 mm equivalent or its focal plane's resolution; else None.

    None too for a crop whose aspect ratio is no longer that of the tags; one that keeps it looks like a resized photo.
    """
    try:
        tags = image.getexif().get_ifd(EXIF_IFD)
        width, height = (float(tags.get(tag) or 0) for tag in (EXIF_WIDTH, EXIF_HEIGHT))
        if width and height:  # of the photo as taken; it may have been turned and resized since, but not cropped
            shorter = max(image.size) * min(width, height) / max(width, height)
            if abs(min(image.size) - shorter) > 1 + CROPPED * shorter:
                return None
        if equivalent := float(tags.get(EXIF_FOCAL_LENGTH_35MM, 0)):
            return plausible(focal_of_35mm(equivalent, image.size), max(image.size))
        unit = MILLIMETRES[int(tags.get(EXIF_FOCAL_PLANE_UNIT, 2))]
        focal_length = float(tags[EXIF_FOCAL_LENGTH]) * float(tags[EXIF_FOCAL_PLANE_X_RESOLUTION]) / unit
        if width and height:  # by the longer sides: it may have been turned
            return plausible(focal_length * max(image.size) / max(width, height), max(image.size))
        return plausible(focal_length * image.size[0] / (width or image.size[0]), max(image.size))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, SyntaxError, OSError):
        return None  # absent, or broken by some editor: the caller says that it assumed


def plausible(focal_length: float, longer_side: int) -> float | None:
    fov = view_of_focal(focal_length, longer_side)
    return focal_length if FIELD_OF_VIEW[0] <= fov <= FIELD_OF_VIEW[1] else None


def focal_of_view(fov: float, side: int) -> float:
    """Focal length in px of a camera that sees `fov` degrees over `side` px."""
    return side / 2 / math.tan(math.radians(fov) / 2)


def focal_of_35mm(millimetres: float, size: tuple[int, int]) -> float:
    """Focal length in px of a photo of `size` px from its 35 mm equivalent, which is defined over the diagonal."""
    return millimetres / FULL_FRAME_DIAGONAL * math.hypot(*size)


def view_of_focal(focal_length: float, side: int) -> float:
    """Field of view in degrees of a camera of `focal_length` px over `side` px."""
    return math.degrees(2 * math.atan2(side / 2, focal_length))
