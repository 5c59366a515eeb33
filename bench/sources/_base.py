"""What the sources share: how a frame is listed, what a loaded frame is, and reading below one raw folder.

Conventions, for all sources:
- A coordinate (u, v) counts columns and rows from the *centre* of the top-left pixel, which is (0, 0) (as in OpenCV).
  Sets that count from the pixel's edge (COLMAP, Waymo) are converted when read: c_centre = c_edge - 0.5.
- Camera frame: x right, y down, z forward (OpenCV). `depth` is z in metres, 0 = no measurement.
- The depth map keeps its own size, which may differ from the image's; both show the same field of view.
"""

import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ..geometry import Intrinsics

# The largest real image here is ETH3D's, 26 million pixels; past this a file is an attack or a mistake.
MAX_PIXELS = 64_000_000


class BadFrame(ValueError):
    """One frame that cannot be used; the message names the file and the reason. The build lists it and goes on."""


class BadRaw(ValueError):
    """A raw folder that is not what the source expects; the message says what is missing."""


class AbsentSplit(BadRaw):
    """A split that the raw folder has nothing of, as where it was not downloaded."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of a data set, listed without opening its pixels; picklable and cheap.

    id: unique within source and split. data: what the source's `load` needs (relative paths, numbers). problem: why the
    frame cannot be used, where the listing shows it; such a frame is reported and never loaded.
    """

    id: str
    scene: str
    camera: str = ""
    data: Any = None
    problem: str = ""


@dataclass(slots=True)
class Sample:
    """One loaded frame.

    image: the bytes of the file (JPEG or PNG, never re-encoded) or a uint8 array (H, W, 3).
    depth: (h, w) float32, z-depth in metres, 0 = no measurement; its size may differ from the image's.
    intrinsics: fx, fy, cx, cy in px of the image as stored.
    qa: question-answer pairs about the frame, each (kind, question, answer).
    """

    image: bytes | np.ndarray
    depth: np.ndarray
    intrinsics: Intrinsics
    qa: list[tuple[str, str, str]] = field(default_factory=list)


class Source:
    """A data set: a subclass states the facts below and writes `frames` and `load`; nothing else differs.

    A module `bench/sources/NAME.py` holds one subclass and names it `SOURCE`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    page: ClassVar[str]  # where the data is asked for
    licence: ClassVar[str]
    citation: ClassVar[str]  # authors, title, venue, year in a line
    layout: ClassVar[str]  # the folders and files expected below --raw, for people
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()  # (glob below the raw folder, what it is), for `bench check`
    splits: ClassVar[dict[str, tuple[str, ...]]]  # "train"/"test" -> the data set's official names of these splits
    depth_range: ClassVar[tuple[float, float]]  # valid metres, both ends included; outside becomes 0, never clipped
    depth_scale: ClassVar[float]  # stored 16-bit value / depth_scale = metres
    max_canonical_edge: ClassVar[int | None] = None  # centre crop after focal normalization in training (spec: 1024)

    def __init__(self, raw: str | Path):
        self.raw = Path(raw)
        if not self.raw.is_dir():
            raise BadRaw(f"raw folder {str(raw)!r} is not a directory; pass the folder that holds {self.title}")

    def frames(self, split: str) -> Iterator[Frame]:
        """Yield the split's frames lazily, in an order that no file system can change (sorted)."""
        raise NotImplementedError(f"{type(self).__name__}.frames")

    def load(self, frame: Frame) -> Sample:
        """Read one frame. Raises BadFrame, or OSError for a file that is missing or cannot be read."""
        raise NotImplementedError(f"{type(self).__name__}.load")

    # Reading, always below the raw folder

    def path(self, *parts: str) -> Path:
        """The file at `parts` below the raw folder; a path that leads out of it, by '..', '/' or a link, is refused."""
        return inside(self.raw, *parts)

    def read_bytes(self, *parts: str) -> bytes:
        return self.path(*parts).read_bytes()

    def read_text(self, *parts: str) -> str:
        return self.path(*parts).read_text(encoding="utf-8-sig")

    def read_image(self, *parts: str, size: tuple[int, int] | None = None) -> tuple[bytes, tuple[int, int]]:
        """An image file as it is, with its size (W, H) from its header.

        size: (W, H) that its intrinsics are given for; an image of another size raises BadFrame.
        """
        name, data = "/".join(parts), self.read_bytes(*parts)
        width, height = open_image(data, name).size
        if size not in (None, (width, height)):
            raise BadFrame(
                f"{name} is {width}x{height}, but its intrinsics are of {size[0]}x{size[1]} px; use the set's own image"
            )
        return data, (width, height)

    def read_depth16(self, *parts: str) -> np.ndarray:
        """A 16-bit single-channel PNG as stored: uint16 (h, w)."""
        return decode16(self.read_bytes(*parts), "/".join(parts))

    def listdir(self, *parts: str) -> list[str]:
        """Sorted names in a folder; hidden files left out."""
        return sorted(p.name for p in self.path(*parts).iterdir() if not p.name.startswith("."))

    def official_splits(self, split: str) -> tuple[str, ...]:
        """The data set's official names behind "train" or "test"."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


def inside(root: Path, *parts: str) -> Path:
    """`root / parts`, refused with BadFrame when it leads out of root (absolute, '..', or through a link)."""
    relative = Path(*parts)
    if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
        raise BadFrame(f"path {str(relative)!r} leads out of {root}; only paths below it are read")
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise BadFrame(
            f"path {str(relative)!r} leads out of {root} through a link; copy the file or pass the real folder"
        )
    return path


def import_package(module: str, package: str) -> ModuleType:
    """A module of a package of the extra `readers`, which few sources need. Raises ImportError with the command."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"this source is read with {package}; run: pip install {package}") from error


def pinhole(matrix: Any, name: str) -> Intrinsics:
    """fx, fy, cx, cy of a camera matrix fx 0 cx / 0 fy cy / 0 0 1, given as nine numbers or strings, nested or not.

    Raises BadFrame for another matrix; that the numbers are a camera's is checked for all sources alike, in `make_row`.
    """
    try:
        fx, skew, cx, zero, fy, cy, *last = np.asarray(matrix, dtype=np.float64).ravel().tolist()
    except (TypeError, ValueError) as error:
        raise BadFrame(f"{name} is not a 3x3 camera matrix ({error})") from error
    if (skew, zero, *last) != (0, 0, 0, 0, 1):
        raise BadFrame(
            f"{name} is not of the form fx 0 cx / 0 fy cy / 0 0 1, which fx, fy, cx, cy can express: {matrix}"
        )
    return fx, fy, cx, cy


def open_image(data: bytes, name: str) -> Image.Image:
    """Open, but do not decode, an encoded image; its size is checked first. Raises BadFrame."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise BadFrame(f"{name} is not a readable JPEG or PNG ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadFrame(f"{name} is {width}x{height}, more than {MAX_PIXELS} pixels; refused as a decompression bomb")
    return image


def pixels_of(image: Image.Image, name: str) -> np.ndarray:
    """The decoded pixels of an opened image. Raises BadFrame."""
    try:
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadFrame(f"{name} is truncated or broken ({error})") from error


def decode16(data: bytes, name: str) -> np.ndarray:
    """A 16-bit single-channel PNG -> uint16 (h, w); an 8-bit or colour file is refused: its depth is already lost."""
    image = open_image(data, name)
    if image.mode not in ("I;16", "I;16B", "I"):
        raise BadFrame(f"{name} has Pillow mode {image.mode!r}, not 16-bit gray; depth must be a 16-bit PNG")
    values = pixels_of(image, name)
    if values.min() < 0 or values.max() > 65535:
        raise BadFrame(f"{name} holds values outside 0..65535; depth must be a 16-bit PNG")
    return values.astype(np.uint16)
