"""Which photos and videos a command line names, and what their predictions are called."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import videos

PHOTO_SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .avif .heic .heif .hif .tif .tiff .bmp .gif .jp2 .ppm .pgm".split()
)


def is_url(photo: str) -> bool:
    return photo.startswith(("http://", "https://"))


def is_video(photo: str) -> bool:
    return not is_url(photo) and Path(photo).suffix.lower() in videos.SUFFIXES


def find_sources(photos: list[str], output: Path, recursive: bool) -> tuple[list[tuple[str, Path]], list[str]]:
    """
    (photo, stem of its files below `output`) of each photo and video, folders opened, and lines on what was left out.

    Stems are distinct on any file system; within a folder they keep its subfolders.
    """
    sources, left_out, seen, taken = [], [], set(), set()

    def add(photo: str, stem: Path) -> None:
        key = photo if is_url(photo) else os.path.abspath(photo)
        if key in seen:
            return
        seen.add(key)
        name, number = stem, 1
        while str(name).casefold() in taken:
            number += 1
            name = stem.with_name(f"{stem.name}-{number}")
        taken.add(str(name).casefold())
        sources.append((photo, output / name))

    for photo in photos:
        if is_url(photo):
            name = Path(unquote(urlsplit(photo).path)).stem
            add(photo, Path(re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "photo"))
        elif not os.path.isdir(photo):
            add(photo, Path(Path(photo).stem))
        else:
            others = Counter()
            for path in walk(photo, output.resolve(), recursive, others):
                add(str(path), path.relative_to(photo).with_suffix(""))
            left_out += [f"{photo}: left out {number} {what}" for what, number in others.items() if number]
    return sources, left_out


def walk(root: str, output: Path, recursive: bool, others: Counter) -> Iterator[Path]:
    """Photos and videos below a folder, without those in `output`; what else lies there is counted in `others`."""
    for folder, subfolders, files in os.walk(root):
        visible = [name for name in (*subfolders, *files) if not name.startswith(".")]
        others["hidden ones"] += len(subfolders) + len(files) - len(visible)
        subfolders[:] = [
            name for name in sorted(subfolders) if name in visible and Path(folder, name).resolve() != output
        ]
        if not recursive:
            others["folders, for which there is --recursive"] += len(subfolders)
            subfolders.clear()
        for path in (Path(folder, name) for name in sorted(files) if name in visible):
            if path.suffix.lower() in PHOTO_SUFFIXES | videos.SUFFIXES:
                yield path
            else:
                others[f"files {path.suffix or 'without a suffix'}"] += 1
