"""Scores a contestant on DepthVLM-Bench: rows of `load_dataset` -> predictions -> scores.

OUT holds `run.json` (what was asked), `parts/` (finished chunks), and at the end `predictions.parquet` (one row per
point; in dense mode `images.parquet`, one row per image, and `maps/SOURCE.parquet`, the predicted maps) and
`summary.json`. A chunk is a fixed run of a source's rows; each process takes the next unfinished one whenever it is
free, and writes it whole or not at all, with its hash beside it. So a slow process holds nobody back, and any number of
them, killed and started again as often as you like, ends in the same files.

Images are read and prepared by other processes than the one that runs the model, and maps are scored by yet others.
"""

import hashlib
import itertools
import platform
import re
import secrets
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import PrefixStore, distributed_c10d
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import contestants, manifest, scoring
from .contestants import _prompt
from .contestants._base import Contestant
from .depthvlm_bench import VERSION
from .files import open_whole
from .rows import BadRow, Contents, contents_of, open_evaluated, open_sources, points_of, read_row, refuse
from .workers import Workers, end_with_parent

CHUNK = 16  # rows of a source that are finished together
PENDING = 2  # chunks that are being scored and written while the model goes on
DECIDING = ("*.safetensors", "*.jinja", "*config.json", "tokenizer.json")  # files of a checkpoint that make its answers


@dataclass(frozen=True)
class Run:
    """What is asked. Two runs with the same fields give the same files; `check` refuses to mix two in one folder.

    model: `NAME:CHECKPOINT` of bench/contestants, or a checkpoint alone. data: folder or hub id of a built benchmark.
    max_points: at most so many points in all, evenly spread; None scores all. as_released: score as the released code
    does, over rows of `import --as-released`. skip_bad: leave rows that cannot be scored out, and count them.
    """

    model: str
    data: str
    sources: tuple[str, ...]
    mode: str = "points"
    as_released: bool = False
    max_points: int | None = None
    dtype: str = "float32"
    skip_bad: bool = False

    def check(self, out: Path, identity: dict) -> None:
        """Write OUT/run.json, or refuse an OUT that holds another run's. identity: see `identity_of`."""
        record = asdict(self) | {"sources": list(self.sources), "format": scoring.FORMAT} | identity
        path = out / "run.json"
        if not any((out / "parts").glob("*.parquet")):  # else nothing of another run is there
            manifest.write_record(path, record)
            return
        try:
            other = manifest.read_record(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{out} holds results of an unknown run ({error}); choose another --out or remove it"
            ) from error
        differing = sorted(
            key for key in record.keys() | other.keys() - {"checksum"} if record.get(key) != other.get(key)
        )
        if differing:
            raise ValueError(
                f"{out} holds another run ({', '.join(f'{key} {other.get(key)!r}' for key in differing)}, now "
                f"{', '.join(repr(record.get(key)) for key in differing)}); choose another --out or remove it"
            )


def identity_of(run: Run, contestant: Contestant, contents: dict[str, Contents]) -> dict:
    """What a run's names stand for now: the checkpoint's files may change under their name, and the data's."""
    name, _, checkpoint = run.model.partition(":")
    version = checkpoint_version(checkpoint if name in contestants.names() else run.model)
    content = {source: held.hash for source, held in contents.items()}
    return {"bench": VERSION, "checkpoint": version, "served_at": contestant.served_at, "content": content}


def checkpoint_version(checkpoint: str) -> str:
    """SHA-256 of the files that make a checkpoint's answers; the commit of a downloaded hub id; else ""."""
    from huggingface_hub import try_to_load_from_cache

    weights = Path(checkpoint)
    if weights.exists():
        files = [weights] if weights.is_file() else sorted(file for kind in DECIDING for file in weights.glob(kind))
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {manifest.fingerprint(file)['sha256']}\n".encode())
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
            f"checkpoint whose config.json can be read ({error}); a VLM that needs an environment of its own is served "
            "there and passed as openai:MODEL, see the table of bench/README.md"
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


def evaluate(
    run: Run, contestant: Contestant, out: Path, batch_size: int = 4, num_proc: int = 1
) -> dict[str, Any] | None:
    """
    Score what is not scored yet, or failed, and, on the main process, write and return the summary.

    num_proc: processes that read and prepare images ahead, and, in dense mode, processes that score maps.
    """
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
    contents = contents_of(run.data, opened, run.as_released)
    if not run.skip_bad:
        for name, held in contents.items():
            refuse(run.data, name, held.bad)
    kept = points_of(opened, run.mode, run.max_points, contents)
    if state.is_main_process:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        run.check(out, identity_of(run, contestant, contents))
    state.wait_for_everyone()

    chunks = [(name, start) for name, rows in opened.items() for start in range(0, len(rows), CHUNK)]
    joined = {name for name in opened if manifest.record_beside(maps_file(out, name))} if run.mode == "dense" else set()
    looked_at = chunks[state.process_index :: state.num_processes]
    unfinished = set(gather_object([chunk for chunk in looked_at if not is_done(out, chunk, run.mode, joined)]))
    todo = [chunk for chunk in chunks if chunk in unfinished]
    batches = Batches(run, contestant, opened, kept, todo, batch_size if contestant.batch_safe else 1)
    prepared = ahead(batches, shares(len(todo), state), num_proc) if todo else ()
    by_chunk = itertools.groupby(prepared, key=lambda batch: batch[0])
    pending = deque()
    with (
        ThreadPoolExecutor(1) as writer,  # the model need not wait for the disk
        Workers(num_proc) as pool,
        tqdm(total=len(todo), unit="chunk", disable=not state.is_main_process) as bar,
    ):
        for chunk, parts in by_chunk:
            part = predict(run, contestant, out, chunk, (batch[1:] for batch in parts), pool)
            pending.append(writer.submit(finish, part))
            if len(pending) > PENDING:
                pending.popleft().result()
            bar.update(todo.index(chunk) + 1 - bar.n)  # those before it are finished or with other processes
        for part in pending:
            part.result()
        state.wait_for_everyone()
    return summarise(run, contestant, contents, kept, chunks, out) if state.is_main_process else None


def processes() -> PartialState:
    """accelerate's state: this process among those that a launcher started, on CPUs too if there is nothing else."""
    # a rank waits for the slowest, which may be asking an endpoint
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def size(run: Run) -> tuple[int, int]:
    """Number of images and of points that a run scores."""
    kept = points_of(open_sources(run.data, list(run.sources)), run.mode, run.max_points)
    counts = [len(points) for rows in kept.values() for points in rows.values()]
    return len(counts), sum(counts)


def save_marked(run: Run, contestant: Contestant, folder: Path, images: int) -> None:
    """Pictures of the points of the first `images` images, as the contestant is shown them."""
    if contestant.dense:
        raise ValueError(f"{contestant.title} is not shown marked images; leave --save-marked out")
    opened = open_sources(run.data, list(run.sources))
    kept = points_of(opened, run.mode, run.max_points)
    queries = (
        read_row(opened[name], index, points, run.mode)[1]
        for name, rows in kept.items()
        for index, points in rows.items()
    )
    _prompt.save_marked(itertools.islice(queries, images), folder, getattr(contestant, "questions", _prompt.questions))


# Reading ahead


class Batches:
    """Batches of some chunks, read and prepared, for DataLoader; a chunk without rows to score has an empty one."""

    def __init__(self, run: Run, contestant: Contestant, opened: dict, kept: dict, chunks: list, batch_size: int):
        self.run, self.contestant, self.opened, self.kept = run, contestant, opened, kept
        self.numbers, self.of_chunk = [], []  # the latter: a range of the former for each chunk
        for name, start in chunks:
            first_batch = len(self.numbers)
            rows = [index for index in range(start, start + CHUNK) if index in kept[name]]
            for first in range(0, max(1, len(rows)), batch_size):
                self.numbers.append(((name, start), rows[first : first + batch_size]))
            self.of_chunk.append(range(first_batch, len(self.numbers)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> tuple:
        """(chunk, rows, rows that cannot be decoded, what the contestant made of the others or the error it raised)."""
        (name, start), numbers = self.numbers[number]
        rows, queries, bad = [], [], {}
        for index in numbers:
            try:
                row, query = read_row(self.opened[name], index, self.kept[name][index], self.run.mode)
            except BadRow as error:
                bad[index] = self.opened[name][index]["id"], str(error)
            else:
                rows.append(row)
                queries.append(query)
        try:
            prepared = self.contestant.prepare(queries) if queries else None
        except Exception as error:  # DataLoader would raise another, with a traceback for a message
            prepared = error
        return (name, start), rows, bad, prepared


def shares(count: int, state: PartialState) -> Iterator[int]:
    """The numbers below `count`, each for the one process that asks for it first."""
    if state.num_processes == 1:
        return iter(range(count))
    name, *_ = gather_object([secrets.token_hex(8)])  # the main process's, for a counter of this call alone
    counter = PrefixStore(name, distributed_c10d._get_default_store())
    return itertools.takewhile(lambda number: number < count, (counter.add("next", 1) - 1 for _ in itertools.count()))


def ahead(batches: Batches, chunks: Iterator[int], num_proc: int) -> Iterator[tuple]:
    """
    The batches of the chunks with these numbers, in order, read and prepared by `num_proc` processes, two batches each
    before they are needed: so early is a chunk's number drawn.
    """
    # forked, they share the contestant without a copy; macOS does not fork safely, and there all is done in line
    forks = {"num_workers": num_proc, "multiprocessing_context": "fork"} if sys.platform == "linux" else {}
    numbers = itertools.chain.from_iterable(batches.of_chunk[chunk] for chunk in chunks)
    options = {"batch_size": None, "collate_fn": tuple, "worker_init_fn": end_with_parent}
    return iter(DataLoader(batches, sampler=numbers, **options, **forks))


# Parts


@dataclass
class Part:
    """The predictions of a chunk. scores: of its maps, which may still be under way."""

    file: Path
    table: pa.Table
    bad: dict[int, tuple[str, str]]
    maps: pa.Table | None = None
    scores: list[Future] | None = None


def predict(
    run: Run, contestant: Contestant, out: Path, chunk: tuple[str, int], batches: Iterator, pool: Workers
) -> Part:
    """Run the model on the batches of a chunk. Raises ValueError for a row that cannot be decoded, without skip_bad."""
    tables, maps, scores, unreadable = [scoring.POINTS.empty_table()], [scoring.MAPS.empty_table()], [], {}
    for rows, bad, prepared in batches:
        unreadable |= bad
        if not run.skip_bad:
            refuse(run.data, chunk[0], bad)
        if isinstance(prepared, Exception):
            raise prepared
        if rows and run.mode == "points":
            tables.append(scoring.predict_points(contestant, rows, prepared, run.as_released))
        elif rows:
            depths = scoring.predict_maps(contestant, rows, prepared)
            maps.append(scoring.maps_table(rows, depths))
            scores += [pool.submit(scoring.score_map, row, depth) for row, depth in zip(rows, depths, strict=True)]
    if run.mode == "points":
        return Part(part_file(out, chunk), pa.concat_tables(tables), unreadable)
    return Part(part_file(out, chunk), scoring.images_table([]), unreadable, pa.concat_tables(maps), scores)


def finish(part: Part) -> None:
    """Write a part, when its maps are scored."""
    if part.maps is not None:
        write_part(maps_part(part.file), part.maps, {})
        part.table = scoring.images_table([score.result() for score in part.scores])
    failed = part.table["status"].to_pylist().count("failed") if part.maps is None else 0
    write_part(part.file, part.table, {"failed": failed, "bad": [[index, *row] for index, row in part.bad.items()]})


def part_file(out: Path, chunk: tuple[str, int]) -> Path:
    return out / "parts" / f"{chunk[0]}-{chunk[1]:07d}.parquet"


def maps_part(part: Path) -> Path:
    return part.with_name(f"{part.stem}-maps.parquet")


def maps_file(out: Path, source: str) -> Path:
    return out / "maps" / f"{source}.parquet"


def is_done(out: Path, chunk: tuple[str, int], mode: str, joined: set[str]) -> bool:
    """Whether a chunk is there, and no request of it failed: those are made again, the others' replies are kept."""
    part = part_file(out, chunk)
    record = manifest.record_beside(part)
    if record is None or record["failed"]:
        return False
    return mode == "points" or chunk[0] in joined or manifest.record_beside(maps_part(part)) is not None


def write_part(file: Path, table: pa.Table, facts: dict) -> None:
    write_table(file, table)
    manifest.write_record_beside(file, facts)


def write_table(file: Path, table: pa.Table) -> None:
    with open_whole(file) as opened:
        pq.write_table(table.combine_chunks(), opened)


# The summary


def summarise(run: Run, contestant: Contestant, contents: dict, kept: dict, chunks: list, out: Path) -> dict[str, Any]:
    """Join the parts in the data's order, write them and `summary.json`; refuse if the counts are not exact."""
    records = {chunk: manifest.record_beside(part_file(out, chunk)) for chunk in chunks}
    if lost := [part_file(out, chunk) for chunk, record in records.items() if record is None]:
        raise ValueError(f"{lost[0]} is missing or has changed; run the same command again")
    tables = [pq.read_table(part_file(out, chunk)) for chunk in chunks]
    table = pa.concat_tables(tables, promote_options="default")  # of a chunk without images, the scores are missing
    name = scoring.table_file(run.mode)
    write_table(out / name, table)
    hashes = {name: manifest.fingerprint(out / name)["sha256"]}
    if run.mode == "dense":
        for source in contents:
            hashes[f"maps/{source}.parquet"] = join_maps(out, source, chunks)

    data, frame = {}, table.to_pandas()
    for source, held in contents.items():
        bad = dict(held.bad)
        for (of_source, _), record in records.items():
            bad |= {index: (name, reason) for index, name, reason in record["bad"] if of_source == source}
        expected = [
            len(points) if run.mode == "points" else 1 for index, points in kept[source].items() if index not in bad
        ]
        rows = int((frame.source == source).sum())
        if rows != sum(expected):
            raise ValueError(
                f"{out} has {rows} results of {sum(expected)} for {source}; remove its parts and run again"
            )
        bad_rows = [{"row": index, "id": name, "reason": reason} for index, (name, reason) in sorted(bad.items())]
        data[source] = {"hash": held.hash, "rows": held.rows, "images_of": held.images_of, "bad_rows": bad_rows}
    summary = {
        "format": scoring.FORMAT,
        "contestant": {"model": run.model, "title": contestant.title, "group": contestant.group}
        | {"quantity": contestant.quantity, "uses_intrinsics": contestant.uses_intrinsics, "dense": contestant.dense},
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
        "data": data,
        **scoring.of_sources(frame, list(contents), run.mode, run.as_released),
        "hashes": hashes,
    }
    return manifest.write_record(out / "summary.json", summary)


def join_maps(out: Path, source: str, chunks: list[tuple[str, int]]) -> str:
    """Write the maps of a source's parts as one file, if that has not been done, and remove them; its hash."""
    file = maps_file(out, source)
    record = manifest.record_beside(file)
    parts = [maps_part(part_file(out, chunk)) for chunk in chunks if chunk[0] == source]
    if record is None:
        file.parent.mkdir(exist_ok=True)
        with open_whole(file) as opened, pq.ParquetWriter(opened, scoring.MAPS, compression="zstd") as writer:
            for part in parts:
                writer.write_table(pq.read_table(part), row_group_size=1)
        record = manifest.write_record_beside(file, {"rows": pq.read_metadata(file).num_rows})
    for part in parts:
        part.unlink(missing_ok=True)
        part.with_suffix(".json").unlink(missing_ok=True)
    return record["file"]["sha256"]


# Scoring again


def rescore(folder: Path, data: str | None = None, num_proc: int = 1) -> dict[str, Any]:
    """
    Compute all scores of a finished run again from its saved predictions, and write them; returns the summary.

    data: the benchmark that was evaluated, where it has moved; only maps need it. Raises ValueError if predictions or
    data have changed.
    """
    summary = scoring.read_summary(folder)
    mode, as_released = (summary["protocol"][name] for name in ("mode", "as_released"))
    name, sources = scoring.table_file(mode), list(summary["data"])
    if mode == "dense":
        write_table(folder / name, score_maps(folder, summary, data or summary["protocol"]["data"], num_proc))
    summary |= scoring.of_sources(pandas.read_parquet(folder / name), sources, mode, as_released)
    summary["hashes"] |= {name: manifest.fingerprint(folder / name)["sha256"]}
    del summary["checksum"]
    return manifest.write_record(folder / "summary.json", summary)


def score_maps(folder: Path, summary: dict, data: str, num_proc: int) -> pa.Table:
    """The scores of a run's saved maps, against the depth maps of `data`."""
    hashes, scores = {source: of["hash"] for source, of in summary["data"].items()}, []
    with Workers(num_proc) as pool:
        for source, rows in open_evaluated(data, hashes, False, folder).items():
            numbers = {name: index for index, name in enumerate(rows.select_columns(["id"])["id"])}
            maps = pq.ParquetFile(maps_file(folder, source))
            futures = deque()
            for group in tqdm(range(maps.num_row_groups), desc=source, unit="map", disable=None):
                (stored,) = maps.read_row_group(group).to_pylist()
                row, _ = read_row(rows, numbers[stored["id"]], np.zeros(0, int), "dense")
                futures.append(pool.submit(scoring.score_map, row, scoring.stored_map(stored)))
                if len(futures) > 4 * num_proc:
                    scores.append(futures.popleft().result())
            scores += [future.result() for future in futures]
    return scoring.images_table(scores)
