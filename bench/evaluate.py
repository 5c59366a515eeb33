"""Scores a contestant on DepthVLM-Bench: rows of `load_dataset` -> predictions -> scores.

OUT holds `run.json` (what was asked), `parts/` (finished chunks), and at the end `predictions.parquet` (one row a
point; in dense mode `images.parquet`, one row an image) and `summary.json`. A chunk is a fixed run of a source's rows;
each process takes every n-th, writes it whole or not at all, and skips what is there. So any number of processes,
killed and started again as often as you like, ends in the same files.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import re
from collections import Counter
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
from PIL import Image
from tqdm import tqdm

from . import contestants, metrics, vlm
from .contestant import Contestant, Query
from .depthvlm_bench import GROUPS, VERSION
from .geometry import change_grid, ray_per_z
from .report import FORMAT

DECIDING = ("*.safetensors", "*.jinja", "*config.json", "tokenizer.json")  # files of a checkpoint that make its answers
CHUNK = 16  # rows of a source that are finished together
MODES = ("points", "dense")
CANONICAL_FOCAL_LENGTH = 1000  # px, of the released scorer
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
        record, file = asdict(self) | {"sources": list(self.sources), "format": FORMAT} | identity, out / "run.json"
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
    from huggingface_hub import try_to_load_from_cache

    name, _, checkpoint = run.model.partition(":")
    checkpoint = checkpoint if name in contestants.names() else run.model
    weights = Path(checkpoint)
    if weights.exists():
        files = [weights] if weights.is_file() else sorted(file for kind in DECIDING for file in weights.glob(kind))
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        version = digest.hexdigest()
    else:
        config = try_to_load_from_cache(checkpoint, "config.json") if re.fullmatch(r"[\w./-]+", checkpoint) else None
        version = Path(config).parent.name if isinstance(config, str) else ""  # the commit
    digest = hashlib.sha256()
    for rows in opened.values():
        points = rows.select_columns(["id", "points_u", "points_v", "points_depth"]).with_format("arrow")
        for table in points.iter(1000):
            digest.update(repr(table.to_pydict()).encode())
    return {"bench": VERSION, "checkpoint": version, "served_at": contestant.served_at, "points": digest.hexdigest()}


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


# Rows


def open_sources(data: str, names: list[str] | None) -> dict[str, datasets.Dataset]:
    """Test rows of each source of a built benchmark, images left encoded; in the order of the paper, others after."""
    try:
        configs = datasets.get_dataset_config_names(data)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"{data} is no built benchmark ({error}); make one with `python -m bench build`") from error
    order = GROUPS["paper_eval"][1]
    present = [name for name in (*order, *sorted(set(configs) - set(order))) if name in configs and name not in GROUPS]
    if unknown := sorted(set(names or ()) - set(present)):
        raise ValueError(f"{data} has no source {', '.join(unknown)}; it has {', '.join(present)}")
    opened = {}
    for name in [name for name in present if name in (names or present)]:
        rows = open_test_rows(data, name)
        if rows is None and names:
            raise ValueError(f"{name} in {data} has no test rows; build them, or leave it out of --sources")
        if rows is not None:
            opened[name] = rows
    if not opened:
        raise ValueError(f"{data} has no test rows at all; build a test split first")
    return opened


def open_test_rows(data: str, name: str) -> datasets.Dataset | None:
    """A source's test rows; None without any.

    Its files are named one by one, because `load_dataset(data, name)` takes what it has cached for any older folder of
    the same name for this one's.
    """
    files = datasets.load_dataset_builder(data, name).config.data_files.get("test")
    if not files:
        return None
    return datasets.load_dataset("parquet", data_files={"test": list(files)}, split="test").with_format(None)


def check_annotations(run: Run) -> None:
    """Refuse rows of `import --as-released` for the ordinary protocol, and the other way round, where a build says."""
    for name in run.sources:
        file = Path(run.data) / name / "test.json"
        made = json.loads(file.read_text())["parameters"].get("as_released", False) if file.is_file() else None
        if made is not None and made != run.as_released:
            with_or_without = "leave --as-released out" if run.as_released else "add --as-released"
            kind = "as released" if made else "corrected"
            raise ValueError(f"the points of {name} in {run.data} are {kind}; {with_or_without}, or pass other data")


def read_query(row: dict) -> Query:
    points = np.column_stack([row["points_u"], row["points_v"]]).astype(np.float64).reshape(-1, 2)
    intrinsics = tuple(row[name] for name in ("fx", "fy", "cx", "cy"))
    return Query(f"{row['source']}/{row['split']}/{row['id']}", row["image"].convert("RGB"), intrinsics, points)


def points_of(run: Run, opened: dict[str, datasets.Dataset]) -> dict[str, list[np.ndarray]]:
    """Which points of each row of each source are scored: with `max_points`, evenly spread over all of them."""
    if run.mode == "dense":
        return {name: [np.zeros(0, int)] * len(rows) for name, rows in opened.items()}
    counts = {name: [len(u) for u in rows.select_columns(["points_u"])["points_u"]] for name, rows in opened.items()}
    for name, own in counts.items():
        if not sum(own):
            raise ValueError(f"{name} has no points; its test rows were not built by this benchmark: build them again")
    step = max(1.0, sum(map(sum, counts.values())) / (run.max_points or math.inf))
    kept, start = {}, 0
    for name, own in counts.items():
        kept[name] = []
        for count in own:
            numbers = np.arange(start, start + count)
            kept[name].append(np.flatnonzero(np.floor((numbers + 1) / step) > np.floor(numbers / step)))
            start += count
        if not sum(map(len, kept[name])):
            raise ValueError(f"--max-points {run.max_points} leaves no point of {name}; raise it or leave {name} out")
    return kept


# A row -> its scores


def as_asked(prediction: np.ndarray, u, v, intrinsics, given: str, asked: str) -> np.ndarray:
    """A depth of the quantity `given` ("z" or "ray") as the quantity `asked`, at (u, v) px of the image."""
    if given == asked:
        return prediction
    factor = ray_per_z(u, v, intrinsics)
    return prediction * factor if asked == "ray" else prediction / factor


def at_pixels(depth: np.ndarray, u: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
    """Values of the pixels that (u, v) lie in."""
    columns, rows = np.floor(u + 0.5).astype(int), np.floor(v + 0.5).astype(int)
    height, width = depth.shape
    if len(u) and not (columns.min() >= 0 and rows.min() >= 0 and columns.max() < width and rows.max() < height):
        raise ValueError(f"{name} has points outside its image of {width}x{height} px; build its source again")
    return depth[rows, columns].astype(np.float64)


def released_grid(depth: np.ndarray, focal_length: float) -> np.ndarray:
    """A map as the released scorer holds it: sized to multiples of 28 and then of 32 px from the canonical size."""
    sides = [round(side * CANONICAL_FOCAL_LENGTH / focal_length) for side in depth.shape]
    height, width = (max(1, round(28 * round(side / 28) / 32)) * 32 for side in sides)
    return np.asarray(Image.fromarray(depth.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def read_as_released(depth: np.ndarray, query: Query) -> np.ndarray:
    """Predictions where the released scorer looks: canonical coordinates on a grid of another size; NaN outside."""
    width, height = query.image.size
    u, v = (
        np.rint(at * (round(side * CANONICAL_FOCAL_LENGTH / query.intrinsics[0]) / side)).astype(int)
        for at, side in zip(query.points.T, (width, height), strict=True)
    )
    grid = released_grid(depth, query.intrinsics[0])
    there = (u < grid.shape[1]) & (v < grid.shape[0])
    found = np.full(len(u), np.nan)
    found[there] = grid[v[there], u[there]]
    return found


def check_map(depth: np.ndarray, query: Query) -> None:
    if depth.shape != query.image.size[::-1]:
        raise ValueError(
            f"the contestant gave a map of {depth.shape} for {query.id} of {query.image.size[::-1]} (height, width); "
            "`maps` has to return the image's own size"
        )


def score_points(contestant: Contestant, rows: list[dict], queries: list[Query], prepared, run: Run) -> list[dict]:
    """One record a point; `prepared` is what the contestant made of the queries."""
    if contestant.dense:
        replies = []
        for query, depth in zip(queries, contestant.maps(prepared), strict=True):
            check_map(depth, query)
            read = read_as_released(depth, query) if run.as_released else at_pixels(depth, *query.points.T, query.id)
            replies.append([(value, "ok" if value > 0 and math.isfinite(value) else "invalid", "") for value in read])
    else:
        answers = contestant.answers(prepared)
        replies = [[(answer.depth, answer.status, answer.text) for answer in reply] for reply in answers]
    records = []
    for row, query, reply in zip(rows, queries, replies, strict=True):
        if len(reply) != len(query.points):
            raise ValueError(f"the contestant gave {len(reply)} answers to {len(query.points)} points of {query.id}")
        u, v = query.points.T
        depth = np.array([value for value, _, _ in reply], dtype=np.float64)
        if not run.as_released:
            depth = as_asked(depth, u, v, query.intrinsics, contestant.quantity, row["depth_type"])
        for n, (_, status, text) in enumerate(reply):
            valid = status == "ok" and depth[n] > 0 and math.isfinite(depth[n])
            records.append(
                {
                    "id": row["id"],
                    "source": row["source"],
                    "u": u[n],
                    "v": v[n],
                    "gt": row["points_depth"][n],
                    "prediction": depth[n] if valid else math.nan,
                    "status": "invalid" if status == "ok" and not valid else status,
                    "text": text,
                }
            )
    return records


def score_maps(contestant: Contestant, rows: list[dict], queries: list[Query], prepared, run: Run) -> list[dict]:
    """One record an image: scores over the depth map's valid pixels, on the depth map's own grid."""
    records = []
    for row, query, depth in zip(rows, queries, contestant.maps(prepared), strict=True):
        check_map(depth, query)
        label = np.asarray(row["depth"]).astype(np.float64) / row["depth_scale"]
        (height, width), (image_width, image_height) = label.shape, query.image.size
        u, v = np.meshgrid(
            change_grid(np.arange(width), width, image_width), change_grid(np.arange(height), height, image_height)
        )
        prediction = at_pixels(depth, u, v, query.id)
        prediction = as_asked(prediction, u, v, query.intrinsics, contestant.quantity, row["depth_type"])
        labelled = label > 0
        to_z = ray_per_z(u, v, query.intrinsics) if row["depth_type"] == "ray" else 1.0
        scale = width / image_width, height / image_height
        fx, fy, cx, cy = query.intrinsics
        on_grid = (fx * scale[0], fy * scale[1], (cx + 0.5) * scale[0] - 0.5, (cy + 0.5) * scale[1] - 0.5)
        records.append(
            {"id": row["id"], "source": row["source"]}
            | metrics.scores(prediction[labelled], label[labelled])
            | {
                "boundary_f1": metrics.boundary_f1(prediction, label),
                "point_cloud_f_score": metrics.point_cloud_f_score(prediction / to_z, label / to_z, on_grid),
            }
        )
    return records


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
    check_annotations(run)
    kept = points_of(run, opened)
    if state.is_main_process:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        run.check(out, identity_of(run, contestant, opened))
    state.wait_for_everyone()

    chunks = [(name, start) for name, rows in opened.items() for start in range(0, len(rows), CHUNK)]
    todo = [chunk for chunk in chunks[state.process_index :: state.num_processes] if not is_done(part_file(out, chunk))]
    batch_size = batch_size if contestant.batch_safe else 1
    score = score_points if run.mode == "points" else score_maps
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
                    records += score(contestant, rows, queries, future.result(), run)
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
    kept = points_of(run, open_sources(run.data, list(run.sources)))
    counts = [len(points) for own in kept.values() for points in own]
    return sum(count > 0 for count in counts), sum(counts)


def save_marked(run: Run, contestant: Contestant, folder: Path, images: int) -> None:
    """Pictures of the points of the first `images` images, as the contestant is shown them."""
    if contestant.dense:
        raise ValueError(f"{contestant.title} is not shown marked images; leave --save-marked out")
    opened = open_sources(run.data, list(run.sources))
    kept = points_of(run, opened)
    chunks = ((name, start) for name, rows in opened.items() for start in range(0, len(rows), CHUNK))
    queries = (query for name, start in chunks for query in read_chunk(opened[name], start, kept[name], run.mode)[1])
    vlm.save_marked(itertools.islice(queries, images), folder, getattr(contestant, "questions", vlm.questions))


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


def read_chunk(dataset: datasets.Dataset, start: int, kept: list[np.ndarray], mode: str):
    """Rows and queries of a chunk; of points, only images with one, without their depth maps."""
    rows, queries = [], []
    dataset = dataset.remove_columns("depth") if mode == "points" else dataset
    for index in range(start, min(start + CHUNK, len(dataset))):
        if mode == "points" and not len(kept[index]):
            continue
        row = dataset[index]
        for name in ("points_u", "points_v", "points_depth"):
            row[name] = np.asarray(row[name])[kept[index]]
        queries.append(read_query(row))
        del row["image"]  # the query has it
        rows.append(row)
    return rows, queries


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
    pyarrow.parquet.write_table(table, file.with_suffix(f".{os.getpid()}"))
    file.with_suffix(f".{os.getpid()}").replace(file)


def write_json(file: Path, value: dict) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    file.with_suffix(".tmp").replace(file)


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
        scored = of_points(own, run.as_released) if run.mode == "points" else of_images(own)
        images = len(points) if run.mode == "dense" else sum(len(own) > 0 for own in points)
        sources[name] = {"images": images} | scored
    names = list(next(iter(sources.values()))["metrics"])
    summary = {
        "format": FORMAT,
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
        "mean": {name: mean_or_none([own["metrics"][name] for own in sources.values()]) for name in names},
    }
    write_json(out / "summary.json", summary)
    return summary


def of_points(table, as_released: bool) -> dict:
    prediction, depth = table.prediction.to_numpy(float), table["gt"].to_numpy(float)
    counts = {"points": len(table), "counts": dict(sorted(Counter(table.status).items()))}
    if not as_released:
        scores = metrics.scores(prediction, depth)
        return counts | {"metrics": {name: scores[name] for name in scores if name not in ("points", "answered")}}
    # as there: what has no prediction leaves the mean, an image with nothing left counts 0
    per_image = []
    for _, own in table.groupby("id", sort=False):
        answered = own[own.prediction.notna()]
        ratio = np.maximum(answered.prediction / answered["gt"], answered["gt"] / answered.prediction)
        per_image.append(float((ratio < 1.25).mean()) if len(answered) else 0.0)
    return counts | {"metrics": {"delta1": float(np.mean(per_image))}}


def of_images(table) -> dict:
    """Means over images, and of how many images: one without a boundary, say, has no boundary F1."""
    names = [name for name in table.columns if name not in ("id", "source", "points", "answered")]
    columns = {name: table[name].astype(float).dropna() for name in names}
    points, answered = int(table.points.sum()), int(table.answered.sum())
    return {
        "points": points,
        "counts": {"invalid": points - answered, "ok": answered},
        "images_with": {name: len(column) for name, column in columns.items()},
        "metrics": {name: float(column.mean()) if len(column) else None for name, column in columns.items()},
    }


def mean_or_none(values: list) -> float | None:
    """Over sources; one source without a value leaves none, for a mean of the others would be of other data."""
    return None if None in values else float(np.mean(values))
