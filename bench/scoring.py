"""A contestant's predictions for some rows, and the scores of a source's predictions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas
import pyarrow as pa

from . import manifest, metrics, released
from .geometry import change_grid, change_grid_intrinsics, ray_per_z, read_map

if TYPE_CHECKING:
    from .contestants._base import Contestant, Prepared
    from .geometry import Intrinsics

FORMAT = "depthvlm-bench-results/2"  # of summary.json and the tables beside it
POINTS = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "scene")]
    + [(name, pa.float64()) for name in ("u", "v", "gt", "prediction")]
    + [(name, pa.string()) for name in ("status", "text")]
)
MAPS = pa.schema([("id", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("depth", pa.large_binary())])


def as_asked(
    prediction: np.ndarray, u: np.ndarray, v: np.ndarray, intrinsics: Intrinsics, given: str, asked: str
) -> np.ndarray:
    """A depth of the quantity `given` ("z" or "ray") as the quantity `asked`, at (u, v) px of the image."""
    if given == asked:
        return prediction
    factor = ray_per_z(u, v, intrinsics)
    return prediction * factor if asked == "ray" else prediction / factor


def checked_maps(contestant: Contestant, rows: list[dict], prepared: Prepared) -> list[np.ndarray]:
    """A contestant's maps, which must be of the images' sizes."""
    maps = contestant.maps(prepared)
    for row, depth in zip(rows, maps, strict=True):
        if depth.shape != row["size"][::-1]:
            raise ValueError(
                f"the contestant gave a map of {depth.shape} for {row['name']} of {row['size'][::-1]} "
                "(height, width); `maps` has to return the image's own size"
            )
    return maps


def predict_points(contestant: Contestant, rows: list[dict], prepared: Prepared, as_released: bool) -> pa.Table:
    """POINTS of some rows of `rows.read_row`; `prepared` is what the contestant made of their queries."""
    if contestant.dense:
        replies = []
        for row, depth in zip(rows, checked_maps(contestant, rows, prepared), strict=True):
            if as_released:
                depth = released.at_points(depth, row["points"], row["intrinsics"][0])
            else:
                depth = read_map(depth, *row["points"].T)
            replies.append((depth, ["ok"] * len(depth), [""] * len(depth)))
    else:
        answers = contestant.answers(prepared)
        replies = [
            tuple([getattr(answer, name) for answer in reply] for name in ("depth", "status", "text"))
            for reply in answers
        ]
    parts = [POINTS.empty_table()]
    for row, (depth, status, text) in zip(rows, replies, strict=True):
        n = len(row["points"])
        if len(depth) != n:
            raise ValueError(f"the contestant gave {len(depth)} answers to {n} points of {row['name']}")
        u, v = row["points"].T
        depth = np.array(depth, dtype=np.float64)
        if not as_released:
            depth = as_asked(depth, u, v, row["intrinsics"], contestant.quantity, row["depth_type"])
        status = np.array(status, dtype=object)
        answered = status == "ok"
        valid = answered & metrics.is_answer(depth)
        names = ([row[name]] * n for name in ("id", "source", "scene"))
        values = u, v, row["gt"], np.where(valid, depth, np.nan), np.where(answered & ~valid, "invalid", status), text
        parts.append(pa.table([*names, *values], schema=POINTS))
    return pa.concat_tables(parts)


def predict_maps(contestant: Contestant, rows: list[dict], prepared: Prepared) -> list[np.ndarray]:
    """Predicted depth on each row's depth map's grid (h, w), float16 metres, of the quantity that the row holds."""
    maps = []
    for row, depth in zip(rows, checked_maps(contestant, rows, prepared), strict=True):
        size = row["depth"].shape[::-1]
        if contestant.quantity != row["depth_type"] or size != row["size"]:
            u, v = change_grid(*np.meshgrid(*map(np.arange, size)), size, row["size"])
            depth = depth if size == row["size"] else read_map(depth, u, v)
            depth = as_asked(depth, u, v, row["intrinsics"], contestant.quantity, row["depth_type"])
        with np.errstate(over="ignore"):  # beyond 65504 m it is infinite: no answer
            maps.append(depth.astype(np.float16))
    return maps


def score_map(row: dict, prediction: np.ndarray) -> dict:
    """The scores of a predicted map on the grid of its row's depth map."""
    size = row["depth"].shape[::-1]
    intrinsics = change_grid_intrinsics(row["intrinsics"], row["size"], size)
    depth = row["depth"].astype(np.float64) / row["depth_scale"]
    names = {name: row[name] for name in ("id", "source", "scene")}
    return names | metrics.map_scores(prediction, depth, intrinsics, row["depth_type"])


def images_table(scores: list[dict]) -> pa.Table:
    """One row per image, of what `score_map` gives."""
    names = ("id", "source", "scene")
    types = {name: pa.string() for name in names}
    for name in scores[0] if scores else ():
        types.setdefault(name, pa.int64() if name in ("points", "answered") else pa.float64())
    return pa.Table.from_pylist(scores, pa.schema(types.items()))


def maps_table(rows: list[dict], maps: list[np.ndarray]) -> pa.Table:
    """MAPS: float16 in rows from the top, little-endian."""
    columns = [row["id"] for row in rows], *([depth.shape[axis] for depth in maps] for axis in (0, 1))
    return pa.table([*columns, [depth.astype("<f2").tobytes() for depth in maps]], schema=MAPS)


def stored_map(row: dict) -> np.ndarray:
    """A row of MAPS as (h, w) float16."""
    return np.frombuffer(row["depth"], "<f2").reshape(row["height"], row["width"])


# Scores


def of_points(table: pandas.DataFrame, as_released: bool) -> dict:
    prediction, depth = table.prediction.to_numpy(float), table["gt"].to_numpy(float)
    counts = {"points": len(table), "counts": dict(sorted(Counter(table.status).items()))}
    if not as_released:
        scores = metrics.scores(prediction, depth)
        return counts | {"metrics": {name: scores[name] for name in scores if name not in ("points", "answered")}}
    return counts | {"metrics": {"delta1": released.delta1(table)}}


def of_images(table: pandas.DataFrame) -> dict:
    """Means over images, and of how many images: one without a boundary, say, has no boundary F1."""
    names = [name for name in table.columns if name not in ("id", "source", "scene", "points", "answered")]
    columns = {name: table[name].astype(float).dropna() for name in names}
    points, answered = int(table.points.sum()), int(table.answered.sum())
    return {
        "points": points,
        "counts": {"invalid": points - answered, "ok": answered},
        "images_with": {name: len(column) for name, column in columns.items()},
        "metrics": {name: float(column.mean()) if len(column) else None for name, column in columns.items()},
    }


def of_sources(table: pandas.DataFrame, sources: list[str], mode: str, as_released: bool) -> dict:
    """`sources` and `mean` of a summary, from its predictions or images."""
    scores = {}
    for name in sources:
        part = table[table.source == name]
        scored = of_points(part, as_released) if mode == "points" else of_images(part)
        scores[name] = {"images": int(part["id"].nunique())} | scored
    names = list(next(iter(scores.values()))["metrics"])
    values = {name: [source["metrics"][name] for source in scores.values()] for name in names}
    return {"sources": scores, "mean": {name: mean_or_none(values[name]) for name in names}}


def mean_or_none(values: list) -> float | None:
    """Over sources; one source without a value leaves none, for a mean of the others would be of other data."""
    return None if None in values else float(np.mean(values))


# Results


def table_file(mode: str) -> str:
    """The file that holds what a summary's scores are made of."""
    return "predictions.parquet" if mode == "points" else "images.parquet"


def read_summary(folder: Path) -> dict:
    """summary.json of a finished run. Raises ValueError unless it and the files it names are as they were written."""
    path, remedy = folder / "summary.json", "run `python -m bench evaluate` again"
    try:
        summary = manifest.read_record(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no summary.json; pass a folder that `python -m bench evaluate` has finished"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {remedy}") from error
    if summary.get("format") != FORMAT:
        raise ValueError(f"{path} has format {summary.get('format')!r}, not {FORMAT!r}; {remedy}")
    for name, sha256 in summary["hashes"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {remedy}")
        if manifest.fingerprint(folder / name)["sha256"] != sha256:
            raise ValueError(f"{folder / name} has changed since it was written: its hash does not match; {remedy}")
    return summary
