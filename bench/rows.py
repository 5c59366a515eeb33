"""Rows of a built benchmark, as `evaluate` and `report` read them."""

import logging
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import DatasetCard
from PIL import ExifTags

from . import manifest
from .contestants._base import Query
from .depthvlm_bench import FEATURES, GROUPS
from .sources._base import BadFrame, open_image

FORMATS = ("JPEG", "PNG", "TIFF")  # `datasets` writes 16-bit images as TIFF, a build as PNG
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises for a broken file
logger = logging.getLogger(__name__)


class BadRow(ValueError):
    """A row that cannot be scored."""


@dataclass(frozen=True)
class Contents:
    """What a source's test rows hold.

    hash: see `manifest.content_hash`. rows: their number. images_of: images of the whole test set, of which the rows
    may be a part. bad: number of a row -> its id and why it cannot be scored.
    """

    hash: str
    rows: int
    images_of: int
    bad: dict[int, tuple[str, str]]


# Opening


def card_files(data: str) -> dict[str, list[str] | None]:
    """The test files of each source by the card of a built benchmark, a folder or a hub id; None without a test split.

    Files of a folder that are missing are left out; of the hub, patterns are given as they are.
    """
    folder = Path(data)
    try:
        configs = DatasetCard.load(folder / "README.md" if folder.is_dir() else data).data.get("configs")
        patterns = {
            config["config_name"]: next(
                (part["path"] for part in config["data_files"] if part["split"] == "test"), None
            )
            for config in configs
            if config["config_name"] not in GROUPS
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{data} is no built benchmark ({error}); make one with `python -m bench build`") from error
    files = {}
    for name, paths in patterns.items():
        paths = [paths] if isinstance(paths, str) else paths
        if paths and folder.is_dir():
            files[name] = [str(path) for pattern in paths for path in sorted(folder.glob(pattern))]
        else:
            files[name] = paths and [f"hf://datasets/{data}/{pattern}" for pattern in paths]
    return files


def open_sources(data: str, names: list[str] | None) -> dict[str, datasets.Dataset]:
    """Test rows of each source of a built benchmark, images left encoded; in the order of the paper, others after.

    A source whose files are missing is left out with a warning, or refused if it is one of `names`.
    """
    order = GROUPS["paper_eval"][1]
    configs = card_files(data)
    present = [name for name in (*order, *sorted(set(configs) - set(order))) if name in configs]
    if unknown := sorted(set(names or ()) - set(present)):
        raise ValueError(f"{data} has no source {', '.join(unknown)}; it has {', '.join(present)}")
    opened = {}
    for name in [name for name in present if name in (names or present)]:
        rows = open_test_rows(data, name)
        if rows is None and names:
            raise ValueError(f"{name} in {data} has no test rows; build them, or leave it out of --sources")
        if rows is None and configs[name] is not None:
            logger.warning("%s is left out: the card of %s lists it, but its files are missing", name, data)
        if rows is not None:
            if missing := sorted(set(FEATURES) - set(rows.column_names)):
                raise ValueError(f"the rows of {name} in {data} have no {', '.join(missing)}; build the source again")
            encoded = datasets.Image(decode=False)
            opened[name] = rows.cast_column("image", encoded).cast_column("depth", encoded)
    if not opened:
        raise ValueError(f"{data} has no test rows at all; build a test split first")
    return opened


def open_test_rows(data: str, name: str) -> datasets.Dataset | None:
    """A source's test rows; None without any.

    Its files are named one by one, because `load_dataset(data, name)` takes what it has cached for any older folder of
    the same name for this one's, and needs the files of all sources.
    """
    files = card_files(data).get(name)
    if not files:
        return None
    try:
        return datasets.load_dataset("parquet", data_files={"test": files}, split="test").with_format(None)
    except Exception as error:  # a damaged file, whatever the libraries make of it
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise ValueError(
            f"{name} in {data} cannot be read ({reason}); see `python -m bench verify`, and build it again"
        ) from error


# Checking


def contents_of(data: str, opened: dict[str, datasets.Dataset], as_released: bool) -> dict[str, Contents]:
    """
    Hash and check all rows: what a build or import wrote has to be what its record says, and each row such that it can
    be scored, as far as that is seen without decoding images. Raises ValueError for the former.
    """
    contents = {}
    for name, rows in opened.items():
        record = build_record(data, name)
        if record and record["parameters"].get("as_released", False) != as_released:
            with_or_without = "leave --as-released out" if as_released else "add --as-released"
            kind = "corrected" if as_released else "as released"
            raise ValueError(f"the points of {name} in {data} are {kind}; {with_or_without}, or pass other data")
        if not record.get("finished", True):
            raise ValueError(f"the build of {name} in {data} has not finished; run it again")
        hashes, bad, seen = [], {}, {}
        for table in rows.with_format("arrow").iter(100):
            for row in table.select(list(FEATURES)).to_pylist():
                index = len(hashes)
                try:
                    hashes.append(manifest.row_hash(row))
                    reason = problem_of(row, as_released)
                except TypeError as error:
                    raise ValueError(
                        f"row {index} of {name} in {data} holds other types than a build ({error})"
                    ) from error
                if row["id"] in seen:
                    reason = f"row {seen[row['id']]} has its id"
                if reason:
                    bad[index] = (str(row["id"]), reason)
                seen.setdefault(row["id"], index)
        content = manifest.content_hash(hashes)
        if content != record.get("content", content):
            raise ValueError(
                f"the rows of {name} in {data} have changed since they were built: their hash is {content[:12]}, the "
                f"record says {record['content'][:12]}; see `python -m bench verify {data}`, and build them again"
            )
        contents[name] = Contents(content, len(hashes), record.get("images_of", len(hashes)), bad)
    return contents


def open_evaluated(data: str, hashes: dict[str, str], as_released: bool, results: Path) -> dict[str, datasets.Dataset]:
    """The rows that `results` are of, by source. Raises ValueError where those of `data` have other content hashes."""
    opened = open_sources(data, list(hashes))
    for source, held in contents_of(data, opened, as_released).items():
        if held.hash != hashes[source]:
            raise ValueError(
                f"{results} was evaluated on other rows of {source} (hash {hashes[source][:12]}) than {data} holds "
                f"({held.hash[:12]}); pass --data with the former"
            )
    return opened


def build_record(data: str, name: str) -> dict:
    """What `build` or `import` recorded of a source's test rows; {} for data of the hub and of other tools."""
    path = Path(data) / name / "test.json"
    try:
        return manifest.read_record(path, older=True) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; see `python -m bench verify {data}`, and build {name} again") from error


def problem_of(row: dict, as_released: bool) -> str:
    """Why a row with encoded images cannot be scored; "" if nothing is seen that stands in the way."""
    if not row["id"]:
        return f"its id is {row['id']!r}"
    images = {}
    for name in ("image", "depth"):
        if not row[name] or not row[name]["bytes"]:
            return f"its {name} is null"
        try:
            images[name] = open_image(row[name]["bytes"], f"its {name}", FORMATS)
            images[name].verify()
        except BadFrame as error:
            return str(error)
        except UNREADABLE as error:
            return f"its {name} is broken ({error})"
    if images["depth"].mode not in ("I;16", "I;16B", "I"):
        return f"its depth has Pillow mode {images['depth'].mode!r}, not 16-bit gray"
    if row["depth_type"] not in ("z", "ray"):
        return f"its depth_type is {row['depth_type']!r}, not 'z' or 'ray'"
    numbers = np.array([row[name] for name in ("depth_scale", "fx", "fy", "cx", "cy")], dtype=float)
    if not np.isfinite(numbers).all() or (numbers[:3] <= 0).any():
        return f"depth_scale, fx, fy, cx, cy are {numbers.tolist()}, not finite with the first three above 0"
    width, height = images["image"].size
    u, v, depth = (np.array(row[name] or (), dtype=float) for name in ("points_u", "points_v", "points_depth"))
    if not len(u) == len(v) == len(depth):
        return f"points_u, points_v and points_depth have {len(u)}, {len(v)} and {len(depth)} values"
    if not (np.isfinite(depth).all() and (depth > 0).all()):
        return "points_depth holds values that are not finite and above 0"
    if not (np.isfinite([u, v]).all() and (np.array([u, v]) >= -0.5).all()):
        return "points_u or points_v holds values that are not finite or left of or above the image"
    if len(u) and not as_released and not (u.max() <= width - 0.5 and v.max() <= height - 0.5):
        return f"it has points outside its image of {width}x{height} px"
    return ""


def refuse(data: str, source: str, bad: dict[int, tuple[str, str]]) -> None:
    """Raise ValueError for rows that cannot be scored."""
    if bad:
        index, (name, reason) = next(iter(bad.items()))
        others = f" (and {len(bad) - 1} rows more)" if len(bad) > 1 else ""
        raise ValueError(
            f"row {index} of {source} in {data}, {name!r}, cannot be scored: {reason}{others}; build the source again, "
            "or leave such rows out and count them with --skip-bad"
        )


# Reading


def points_of(
    opened: dict[str, datasets.Dataset], mode: str, max_points: int | None, contents: dict[str, Contents] | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """
    The rows of each source that are scored, each with the numbers of its points: in dense mode all, without points;
    else those with points, of which `max_points` are evenly spread over everything. Bad rows are left out.
    """
    bad = {name: contents[name].bad if contents else {} for name in opened}
    if mode == "dense":
        return {
            name: {index: np.zeros(0, int) for index in range(len(rows)) if index not in bad[name]}
            for name, rows in opened.items()
        }
    counts = {
        name: [
            0 if index in bad[name] else len(u) for index, u in enumerate(rows.select_columns(["points_u"])["points_u"])
        ]
        for name, rows in opened.items()
    }
    for name, of_rows in counts.items():
        if not sum(of_rows):
            raise ValueError(f"{name} has no points; its test rows were not built by this benchmark: build them again")
    step = max(1.0, sum(map(sum, counts.values())) / (max_points or math.inf))
    kept, start = {}, 0
    for name, of_rows in counts.items():
        kept[name] = {}
        for index, count in enumerate(of_rows):
            numbers = np.arange(start, start + count)
            points = np.flatnonzero(np.floor((numbers + 1) / step) > np.floor(numbers / step))
            if len(points):
                kept[name][index] = points
            start += count
        if not kept[name]:
            raise ValueError(f"--max-points {max_points} leaves no point of {name}; raise it or leave {name} out")
    return kept


def read_row(rows: datasets.Dataset, index: int, points: np.ndarray, mode: str) -> tuple[dict, Query]:
    """
    A row as it is scored and as contestants are given it. Raises BadRow for images that cannot be decoded.

    The row has a `name` for messages, the image's size (W, H) as `size` and its `intrinsics`; `points` (N, 2), those of
    the given numbers, and their `gt` (N,); in dense mode its depth map as stored, (h, w), as `depth`.
    """
    stored = rows[index]
    try:
        opened = open_image(stored["image"]["bytes"], "its image", FORMATS)
        image = opened.convert("RGB")
        depth = None
        if mode == "dense":
            depth = np.asarray(open_image(stored["depth"]["bytes"], "its depth", FORMATS))
    except UNREADABLE as error:
        raise BadRow(f"its image or depth cannot be decoded ({error})") from error
    if depth is not None and depth.min() < 0:
        raise BadRow(f"its depth holds negative values, down to {depth.min()}")
    if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise BadRow("its image says to be turned (EXIF orientation), away from its depth map")
    row = {name: stored[name] for name in ("id", "source", "scene", "depth_type", "depth_scale")}
    row["scene"] = row["scene"] or ""
    row["size"], row["intrinsics"] = image.size, tuple(stored[name] for name in ("fx", "fy", "cx", "cy"))
    row["points"] = np.column_stack([stored["points_u"], stored["points_v"]]).astype(np.float64).reshape(-1, 2)[points]
    row["gt"] = np.array(stored["points_depth"], dtype=np.float64)[points]
    row["depth"] = depth
    row["name"] = f"{row['source']}/{stored['split']}/{row['id']}"
    return row, Query(row["name"], image, row["intrinsics"], row["points"])
