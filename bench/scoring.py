"""A contestant's predictions for some rows -> records, and records -> a source's scores."""

import math
from collections import Counter

import numpy as np
import pandas

from . import metrics, released
from .contestants._base import Contestant, Query
from .geometry import change_grid, change_grid_intrinsics, ray_per_z, read_map

FORMAT = "depthvlm-bench-results/1"  # of summary.json and the tables beside it


def as_asked(prediction: np.ndarray, u, v, intrinsics, given: str, asked: str) -> np.ndarray:
    """A depth of the quantity `given` ("z" or "ray") as the quantity `asked`, at (u, v) px of the image."""
    if given == asked:
        return prediction
    factor = ray_per_z(u, v, intrinsics)
    return prediction * factor if asked == "ray" else prediction / factor


def check_map(depth: np.ndarray, query: Query) -> None:
    if depth.shape != query.image.size[::-1]:
        raise ValueError(
            f"the contestant gave a map of {depth.shape} for {query.id} of {query.image.size[::-1]} (height, width); "
            "`maps` has to return the image's own size"
        )


def score_points(
    contestant: Contestant, rows: list[dict], queries: list[Query], prepared, as_released: bool
) -> list[dict]:
    """One record a point; `prepared` is what the contestant made of the queries."""
    if contestant.dense:
        replies = []
        for query, depth in zip(queries, contestant.maps(prepared), strict=True):
            check_map(depth, query)
            read = released.at_points(depth, query) if as_released else read_map(depth, *query.points.T)
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
        if not as_released:
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


def score_maps(contestant: Contestant, rows: list[dict], queries: list[Query], prepared) -> list[dict]:
    """One record an image: scores over the depth map's valid pixels, on the depth map's own grid."""
    records = []
    for row, query, depth in zip(rows, queries, contestant.maps(prepared), strict=True):
        check_map(depth, query)
        label = np.asarray(row["depth"]).astype(np.float64) / row["depth_scale"]
        size = label.shape[::-1]
        u, v = change_grid(*np.meshgrid(*map(np.arange, size)), size, query.image.size)
        prediction = depth if depth.shape == label.shape else read_map(depth, u, v)
        prediction = as_asked(prediction, u, v, query.intrinsics, contestant.quantity, row["depth_type"])
        labelled = label > 0
        to_z = ray_per_z(u, v, query.intrinsics) if row["depth_type"] == "ray" else 1.0
        on_grid = change_grid_intrinsics(query.intrinsics, query.image.size, size)
        records.append(
            {"id": row["id"], "source": row["source"]}
            | metrics.scores(prediction[labelled], label[labelled])
            | {
                "boundary_f1": metrics.boundary_f1(prediction, label),
                "point_cloud_f_score": metrics.point_cloud_f_score(prediction / to_z, label / to_z, on_grid),
            }
        )
    return records


def of_points(table: pandas.DataFrame, as_released: bool) -> dict:
    prediction, depth = table.prediction.to_numpy(float), table["gt"].to_numpy(float)
    counts = {"points": len(table), "counts": dict(sorted(Counter(table.status).items()))}
    if not as_released:
        scores = metrics.scores(prediction, depth)
        return counts | {"metrics": {name: scores[name] for name in scores if name not in ("points", "answered")}}
    return counts | {"metrics": {"delta1": released.delta1(table)}}


def of_images(table: pandas.DataFrame) -> dict:
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
