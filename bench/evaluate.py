"""Scores a contestant on DepthVLM-Bench: rows of `load_dataset` -> predictions -> scores.

OUT holds `run.json` (what was asked), `parts/` (finished chunks), and at the end `predictions.parquet` (one row a
point; in dense mode `images.parquet`, one row an image) and `summary.json`. A chunk is a fixed run of a source's rows;
each process takes every n-th, writes it whole or not at all, and skips what is there. So any number of processes,
killed and started again as often as you like, ends in the same files.
"""

import functools
import hashlib
import itertools
import json
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from tqdm import tqdm

from . import contestants, scoring
from .contestants import _prompt
from .contestants._base import Contestant
from .depthvlm_bench import VERSION
from .files import open_whole, write_json
from .rows import CHUNK, check_annotations, open_sources, points_of, read_chunk

DECIDING = ("*.safetensors", "*.jinja", "*config.json", "tokenizer.json")  # files of a checkpoint that make its answers
POINT_FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "source")}
    | {name: datasets.Value("float64") for name in ("u", "v", "gt", "prediction")}
    | {name: datasets.Value("string") for name in ("status", "text")}
)


@dataclass(frozen=True)
class Run:
    """What is asked. Two runs with the same fields give the same files; `check` refuses to mix two in one folder.

    model: `NAME:CHECKPOINT` of bench/contestants, or a checkpoint alone. data: folder or hub id of a built benchmark.
    max_points: at most so many points in all, evenly spread; None scores all. as_released: score as the released code
    does, over rows of `import --as-released`.
    """

    model: str
    data: str
    sources: tuple[str, ...]
    mode: str = "points"
    as_released: bool = False
    max_points: int | None = None
    dtype: str = "float32"

    def check(self, out: Path, identity: dict) -> None:
        """Write OUT/run.json, or refuse an OUT that holds another run's. identity: see `identity_of`."""
        record, file = (
            asdict(self) | {"sources": list(self.sources), "format": scoring.FORMAT} | identity,
            out / "run.json",
        )
        if file.exists() and any((out / "parts").glob("*.parquet")):  # else nothing of the other run is there
            there = json.loads(file.read_text())
            other = sorted(key for key in record.keys() | there.keys() if record.get(key) != there.get(key))
            if other:
                raise ValueError(
                    f"{out} holds another run ({', '.join(f'{key} {there.get(key)!r}' for key in other)}, now "
                    f"{', '.join(repr(record.get(key)) for key in other)}); choose another --out or remove it"
                )
        else:
            write_json(file, record)


def identity_of(run: Run, contestant: Contestant, opened: dict[str, datasets.Dataset]) -> dict:
    """What a run's names stand for now: the checkpoint's files may change under their name, and the data's."""
    name, _, checkpoint = run.model.partition(":")
    version = checkpoint_version(checkpoint if name in contestants.names() else run.model)
    digest = hashlib.sha256()
    for rows in opened.values():
        points = rows.select_columns(["id", "points_u", "points_v", "points_depth"]).with_format("arrow")
        for table in points.iter(1000):
            digest.update(repr(table.to_pydict()).encode())
    return {"bench": VERSION, "checkpoint": version, "served_at": contestant.served_at, "points": digest.hexdigest()}


def checkpoint_version(checkpoint: str) -> str:
    """SHA-256 of the files that make a checkpoint's answers; the commit of a downloaded hub id; else ""."""
    from huggingface_hub import try_to_load_from_cache

    weights = Path(checkpoint)
    if weights.exists():
        files = [weights] if weights.is_file() else sorted(file for kind in DECIDING for file in weights.glob(kind))
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()
    config = try_to_load_from_cache(checkpoint, "config.json") if re.fullmatch(r"[\w./-]+", checkpoint) else None
    return Path(config).parent.name if isinstance(config, str) else ""


# Contestants


def find_contestant(model: str) -> tuple[str, str]:
    """`--model` -> (contestant's name, checkpoint). Raises ValueError for what no contestant takes."""
    name, _, checkpoint = model.partition(":")
    if name in contestants.names():
        if not checkpoint:
            raise ValueError(f"--model {model} names no checkpoint; write {name}:CHECKPOINT")
        return name, checkpoint
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise ValueError(
            f"--model {model!r} is neither NAME:CHECKPOINT with a NAME of {', '.join(contestants.names())} nor a "
            f"checkpoint whose config.json can be read: {error}"
        ) from error
    kind = "depthvlm" if "depth_head_type" in config else config.get("model_type")
    for name in contestants.names():
        if kind in contestants.get(name).model_types:
            return name, model
    raise ValueError(
        f"{model} is a {kind!r} model, which no contestant takes by itself; if it gives metres, write NAME:{model} "
        f"with a NAME of {', '.join(contestants.names())}"
    )


# A run


def evaluate(run: Run, contestant: Contestant, out: Path, batch_size: int = 4) -> dict | None:
    """Score what is not scored yet, or failed, and, on the main process, write and return the summary."""
    state = processes()
    opened = open_sources(run.data, list(run.sources))
    if run.mode == "dense" and not contestant.dense:
        raise ValueError(f"{contestant.title} answers point by point and has no maps; use --mode points")
    if run.as_released and (run.mode == "dense" or not contestant.dense):
        raise ValueError("--as-released reads points from maps; use it with --mode points and a contestant with maps")
    if run.max_points and run.mode == "dense":
        raise ValueError(
            f"--max-points {run.max_points} is of points, and --mode dense scores whole maps; leave it out"
        )
    check_annotations(run.data, run.sources, run.as_released)
    kept = points_of(opened, run.mode, run.max_points)
    if state.is_main_process:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        run.check(out, identity_of(run, contestant, opened))
    state.wait_for_everyone()

    chunks = [(name, start) for name, rows in opened.items() for start in range(0, len(rows), CHUNK)]
    todo = [chunk for chunk in chunks[state.process_index :: state.num_processes] if not is_done(part_file(out, chunk))]
    batch_size = batch_size if contestant.batch_safe else 1
    score = scoring.score_maps
    if run.mode == "points":
        score = functools.partial(scoring.score_points, as_released=run.as_released)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as preparer:
        loaded = (
            (chunk, reader.submit(read_chunk, opened[chunk[0]], chunk[1], kept[chunk[0]], run.mode)) for chunk in todo
        )
        prepared = ahead(batches(contestant, loaded, batch_size, preparer))
        by_chunk = itertools.groupby(prepared, key=lambda batch: batch[0])
        for chunk, own in tqdm(by_chunk, total=len(todo), unit="chunk", disable=not state.is_main_process):
            records = []
            for _, rows, queries, future in own:
                if rows:
                    records += score(contestant, rows, queries, future.result())
            write_part(part_file(out, chunk), records, run.mode)
    state.wait_for_everyone()
    return summarise(run, contestant, kept, chunks, out) if state.is_main_process else None


def processes():
    """accelerate's state: this process among those that a launcher started, on CPUs too if there is nothing else."""
    from accelerate import PartialState

    # a rank waits for the slowest, which may be asking an endpoint
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def size(run: Run) -> tuple[int, int]:
    """Number of images and of points that a run scores."""
    kept = points_of(open_sources(run.data, list(run.sources)), run.mode, run.max_points)
    counts = [len(points) for own in kept.values() for points in own]
    return sum(count > 0 for count in counts), sum(counts)


def save_marked(run: Run, contestant: Contestant, folder: Path, images: int) -> None:
    """Pictures of the points of the first `images` images, as the contestant is shown them."""
    if contestant.dense:
        raise ValueError(f"{contestant.title} is not shown marked images; leave --save-marked out")
    opened = open_sources(run.data, list(run.sources))
    kept = points_of(opened, run.mode, run.max_points)
    chunks = ((name, start) for name, rows in opened.items() for start in range(0, len(rows), CHUNK))
    queries = (query for name, start in chunks for query in read_chunk(opened[name], start, kept[name], run.mode)[1])
    _prompt.save_marked(itertools.islice(queries, images), folder, getattr(contestant, "questions", _prompt.questions))


def ahead(futures: Iterator) -> Iterator:
    """The same, with the next one already on its way."""
    current = next(futures, None)
    while current is not None:
        following = next(futures, None)
        yield current
        current = following


def batches(contestant: Contestant, loaded: Iterator, batch_size: int, pool: ThreadPoolExecutor) -> Iterator[tuple]:
    """(chunk, rows, queries, a future of what the contestant makes of them); of a chunk without rows, one of none."""
    for chunk, future in ahead(loaded):
        rows, queries = future.result()
        for first in range(0, max(1, len(rows)), batch_size):
            piece = slice(first, first + batch_size)
            prepared = pool.submit(contestant.prepare, queries[piece]) if rows else None
            yield chunk, rows[piece], queries[piece], prepared


def part_file(out: Path, chunk: tuple[str, int]) -> Path:
    return out / "parts" / f"{chunk[0]}-{chunk[1]:07d}.parquet"


def is_done(part: Path) -> bool:
    """Whether a chunk is there, and no request of it failed: those are made again, the others' replies are kept."""
    if not part.exists():
        return False
    if "status" not in pyarrow.parquet.read_schema(part).names:
        return True
    return "failed" not in pyarrow.parquet.read_table(part, columns=["status"])["status"].to_pylist()


def write_part(file: Path, records: list[dict], mode: str) -> None:
    # not datasets' from_list, which takes ten times as long
    table = pyarrow.Table.from_pylist(records, POINT_FEATURES.arrow_schema if mode == "points" else None)
    with open_whole(file) as part:
        pyarrow.parquet.write_table(table, part)


# The summary


def summarise(run: Run, contestant: Contestant, kept: dict, chunks: list, out: Path) -> dict:
    """Join the parts in the data's order, write them and `summary.json`; refuse if the counts are not exact."""
    import pandas

    table = pandas.concat([pandas.read_parquet(part_file(out, chunk)) for chunk in chunks], ignore_index=True)
    table.to_parquet(out / ("predictions.parquet" if run.mode == "points" else "images.parquet"), index=False)
    sources = {}
    for name, points in kept.items():
        own = table[table.source == name]
        expected = sum(map(len, points)) if run.mode == "points" else len(points)
        if len(own) != expected:
            raise ValueError(f"{out} has {len(own)} results of {expected} for {name}; remove its parts and run again")
        scored = scoring.of_points(own, run.as_released) if run.mode == "points" else scoring.of_images(own)
        images = len(points) if run.mode == "dense" else sum(len(own) > 0 for own in points)
        sources[name] = {"images": images} | scored
    names = list(next(iter(sources.values()))["metrics"])
    summary = {
        "format": scoring.FORMAT,
        "contestant": {"model": run.model, "title": contestant.title, "quantity": contestant.quantity}
        | {"uses_intrinsics": contestant.uses_intrinsics, "dense": contestant.dense},
        "protocol": {
            "mode": run.mode,
            "as_released": run.as_released,
            "data": run.data,
            "bench": VERSION,
            "max_points": run.max_points,
            "dtype": run.dtype,
            "average": "as released: mean of the images' means"
            if run.as_released
            else "over all points of a source"
            if run.mode == "points"
            else "over a source's images",
            "mean": "over sources, unweighted",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__, "datasets": datasets.__version__, "numpy": np.__version__},
        "sources": sources,
        "mean": {name: scoring.mean_or_none([own["metrics"][name] for own in sources.values()]) for name in names},
    }
    write_json(out / "summary.json", summary)
    return summary
