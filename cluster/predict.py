"""Prediction over a plan's shards, in this process or on Ray's actors: the same files to the byte.

A row per photo: `id`; `status`, "ok" or "failed", and the `reason`; `width`, `height`, `fx`, `fy`, `cx`, `cy` in px of
the photo and `focal_length_source`; `depth`, a 16-bit PNG whose values / `depth_scale` are metres along z; `answer`,
where a question was asked. What is not known of a failed photo is null.
"""

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature

from bench.build import png
from bench.files import open_whole, write_json
from depthvlm import handler
from depthvlm.predict import in_background, load
from depthvlm.processing_depthvlm import DepthVLMProcessor

from .inputs import read_photos
from .photos import collate
from .plan import Plan, Settings, open_plan

ENDING = (MemoryError, ImportError)  # of the machine, not of a photo
ENCODERS = 2  # threads that compress maps while the model is at the next batch
NAMED = 100  # failed photos that the summary names; all are in the rows
SCHEMA = pa.schema(
    [("id", pa.string()), ("status", pa.string()), ("reason", pa.string())]
    + [("width", pa.int32()), ("height", pa.int32())]
    + [(name, pa.float64()) for name in ("fx", "fy", "cx", "cy")]
    + [("focal_length_source", pa.string())]
    + [("depth", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("depth_scale", pa.float64())]
    + [("answer", pa.string())]
)
FEATURES = {  # what `load_dataset` reads from the files' metadata
    "string": "id status reason focal_length_source answer".split(),
    "int32": "width height".split(),
    "float64": "fx fy cx cy depth_scale".split(),
}


@dataclass(frozen=True)
class LoadedShard:
    """
    What a reader hands to a predictor.

    rows: a dict per photo, in the listing's order, finished for photos that cannot be read. batches: of the others,
    as the model takes them, but in NumPy; positions: of each batch's photos in `rows`.
    """

    shard: int
    rows: list[dict]
    batches: list[dict]
    positions: list[list[int]]


def check(settings: Settings) -> None:
    """Raise what would fail for every photo: a model, a question or a budget that cannot be used."""
    processor = DepthVLMProcessor.from_pretrained(settings.model, trust_remote_code=False)
    handler.encode_inputs(processor, [Image.new("RGB", (64, 64))], settings.question, [None], settings.max_pixels)


class Reader:
    """Reads and preprocesses the photos of shards, on a CPU."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.processor = DepthVLMProcessor.from_pretrained(plan.settings.model, trust_remote_code=False)

    def __call__(self, shard: int) -> LoadedShard:
        settings, listed = self.plan.settings, self.plan.inputs(shard)
        rows, encoded = [], {}
        for position, (row, photo) in enumerate(zip(listed, read_photos(settings.source, listed), strict=True)):
            rows.append(dict.fromkeys(SCHEMA.names) | {"id": row["id"], "status": "ok"})
            try:
                if isinstance(photo, Exception):
                    raise photo
                encoded[position] = self.encode(row, photo)
            except ENDING:
                raise
            except Exception as error:  # one file that nobody foresaw must not end a run of days
                reason = " ".join(str(error).split())[:500].removeprefix("images[0] ")
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                rows[-1] |= {"status": "failed", "reason": kind + reason}
        # like beside like: less padding, and one call of the depth head for several photos
        order = sorted(encoded, key=lambda position: (*encoded[position]["image_grid_thw"][0].tolist(), position))
        positions = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
        batches = [collate(self.processor, [encoded[position] for position in group]) for group in positions]
        return LoadedShard(shard, rows, [to_numpy(batch) for batch in batches], positions)

    def encode(self, row: dict, photo) -> BatchFeature:
        settings, focal_length = self.plan.settings, self.plan.settings.focal_length
        if row["fx"] is not None:
            focal_length = row["fx"] if row["fx"] == row["fy"] else (row["fx"], row["fy"])
        return handler.encode_inputs(self.processor, [photo], settings.question, [focal_length], settings.max_pixels)


class Predictor:
    """Holds the model; predicts loaded shards and writes their files."""

    def __init__(self, plan: Plan):
        settings = plan.settings
        torch.set_num_threads(settings.threads)
        self.plan = plan
        self.model, self.processor = load(settings.model, settings.device, settings.dtype)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.encoders = ThreadPoolExecutor(ENCODERS)

    def __call__(self, loaded: LoadedShard) -> dict:
        """Write the shard's file; returns its number, its photos, and the seconds from its first batch to the file."""
        start = time.perf_counter()
        encoded = []
        for batch, positions in zip(loaded.batches, loaded.positions, strict=True):
            for position, fields, depth in zip(positions, *self.predict(batch), strict=True):
                loaded.rows[position].update(fields)
                encoded.append((position, self.encoders.submit(encode_depth, depth)))
        for position, depth in encoded:
            loaded.rows[position].update(depth.result())
        table = pa.Table.from_pylist(loaded.rows, schema())
        with open_whole(self.plan.path(loaded.shard)) as file:
            pq.write_table(table, file, use_dictionary=["status", "reason", "focal_length_source"])
        seconds = time.perf_counter() - start
        return {"shard": loaded.shard, "photos": len(loaded.rows), "seconds": seconds, "actor": self.name}

    @torch.inference_mode()
    def predict(self, batch: dict) -> tuple[list[dict], list[np.ndarray]]:
        """Columns of each photo, without its depth, and its metres `(height, width)`."""
        settings, fields, depths = self.plan.settings, [], []
        for camera, depth, answer in handler.predict(
            self.model,
            self.processor,
            from_numpy(batch),
            answers=settings.question is not None,
            max_new_tokens=settings.max_new_tokens,
            processed_size=settings.depth_size == "processed",
        ):
            camera = handler.describe_camera(camera)
            del camera["processed_size"]
            fields.append(camera | {"answer": answer})
            depths.append(depth)
        return fields, depths


def to_numpy(batch: BatchFeature) -> dict:
    """Ray passes NumPy's arrays on without a copy."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def from_numpy(batch: dict) -> BatchFeature:
    arrays = {name: torch.from_numpy(value.copy()) for name, value in batch.items() if isinstance(value, np.ndarray)}
    return BatchFeature(batch | arrays)


def encode_depth(depth: np.ndarray) -> dict:
    """
    `depth` and `depth_scale`: the farthest pixel is stored as 65535, so that nothing is cut off; 0, which would mean
    that there is none, becomes 1.
    """
    scale = 65535 / float(depth.max())
    stored = np.clip(np.rint(depth.astype(np.float64) * scale), 1, 65535).astype(np.uint16)
    return {"depth": {"bytes": png(stored), "path": None}, "depth_scale": scale}


def schema() -> pa.Schema:
    """SCHEMA with what makes `load_dataset` decode depth."""
    features = {name: {"dtype": kind, "_type": "Value"} for kind, names in FEATURES.items() for name in names}
    features["depth"] = {"_type": "Image"}
    features = {name: features[name] for name in SCHEMA.names}
    return SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


# The two ways over a plan's shards: an iterator of reports, in any order


def in_this_process(plan: Plan, shards: list[int]) -> Iterator[dict]:
    """One after the other; the next one is read meanwhile."""
    reader, predictor = Reader(plan), Predictor(plan)
    with ThreadPoolExecutor(1) as pool:
        for loaded in in_background(map(reader, shards), pool):
            yield predictor(loaded)


def on_ray(plan: Plan, shards: list[int], actors: int, readers: int) -> Iterator[dict]:
    """
    By Ray Data, on the cluster that `ray.init` has connected to: one task per shard, on `readers` actors that read and
    preprocess and up to `actors` actors with a model each, on a GPU with device "cuda". Raises `OSError` if one fails.
    """
    from ray.data import ActorPoolStrategy, DataContext, from_items
    from ray.exceptions import RayError

    settings = plan.settings
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    tasks = from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    loaded = tasks.map_batches(
        RayReader,
        fn_constructor_args=(str(plan.out),),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=readers, initial_size=readers),
        num_cpus=0.25,  # not the predictor's, or Ray would fuse both into one actor
    )
    reports = loaded.map_batches(
        RayPredictor,
        fn_constructor_args=(str(plan.out),),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        num_cpus=settings.threads,
        num_gpus=1 if settings.device == "cuda" else 0,
    )
    try:
        yield from reports.iter_rows()
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]  # of a traceback
        raise OSError(f"a process on Ray failed ({reason}); finished shards are kept") from error


class RayReader:
    """`Reader` as Ray Data calls it: with a batch of one shard."""

    def __init__(self, out: str):
        self.read = Reader(open_plan(Path(out)))

    def __call__(self, batch: dict) -> dict:
        loaded = np.empty(1, object)
        loaded[0] = self.read(int(batch["shard"][0]))
        return {"loaded": loaded}


class RayPredictor:
    """`Predictor` as Ray Data calls it."""

    def __init__(self, out: str):
        self.predict = Predictor(open_plan(Path(out)))

    def __call__(self, batch: dict) -> dict:
        return {name: np.array([value]) for name, value in self.predict(batch["loaded"][0]).items()}


# What was done


def run(plan: Plan, shards: list[int], reports: Iterator[dict]) -> None:
    """Work through reports, with a bar, and print each actor's speed."""
    photos, seconds = Counter(), Counter()
    with tqdm(total=sum(map(plan.size, shards)), unit="photo", desc=str(plan.out), disable=None) as bar:
        for report in reports:
            photos[str(report["actor"])] += int(report["photos"])
            seconds[str(report["actor"])] += float(report["seconds"])
            bar.update(int(report["photos"]))
    for actor, count in sorted(photos.items()):
        print(f"{actor}: {count} photos, {count / seconds[actor]:.1f} images/s")


def summarise(plan: Plan) -> dict:
    """
    Count rows and statuses of a finished plan, write OUT/summary.json, and remove what killed processes left.

    Raises `ValueError` if rows are missing.
    """

    def count(shard: int) -> tuple[int, list[dict]]:
        table = pq.read_table(plan.path(shard), columns=["id", "status", "reason"])
        return len(table), [row for row in table.to_pylist() if row["status"] != "ok"]

    with ThreadPoolExecutor(16) as pool:
        counted = list(pool.map(count, range(plan.shards)))
    rows = sum(number for number, _ in counted)
    if rows != plan.photos:
        raise ValueError(f"{plan.out} has {rows} rows for {plan.photos} photos; remove its shards and run again")
    failed = [{"id": row["id"], "reason": row["reason"]} for _, rows in counted for row in rows]
    summary = {"photos": plan.photos, "failed": len(failed), "shards": plan.shards, "first_failed": failed[:NAMED]}
    write_json(plan.out / "summary.json", summary)
    for unfinished in (plan.out / "shards").glob(".part-*.tmp"):
        unfinished.unlink()
    return summary
