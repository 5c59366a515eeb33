"""The released annotations (JSONL) -> rows of FEATURES, with every point's grid and every depth's kind resolved.

Read are the official DepthVLM-Bench records and DepthLM's records of iBims-1. `python -m bench import` writes them;
bench/README.md says what is corrected, and what `as_released` keeps.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build, released
from .geometry import change_grid, ray_per_z
from .sources import _sun as sun
from .sources._base import MAX_PIXELS, BadFrame, Frame, Sample, Source, decode16, inside, open_image

RAY_SOURCES = ("argoverse2", "waymo")  # called "z_depth" there, but measured along the ray
ROTATED_SOURCES = ("sunrgbd", "nyuv2")  # word / 8000, although the word is millimetres with its bits rotated left by 3
MAX_LINE = 16 << 20  # bytes; a record with 10 000 points has 0.4 million


@dataclass(frozen=True)
class AnnotationReader:
    """Reads the row of one record; picklable. images, depths: the only folders read."""

    source: type[Source]
    split: str
    images: Path
    depths: Path | None
    as_released: bool = False

    def plan(self, annotations: Path) -> tuple[dict, Iterator[tuple[Frame, int]]]:
        """What decides the output, for the record; and the file's records as frames."""
        if not re.fullmatch(r"train|test", self.split):
            raise ValueError(f"split {self.split!r} is not train or test")
        for folder in (self.images, self.depths):
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{folder} is not a folder")
        count, content = 0, hashlib.sha256()
        for _, line in read_lines(annotations):
            count += 1
            content.update(line)
        if not count:
            raise ValueError(f"{annotations} holds no record")
        parameters = {
            "images": count,
            "images_listed": count,
            "annotations": content.hexdigest(),
            "as_released": self.as_released,
            "depth_range": list(self.source.depth_range),
            "depth_scale": self.source.depth_scale,
        }
        return parameters, ((Frame(f"line-{n}", "", "", line), 0) for n, line in read_lines(annotations))

    def __call__(self, frame: Frame, n_points: int) -> tuple[dict, np.ndarray]:
        record = parse(frame.data)
        image_path = text(record, "image") or text(record, "image_path")
        if not image_path:
            raise BadFrame("the record has no image")
        image = read(self.images, image_path)
        size = open_image(image, image_path).size
        kind = "z"
        if record.get("depth_path") is None and record.get("intrinsics") is not None:
            intrinsics, depth, points = self._depthlm(record, size)
        else:
            intrinsics, depth, points = self._official(record, size)
            kind = "ray" if self.as_released and self.source.name in RAY_SOURCES else "z"
        name = re.sub(r"[^A-Za-z0-9_./-]", "_", str(Path(image_path.lstrip("/")).with_suffix("")))
        listed = Frame(
            f"{frame.id}/{name}", text(record, "scene") or text(record, "scene_id") or "", text(record, "camera") or ""
        )
        row, stored = build.make_row(self.source, self.split, listed, Sample(image, depth, intrinsics))
        row["depth_type"] = kind
        if self.split == "test":
            row |= dict(zip(("points_u", "points_v", "points_depth"), points, strict=True))
        return row, stored

    def _official(self, record: dict, size: tuple[int, int]):
        """Intrinsics (px of the image), depth (h, w) and points (u, v, depth) of an official record."""
        if self.depths is None:
            raise BadFrame("the record names a depth map; give --depths, the folder that depth_path starts from")
        image_size, depth_size = size_of(record, "original_rgb_size"), size_of(record, "original_depth_size")
        if image_size != size:
            raise BadFrame(f"the image is {size}, its record says {image_size}; --images holds other files")
        if record.get("original_fx") is None or record.get("canonical_size") is None:
            raise BadFrame("original_fx or canonical_size is null: the focal length of this image is not known")
        focal = number(record, "original_fx")
        if self.as_released:
            canonical = size_of(record, "canonical_size")
            try:
                focal = released.focal_length(focal, size, canonical)
            except ValueError as error:
                raise BadFrame(str(error)) from error
        intrinsics = (focal, focal, (size[0] - 1) / 2, (size[1] - 1) / 2)  # fy and the centre were not released

        scale = number(record, "depth_scale") if "depth_scale" in record else 1000.0  # the released reader's default
        rotated = self.source.name in ROTATED_SOURCES and scale == 8000 and not self.as_released
        unmasked = self._depth_map(record, depth_size, scale, rotated)
        depth = unmasked.copy()
        for key in ("mask_valid_path", "mask_transp_path"):
            if record.get(key) is not None:
                depth[self._mask(text(record, key), depth_size) == 0] = 0  # despite one's name, 0 means reject

        points = (np.zeros(0),) * 3
        if self.split == "test":
            columns, rows, metres = points_of(record, depth_size)
            if rotated:
                metres = sun.metres(np.rint(metres * scale).astype(np.uint16))
                true = metres <= self.source.depth_range[1]  # farther than the word / 8000 that they passed for
                columns, rows, metres = columns[true], rows[true], metres[true]
            self._check_points(columns, rows, metres, depth)
            if self.as_released:
                points = released.scored_points(columns, rows, metres, unmasked, size, canonical)
                if not len(points[0]):
                    raise BadFrame("all points fall outside canonical_size by rounding; the released scorer counts 0")
            else:
                points = (*change_grid(columns, rows, depth_size, size), metres)
        if self.as_released or self.source.name not in RAY_SOURCES:
            return intrinsics, depth, points
        u, v, metres = points
        pixels = np.arange(depth_size[0])[None, :], np.arange(depth_size[1])[:, None]
        grid = change_grid(*pixels, depth_size, size)
        return intrinsics, depth / ray_per_z(*grid, intrinsics), (u, v, metres / ray_per_z(u, v, intrinsics))

    def _depth_map(self, record: dict, size: tuple[int, int], scale: float, rotated: bool) -> np.ndarray:
        """(h, w) float32 metres; what lies outside the source's range is 0, as in the released reader."""
        path, width, height = text(record, "depth_path"), *size
        if not path:
            raise BadFrame("the record has no depth_path")
        if record.get("depth_format") == "binary_float32":
            size_in_bytes = inside(self.depths, path.lstrip("/")).stat().st_size
            if size_in_bytes != 4 * width * height:
                raise BadFrame(f"{path} has {size_in_bytes} bytes, not {width} x {height} float32")
            depth = np.frombuffer(read(self.depths, path), dtype="<f4").reshape(height, width) / np.float32(scale)
            if np.isnan(depth).any() or (depth < 0).any():
                raise BadFrame(f"{path} holds NaN or negative depth")
        elif record.get("depth_format") is None:
            stored = decode16(read(self.depths, path), path)
            if stored.shape != (height, width):
                raise BadFrame(f"{path} is {stored.shape[::-1]}, its record says {size}; --depths holds other files")
            depth = sun.metres(stored) if rotated else stored.astype(np.float32) / np.float32(scale)
        else:
            raise BadFrame(f"depth_format {record['depth_format']!r} is not known")
        low, high = self.source.depth_range
        return np.where((depth >= low) & (depth <= high), depth, np.float32(0))

    def _mask(self, path: str, size: tuple[int, int]) -> np.ndarray:
        mask = np.asarray(open_image(read(self.depths, path), path).convert("L"))
        if mask.shape != size[::-1]:
            raise BadFrame(f"{path} is {mask.shape[::-1]}, the depth map {size}")
        return mask

    def _check_points(self, columns, rows, metres, depth) -> None:
        """The points were drawn from this very map, so they must be found in it: else grid or files are others."""
        wrong = np.abs(depth[rows, columns] - metres) > 1e-3  # the records round to 1e-4
        if wrong.any():
            column, row, recorded = columns[wrong][0], rows[wrong][0], metres[wrong][0]
            raise BadFrame(
                f"the depth map has {depth[row, column]:.4f} m at column {column}, row {row}, where the record says "
                f"{recorded:.4f} m: not the map that the points were drawn from"
            )

    def _depthlm(self, record: dict, size: tuple[int, int]):
        """DepthLM releases points without a map: the map written for them holds these points alone."""
        if self.source.name != "ibims1":
            raise BadFrame(
                "DepthLM's records are read for ibims1 only: those of other sets hold ray distances or wrong scales"
            )
        values = numbers(record["intrinsics"], "intrinsics")
        if len(values) != 6 or tuple(values[4:]) != size:
            raise BadFrame(f"intrinsics {values} are not fx, fy, cx, cy, width, height of an image of {size}")
        columns, rows, metres = points_of(record, size)
        low, high = self.source.depth_range
        if metres.min() < low or metres.max() > high:
            raise BadFrame(f"points of {metres.min()}..{metres.max()} m are outside {low}..{high} m")
        depth = np.zeros(size[::-1], dtype=np.float32)
        depth[rows, columns] = metres
        return tuple(values[:4]), depth, (columns, rows, metres)


# Reading what others wrote: each check names the field


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a JSONL file; empty lines hold no record."""
    with open(path, "rb") as file:
        for number_, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"{path}: line {number_} is longer than {MAX_LINE} bytes; this is not an annotation file"
                )
            if line.strip():
                yield number_, line


def parse(line: bytes) -> dict:
    def refuse(constant):
        raise BadFrame(f"{constant} is not JSON")

    try:
        record = json.loads(line, parse_constant=refuse)
    except BadFrame:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"not a JSON record ({error})") from error
    if not isinstance(record, dict):
        raise BadFrame(f"a record must be a JSON object, not {type(record).__name__}")
    return record


def read(root: Path, path: str) -> bytes:
    """A file at a record's path below root; a leading '/' is dropped, as the released reader does."""
    return inside(root, path.lstrip("/")).read_bytes()


def text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise BadFrame(f"{key} must be a string, not {value!r:.80}")
    return value


def number(record: dict, key: str) -> float:
    """A finite number above 0."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise BadFrame(f"{key} must be a number above 0, not {value!r:.80}")
    return float(value)


def numbers(values: object, key: str) -> list[float]:
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise BadFrame(f"{key} must be a list of numbers")
    if not all(-1e9 < value < 1e9 for value in values):
        raise BadFrame(f"{key} holds a number that is not finite or absurd")
    return values


def size_of(record: dict, key: str) -> tuple[int, int]:
    """[width, height] in px."""
    value = record.get(key)
    if not isinstance(value, list) or [type(side) for side in value] != [int, int]:
        raise BadFrame(f"{key} must be [width, height], not {value!r:.80}")
    if min(value) < 1 or math.prod(value) > MAX_PIXELS:
        raise BadFrame(f"{key} {value} is not between 1 and {MAX_PIXELS} pixels")
    return tuple(value)


def points_of(record: dict, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns and rows (n,) int in a grid of `size` and metres (n,) float64 of a record's points."""
    pairs, metres = record.get("pixel_coords"), numbers(record.get("depth"), "depth")
    if not isinstance(pairs, list) or len(pairs) != len(metres) or not pairs:
        raise BadFrame("pixel_coords and depth must be lists of one length, with a point at least")
    if any(not isinstance(pair, list) or [type(side) for side in pair] != [int, int] for pair in pairs):
        raise BadFrame("pixel_coords must hold [column, row] pairs of whole numbers")
    for column, row in pairs:
        if not (0 <= column < size[0] and 0 <= row < size[1]):
            raise BadFrame(f"point [{column}, {row}] lies outside the {size[0]}x{size[1]} grid it is counted in")
    if min(metres) <= 0:
        raise BadFrame(f"a point's depth is {min(metres)} m; it must be above 0")
    columns, rows = np.array(pairs).T
    return columns, rows, np.array(metres, dtype=np.float64)


def import_annotations(
    annotations: Path, reader: AnnotationReader, out: Path, num_proc: int = 1, strict: bool = False
) -> dict:
    """Write the records of an annotation file as shards; a record that cannot be used is listed by its line."""
    parameters, items = reader.plan(annotations)
    return build.write_split(out, reader.source, reader.split, reader, parameters, items, num_proc, strict)
