"""A split of a source -> Parquet shards that `load_dataset` opens: OUT/{source}/{split}-00000-of-000NN.parquet.

Beside each shard lies its record (.json), written last: a shard that is what its record says is finished and is not
made again. OUT/{source}/{split}.json holds the parameters from the start, and the summary and all hashes at the end.
Any number of builds may run in one folder at once: each file is written under a name of its own and put in place whole,
with the same bytes whoever writes it.
"""

import collections
import functools
import inspect
import io
import itertools
import json
import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image
from tqdm import tqdm

from . import manifest, sampling
from .files import open_whole, shared_folder
from .remote import ray_workers
from .sources._base import MAX_PIXELS, BadFrame, BadRaw, Frame, Sample, Source, open_image
from .workers import Workers

SHARD_IMAGES = 200
ROW_GROUP_IMAGES = 100  # a viewer and a stream read a row group at a time
ROW_GROUP_BYTES = 64 << 20
ORIENTATION = ExifTags.Base.Orientation
logger = logging.getLogger(__name__)


class Skipped(ValueError):
    """A frame could not be used and the build is strict."""


# A frame -> a row


def make_row(source: type[Source] | Source, split: str, frame: Frame, sample: Sample) -> tuple[dict, np.ndarray]:
    """A row of FEATURES without points, and its depth as stored, uint16 (h, w). Raises BadFrame."""
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", frame.id):
        raise BadFrame(f"frame id {frame.id!r} has characters other than letters, digits and _./-")
    if not (frame.scene + frame.camera).isprintable():
        raise BadFrame(f"{frame.id}: scene {frame.scene!r} or camera {frame.camera!r} is not printable text")
    if not np.isfinite(sample.intrinsics).all() or min(sample.intrinsics[:2]) <= 0:
        raise BadFrame(f"{frame.id}: intrinsics {sample.intrinsics} are not finite with fx, fy > 0")
    stored = encode_depth(sample.depth, source.depth_range, source.depth_scale, frame.id)
    row = {
        "id": frame.id,
        "source": source.name,
        "split": split,
        "scene": frame.scene,
        "camera": frame.camera,
        "image": {"bytes": encode_image(sample.image, frame.id), "path": None},
        "depth": {"bytes": png(stored), "path": None},
        "depth_scale": float(source.depth_scale),
        "depth_type": "z",
        **dict(zip(("fx", "fy", "cx", "cy"), map(float, sample.intrinsics), strict=True)),
        **dict.fromkeys(("points_u", "points_v", "points_depth"), ()),
        "qa": {key: [pair[i] for pair in sample.qa] for i, key in enumerate(("kind", "question", "answer"))},
    }
    return row, stored


def load_row(source: Source, split: str, frame: Frame) -> tuple[dict, np.ndarray]:
    """`make_row` of a frame as its source loads it. Raises BadFrame, at once for a frame with a problem."""
    if frame.problem:
        raise BadFrame(frame.problem)
    return make_row(source, split, frame, source.load(frame))  # the source itself: a folder's has a scale of its own


def encode_depth(depth: np.ndarray, depth_range: tuple[float, float], depth_scale: float, name: str) -> np.ndarray:
    """Metres (h, w), 0 = none -> uint16, metres * depth_scale; outside depth_range becomes 0, never the bound."""
    if depth.ndim != 2 or not 0 < depth.size <= MAX_PIXELS:
        raise BadFrame(f"{name}: depth has shape {depth.shape}; it must be (h, w) of at most {MAX_PIXELS} pixels")
    if not np.isfinite(depth).all() or depth.min() < 0:
        raise BadFrame(f"{name}: depth holds NaN, infinite or negative values; the reader must set them to 0")
    valid = (depth >= depth_range[0]) & (depth <= depth_range[1])
    if not valid.any():
        raise BadFrame(f"{name}: no depth within {depth_range[0]}..{depth_range[1]} m")
    return np.where(valid, np.rint(depth.astype(np.float64) * depth_scale), 0).astype(np.uint16)


def encode_image(image: bytes | np.ndarray, name: str) -> bytes:
    """The bytes of a file, unchanged, if they decode; an array (H, W, 3) uint8 as PNG."""
    if isinstance(image, np.ndarray):
        return png(image)
    opened = open_image(image, name)
    try:
        opened.draft(None, (1, 1))  # a JPEG decoded at 1/8 size is checked in half the time
        opened.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise BadFrame(f"{name}: the image is truncated or broken ({error})") from error
    orientation = opened.getexif().get(ORIENTATION, 1)
    if orientation != 1:  # `datasets` would turn the image when it decodes it, away from its depth and intrinsics
        raise BadFrame(f"{name}: the image says to be turned (EXIF orientation {orientation}); remove the tag")
    return image


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def image_size(row: dict) -> tuple[int, int]:
    """(W, H) of a row's image."""
    return open_image(row["image"]["bytes"], row["id"]).size


def read_row(
    reader: Callable[[Frame, int], tuple[dict, np.ndarray]], frame: Frame, n_points: int
) -> tuple[dict | None, str | None, np.ndarray | None]:
    """(row, None, depth as stored) of a frame, or (None, reason, None) when it cannot be used."""
    try:
        row, stored = reader(frame, n_points)
        return row, None, stored
    except (MemoryError, ImportError):  # of the machine, not of the frame
        raise
    except Exception as error:  # a damaged file, whatever a library makes of it, must not end a run of days
        return None, reason(error), None


def reason(error: Exception) -> str:
    """Why a frame cannot be used, in printable characters: it may quote what a file holds."""
    text = str(error)
    if not isinstance(error, BadFrame | BadRaw | OSError):  # a library's error says little without its place
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])


# A source's split


def open_source(source: type[Source], raw: str | None, keep_hidden: bool = False) -> Source:
    """The source over its raw folder; one that needs none (procedural) is opened without."""
    takes = inspect.signature(source).parameters
    if keep_hidden and "remove_hidden" not in takes:
        raise ValueError(f"{source.name} has no rule for hidden points to switch off: leave --keep-hidden out")
    options = {"remove_hidden": False} if keep_hidden else {}
    if raw is not None:
        return source(raw, **options)
    if "raw" in takes and takes["raw"].default is inspect.Parameter.empty:
        raise ValueError(f"{source.name} needs --raw, the folder of {source.title}: {source.layout}")
    return source(**options)


_opened = functools.lru_cache(maxsize=1)(open_source)  # a worker opens the source once, not once a shard


@dataclass(frozen=True)
class SourceReader:
    """Reads the rows of one split of a source; picklable, so that any process can."""

    source: type[Source]
    raw: str | None
    split: str
    seed: int = 0
    keep_hidden: bool = False

    def __call__(self, frame: Frame, n_points: int) -> tuple[dict, np.ndarray]:
        source = _opened(self.source, self.raw, self.keep_hidden)
        row, stored = load_row(source, self.split, frame)
        if n_points:
            named = self.seed, self.source.name, frame.id
            points = sampling.draw_points(stored, source.depth_scale, image_size(row), n_points, *named)
            row |= dict(zip(("points_u", "points_v", "points_depth"), points, strict=True))
        return row, stored

    def plan(self, max_frames: int | None = None) -> tuple[dict, Iterator[tuple[Frame, int]]]:
        """What decides the output, for the record; and the chosen frames, each with its number of points."""
        source = open_source(self.source, self.raw, self.keep_hidden)
        source.official_splits(self.split)
        low, high = source.depth_range
        if low * source.depth_scale <= 0.5 or high * source.depth_scale > 65535:
            raise ValueError(
                f"{source.name}: {low}..{high} m at depth_scale {source.depth_scale} do not fit in 16 bits"
            )
        sizes = sampling.count_groups(source.frames(self.split))
        if not sizes:
            raise BadRaw(f"{source.name} has no {self.split} frames in {self.raw}; expected: {source.layout}")
        limit = sampling.IMAGES[self.split] if max_frames is None else max_frames
        quota = sampling.allot(sizes, limit, self.seed)
        images = sum(quota.values())
        total = sampling.POINTS if self.split == "test" else 0
        parameters = {
            "images": images,
            "images_listed": sum(sizes.values()),
            "images_limit": limit,
            "groups": len(sizes),
            "listing": sampling.digest(sorted((*group, size) for group, size in sizes.items())).hex(),
            "points": total,
            "seed": self.seed,
            "keep_hidden": self.keep_hidden,
            "depth_range": [low, high],
            "depth_scale": source.depth_scale,
        }
        frames = sampling.choose(source.frames(self.split), sizes, quota)
        return parameters, ((frame, sampling.points_of_image(i, images, total)) for i, frame in enumerate(frames))


# Shards


def schema() -> pa.Schema:
    """FEATURES for Parquet. "List" is written as "Sequence", the older name, which datasets 3.x and later both read."""
    from .depthvlm_bench import FEATURES

    def old(node):
        if not isinstance(node, dict):
            return node
        return {key: "Sequence" if (key, value) == ("_type", "List") else old(value) for key, value in node.items()}

    features = {"info": {"features": old(FEATURES.to_dict())}}
    return FEATURES.arrow_schema.with_metadata({"huggingface": json.dumps(features)})


def write_shard(
    reader: Callable[[Frame, int], tuple[dict, np.ndarray]],
    arrow: pa.Schema,
    path: Path,
    items: list[tuple[Frame, int]],
    build: dict,
    strict: bool,
) -> dict:
    """
    Write one shard, then its record, which is returned; of a shard that is finished, only read the record.

    build: what the records of all shards have in common, with the `parameters`. Picklable, and any number of processes
    may write the same shard.
    """
    frames = _digest(items)
    if record := _finished(path, frames, build):
        return record
    record = {"frames": frames, "written": 0, "pixels": 0, "valid_pixels": 0, "points": 0, "skipped": []}
    answers = collections.defaultdict(collections.Counter)  # to each kind of question

    def rows() -> Iterator[dict]:
        seen = set()
        for frame, n_points in items:
            row, reason, stored = read_row(reader, frame, n_points)
            if row is None:
                if strict:
                    raise Skipped(f"{frame.id}: {reason}")
                record["skipped"].append({"id": frame.id, "reason": reason})
                continue
            if row["id"] in seen:
                raise ValueError(f"two frames are called {row['id']!r}; a frame's id must be unique in its split")
            seen.add(row["id"])
            record["written"] += 1
            record["pixels"] += stored.size
            record["valid_pixels"] += int(np.count_nonzero(stored))
            record["points"] += len(row["points_u"])
            for kind, answer in zip(row["qa"]["kind"], row["qa"]["answer"], strict=True):
                answers[kind][answer] += 1
            yield row

    with open_whole(path) as file:
        hashes = _write_rows(file, arrow, rows())
    return manifest.write_record_beside(path, build | record | {"answers": answers, "rows": hashes})


def _digest(items: list[tuple[Frame, int]]) -> str:
    return sampling.digest([[frame.id, n_points] for frame, n_points in items]).hex()


def _write_rows(file: IO, arrow: pa.Schema, rows: Iterator[dict]) -> dict[str, str]:
    """Write rows as Parquet; returns the hash of each by its id."""
    hashes = {}
    with pq.ParquetWriter(file, arrow, use_dictionary=["source", "split", "scene", "camera"]) as writer:
        for group in _row_groups(rows):
            table = pa.Table.from_pylist(group, arrow)
            writer.write_table(table)
            hashes |= {row["id"]: manifest.row_hash(row) for row in table.to_pylist()}
    return hashes


def _row_groups(rows: Iterator[dict]) -> Iterator[list[dict]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"]) + len(row["depth"]["bytes"])
        if len(group) == ROW_GROUP_IMAGES or size > ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:  # an empty row group cannot be loaded
        yield group


def _finished(path: Path, frames: str, build: dict) -> dict | None:
    """The record of a shard that is finished and as it was written; refused when it was made of something else."""
    record = manifest.record_beside(path)
    if record is None:
        return None
    _check_parameters(path, record, build)
    if record["frames"] != frames:
        raise ValueError(f"{path} holds other frames than the raw folder lists now; give another --out or remove it")
    return record


def write_split(
    out: Path,
    source: type[Source],
    split: str,
    reader: Callable[[Frame, int], tuple[dict, np.ndarray]],
    parameters: dict,
    items: Iterator[tuple[Frame, int]],
    num_proc: int = 1,
    strict: bool = False,
    ray: str | None = None,
    shard_range: tuple[int, int] | None = None,
    finish: bool = False,
) -> dict | None:
    """Write all shards of a split that are not finished yet, then the split's record, which is returned, and the card.

    parameters: what decides the output, with `images`, the number of items. A folder that was built with others is
    refused. strict: the first frame that cannot be used raises Skipped; otherwise it is listed in the record.
    ray: the address of a Ray cluster (see `remote.connected`) whose workers write the shards, instead of num_proc
    processes. shard_range: (I, N), write only the shards with number % N == I, and return None. finish: write no shard;
    raises ValueError if one is missing.
    """
    from . import card  # here: it imports `datasets`, which takes a second that workers need not spend
    from .depthvlm_bench import VERSION

    folder = Path(out) / source.name
    folder.mkdir(parents=True, exist_ok=True)
    parameters = json.loads(json.dumps({"version": VERSION, **parameters}))
    build = {"source": source.name, "split": split, "parameters": parameters, "versions": manifest.versions()}
    images = parameters["images"]
    n_shards = math.ceil(images / SHARD_IMAGES)
    paths = [folder / f"{split}-{i:05d}-of-{n_shards:05d}.parquet" for i in range(n_shards)]
    sizes = [(i + 1) * images // n_shards - i * images // n_shards for i in range(n_shards)]
    index, count = shard_range or (0, 1)

    def shards() -> Iterator[tuple[Path, list]]:
        rest = iter(items)
        for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            shard = list(itertools.islice(rest, size))
            if i % count == index:
                yield path, shard
        next(rest, None)  # runs the listing to its end, where `choose` checks that it has not changed

    # other machines' unfinished files are left alone: not every shared file system knows their locks
    alone = ray is None and shard_range is None
    with shared_folder(Path(out), (f"{source.name}/.{split}*.tmp", ".README.md.*.tmp") if alone else ()):
        _begin(folder / f"{split}.json", build)
        if finish:
            written = _read_records(shards(), build)
        elif ray is not None and not all(path.with_suffix(".json").exists() for path in paths):
            written = _run(reader, shards(), build, ray_workers(ray), strict)
        elif num_proc > 1:
            written = _run(reader, shards(), build, Workers(num_proc), strict)
        else:
            written = _run_here(reader, shards(), build, strict)
        records = {}
        with tqdm(total=sum(sizes[index::count]), desc=f"{source.name}/{split}", unit="image", disable=None) as bar:
            for path, record in written:
                records[path] = record
                bar.update(record["written"] + len(record["skipped"]))
        if shard_range:
            return None
        records = [records[path] for path in paths]
        skipped = [frame for record in records for frame in record["skipped"]]
        sums = {key: sum(record[key] for record in records) for key in ("written", "pixels", "valid_pixels", "points")}
        if not sums["written"]:
            for path in paths:  # with --images or --raw put right, the same command has to read them again
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            first = f"{skipped[0]['id']}: {skipped[0]['reason']}"
            raise BadRaw(f"none of the {images} {split} frames of {source.name} can be used; the first, {first}")
        answers = collections.defaultdict(collections.Counter)
        for record in records:
            for kind, counts in record["answers"].items():
                answers[kind].update(counts)
        hashes = {name: value for record in records for name, value in record["rows"].items()}
        if len(hashes) < sums["written"]:
            raise ValueError(f"two frames of {folder} have one id; a frame's id must be unique in its split")
        record = build | {
            "finished": True,
            "images_of": max(images, min(parameters["images_listed"], sampling.IMAGES[split])),
            "shards": n_shards,
            **sums,
            "skipped": skipped,
            "questions": {kind: summary(kind, counts) for kind, counts in sorted(answers.items())},
            **{key: getattr(source, key) for key in ("title", "page", "licence", "citation")},
            "content": manifest.content_hash(hashes.values()),
            "files": [record["file"] | {"rows": record["written"]} for record in records],
        }
        record = manifest.write_record(folder / f"{split}.json", record)
        card.write(out)
    if strict and skipped:
        raise Skipped(f"{len(skipped)} frames were skipped by an earlier run without --strict: {skipped[0]}")
    return record


def summary(kind: str, answers: collections.Counter) -> dict:
    """Number of questions of a kind, and the answer that would be right most often with its share of right ones."""
    from training.answers import best_constant  # here: the loading script reads rows without that package

    answer, right = best_constant(kind, answers)
    return {"number": answers.total(), "constant": answer, "right": right}


def _begin(path: Path, build: dict) -> None:
    """Write the record of a new build, or check that the one begun there is the same."""
    try:
        record = manifest.read_record(path)
    except FileNotFoundError:
        record = manifest.write_record(path, build | {"finished": False})
    except ValueError as error:
        logger.warning("%s; it is made again", error)
        record = manifest.write_record(path, build | {"finished": False})
    _check_parameters(path, record, build)


def _check_parameters(path: Path, record: dict, build: dict) -> None:
    old, new = record["parameters"], build["parameters"]
    differing = [f"{key} {old.get(key)} (now {new.get(key)})" for key in {**old, **new} if old.get(key) != new.get(key)]
    if differing:
        split = path.with_name(build["split"])
        raise ValueError(
            f"{path.parent} holds {build['split']} shards built with {', '.join(differing)}; "
            f"give another --out, or remove {split}* to build anew"
        )


# Processes


def _run_here(reader, tasks: Iterator[tuple[Path, list]], build: dict, strict: bool) -> Iterator[tuple[Path, dict]]:
    arrow = schema()
    for path, items in tasks:
        yield path, write_shard(reader, arrow, path, items, build, strict)


def _run(
    reader, tasks: Iterator[tuple[Path, list]], build: dict, workers: AbstractContextManager, strict: bool
) -> Iterator[tuple[Path, dict]]:
    """Write the shards by a pool, with at most two shards per worker listed ahead."""
    arrow, pending = schema(), {}
    with workers as pool:  # when it ends by Ctrl-C or a refusal, finished shards stay
        for path, items in tasks:
            pending[pool.submit(write_shard, reader, arrow, path, items, build, strict)] = path
            if len(pending) > 2 * pool.size:
                for done in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(done), done.result()
        while pending:
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(done), done.result()


def _read_records(tasks: Iterator[tuple[Path, list]], build: dict) -> Iterator[tuple[Path, dict]]:
    """The records of shards that other processes have written."""
    missing = []
    for path, items in tasks:
        if record := _finished(path, _digest(items), build):
            yield path, record
        else:
            missing.append(path.name)
    if missing:
        raise ValueError(
            f"{path.parent} lacks {missing[0]}, the first of {len(missing)} shards; build them with --shard-range, or "
            "leave --finish out"
        )
