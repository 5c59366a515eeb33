"""How far predicted depth is from the truth: pure functions of NumPy arrays, in metres, computed in float64.

Of points: `prediction` and `depth`, both (N,). `depth` is above 0 everywhere. A prediction that is not finite or not
above 0 is no answer: it is wrong for `delta`, and the errors, which have no value for it, are means over the answered
points; NaN where there is none. d is the depth, p the prediction, e = ln p - ln d. Definitions: Eigen et al. 2014.
"""

import math

import numpy as np
from scipy.spatial import cKDTree

from .geometry import ray_per_z

ERRORS = {  # of an answered point: what the errors are means of
    "abs_rel": lambda p, d: np.abs(p - d) / d,
    "sq_rel": lambda p, d: (p - d) ** 2 / d,
    "squared": lambda p, d: (p - d) ** 2,
    "log10": lambda p, d: np.abs(np.log10(p) - np.log10(d)),
    "log": lambda p, d: np.log(p) - np.log(d),
    "squared_log": lambda p, d: (np.log(p) - np.log(d)) ** 2,
}


def is_right(p: np.ndarray, d: np.ndarray, power: int = 1) -> np.ndarray:
    """Whether max(p / d, d / p) < 1.25 ** power (strictly), of each answered point."""
    with np.errstate(over="ignore"):
        return np.maximum(p / d, d / p) < 1.25**power


def delta(prediction: np.ndarray, depth: np.ndarray, power: int = 1) -> float:
    """Share of *all* points with max(p / d, d / p) < 1.25 ** power (strictly)."""
    prediction, depth = checked(prediction, depth)
    right = is_right(*answered(prediction, depth), power)
    return float(right.sum() / len(depth)) if len(depth) else math.nan


def abs_rel(prediction: np.ndarray, depth: np.ndarray) -> float:
    """Mean of |p - d| / d."""
    return mean(errors("abs_rel", prediction, depth))


def sq_rel(prediction: np.ndarray, depth: np.ndarray) -> float:
    """Mean of (p - d)^2 / d, in metres."""
    return mean(errors("sq_rel", prediction, depth))


def rmse(prediction: np.ndarray, depth: np.ndarray) -> float:
    """Root of the mean of (p - d)^2, in metres."""
    return math.sqrt(mean(errors("squared", prediction, depth)))


def rmse_log(prediction: np.ndarray, depth: np.ndarray) -> float:
    """Root of the mean of e^2."""
    return math.sqrt(mean(errors("squared_log", prediction, depth)))


def log10(prediction: np.ndarray, depth: np.ndarray) -> float:
    """Mean of |log10 p - log10 d|."""
    return mean(errors("log10", prediction, depth))


def silog_half(prediction: np.ndarray, depth: np.ndarray) -> float:
    """SILog with lambda 0.5: the root of mean(e^2) - 0.5 mean(e)^2. The loss of DepthVLM (paper, eq. 4)."""
    e = errors("log", prediction, depth)
    return math.sqrt(mean(e**2) - 0.5 * mean(e) ** 2)


def silog_std(prediction: np.ndarray, depth: np.ndarray) -> float:
    """SILog with lambda 1, as KITTI and UniDepth print it: 100 times the (population) standard deviation of e."""
    e = errors("log", prediction, depth)
    return 100 * math.sqrt(mean((e - mean(e)) ** 2))


METRICS = {
    "delta1": delta,
    "delta2": lambda prediction, depth: delta(prediction, depth, 2),
    "delta3": lambda prediction, depth: delta(prediction, depth, 3),
    "abs_rel": abs_rel,
    "sq_rel": sq_rel,
    "rmse": rmse,
    "rmse_log": rmse_log,
    "log10": log10,
    "silog_half": silog_half,
    "silog_std": silog_std,
}


def scores(prediction: np.ndarray, depth: np.ndarray) -> dict[str, float | int | None]:
    """All of `METRICS`, `points` and `answered` (counts). None for what has no finite value: no points, no answers."""
    prediction, depth = checked(prediction, depth)
    with np.errstate(over="ignore"):  # a reply in words may name 1e300 m, whose square is too large
        values = {name: metric(prediction, depth) for name, metric in METRICS.items()}
    values = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return values | {"points": len(depth), "answered": len(answered(prediction, depth)[0])}


TERMS = ("points", "answered", "delta1", "delta2", "delta3", *ERRORS)


def point_terms(prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(N, len(TERMS)): per point, what `from_sums` takes sums of; 0 for a point without an answer, but in `points`."""
    prediction, depth = checked(prediction, depth)
    kept = is_answer(prediction)
    p, d = prediction[kept], depth[kept]
    terms = np.zeros((len(depth), len(TERMS)))
    terms[:, 0] = 1
    with np.errstate(over="ignore"):
        rights = [is_right(p, d, power) for power in (1, 2, 3)]
        terms[kept, 1:] = np.column_stack([np.ones(len(d)), *rights, *(error(p, d) for error in ERRORS.values())])
    return terms


def from_sums(sums: np.ndarray) -> np.ndarray:
    """`METRICS` (..., len(METRICS)) of any sets of points, from their sums (..., len(TERMS)) of `point_terms`.

    NaN where a metric has no value. The same as `scores` but for rounding: one pass over the points serves all sets.
    """
    totals = dict(zip(TERMS, np.moveaxis(sums, -1, 0), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {name: totals[name] / totals["points"] for name in ("delta1", "delta2", "delta3")}
        means = {name: totals[name] / totals["answered"] for name in ERRORS}
        variance = np.maximum(means["squared_log"] - means["log"] ** 2, 0)
    values = shares | {
        "abs_rel": means["abs_rel"],
        "sq_rel": means["sq_rel"],
        "rmse": np.sqrt(means["squared"]),
        "rmse_log": np.sqrt(means["squared_log"]),
        "log10": means["log10"],
        "silog_half": np.sqrt(variance + 0.5 * means["log"] ** 2),
        "silog_std": 100 * np.sqrt(variance),
    }
    return np.stack([values[name] for name in METRICS], axis=-1)


def map_scores(
    prediction: np.ndarray, depth: np.ndarray, intrinsics: tuple[float, float, float, float], depth_type: str
) -> dict[str, float | int | None]:
    """
    All scores of a map (h, w) at its pixels with ground truth, of which there is 0 where there is none: `scores`,
    `boundary_f1` and `point_cloud_f_score`.

    intrinsics: fx, fy, cx, cy in px of the map. depth_type: "z" or "ray", of both maps.
    """
    prediction = prediction.astype(np.float64)
    labelled = depth > 0
    to_z = 1.0
    if depth_type == "ray":
        to_z = ray_per_z(*np.meshgrid(*map(np.arange, depth.shape[::-1])), intrinsics)
    of_maps = {
        "boundary_f1": boundary_f1(prediction, depth),
        "point_cloud_f_score": point_cloud_f_score(prediction / to_z, depth / to_z, intrinsics),
    }
    return scores(prediction[labelled], depth[labelled]) | of_maps


def boundary_f1(prediction: np.ndarray, depth: np.ndarray) -> float:
    """
    Boundary F1 of two maps (H, W), 0 = no depth in the ground truth; 0 to 1, higher is better (Depth Pro, Bochkovskii
    et al. 2024, section 3.3).

    From one pixel to its neighbour on the right, left, below and above there is a boundary if the depth grows by more
    than a factor t. At each t, precision and recall are means over the four directions (0 for a direction without any
    boundary), and F1 is made of the two means; the result is the mean of ten t from 1.05 to 1.25, weighted by t. No
    scale of the prediction changes it. Pairs of pixels without ground truth are left out; a pair without an answer
    is no predicted boundary. NaN where the ground truth has no boundary at any t (the definition says 0 there, which
    no prediction could better).
    """
    prediction, depth = checked_maps(prediction, depth)
    prediction = np.where(is_answer(prediction), prediction, np.nan)
    depth = np.where(depth > 0, depth, np.nan)

    def steps(values):
        right, down = values[:, 1:] / values[:, :-1], values[1:] / values[:-1]
        return right, 1 / right, down, 1 / down

    pairs = [(p[np.isfinite(d)], d[np.isfinite(d)]) for p, d in zip(steps(prediction), steps(depth), strict=True)]
    thresholds = np.linspace(1.05, 1.25, 10)
    if not any((d > thresholds[0]).any() for _, d in pairs):
        return math.nan
    values = []
    for threshold in thresholds:
        precision = recall = 0.0
        for p, d in pairs:
            predicted, real = p > threshold, d > threshold  # NaN is not above it
            both = np.count_nonzero(predicted & real)
            precision += both / max(np.count_nonzero(predicted), 1) / 4
            recall += both / max(np.count_nonzero(real), 1) / 4
        values.append(harmonic_mean(precision, recall))
    return float(np.average(values, weights=thresholds))


def point_cloud_f_score(
    prediction: np.ndarray,
    depth: np.ndarray,
    intrinsics: tuple[float, float, float, float],
    threshold: float = 0.05,
    relative: bool = True,
    max_points: int = 100_000,
) -> float:
    """
    F-score of the point clouds of two z-depth maps (H, W), 0 = no depth in the ground truth; NaN if it has none at all.

    intrinsics: fx, fy, cx, cy in px *of the map*, the first pixel's centre at (0, 0). Both clouds are made of the
    pixels with ground truth; of more than `max_points` of them, evenly spaced ones in row order.
    precision: share of these pixels whose predicted point has a true point nearer than the threshold (no answer: none);
    recall: share whose true point has a predicted point nearer than it. The threshold is in metres, or, if `relative`,
    a share of the true point's distance to the camera. The F-score is the harmonic mean of both
    (Knapitsch et al. 2017).
    """
    prediction, depth = checked_maps(prediction, depth)
    fx, fy, cx, cy = intrinsics
    v, u = np.nonzero(depth > 0)
    if not len(u):
        return math.nan
    if len(u) > max_points:
        chosen = np.linspace(0, len(u) - 1, max_points).astype(int)
        u, v = u[chosen], v[chosen]
    rays = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(len(u))], axis=1)
    true = rays * depth[v, u, None]
    kept = is_answer(prediction[v, u])
    predicted = rays[kept] * prediction[v, u, None][kept]
    if not len(predicted):
        return 0.0
    limit = threshold * np.linalg.norm(true, axis=1) if relative else np.full(len(true), threshold)
    distance, nearest = cKDTree(true).query(predicted)
    precision = np.count_nonzero(distance < limit[nearest]) / len(true)
    recall = np.count_nonzero(cKDTree(predicted).query(true)[0] < limit) / len(true)
    return harmonic_mean(precision, recall)


def checked(prediction: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, depth = np.asarray(prediction, np.float64), np.asarray(depth, np.float64)
    if prediction.shape != depth.shape or depth.ndim != 1:
        raise ValueError(f"prediction {prediction.shape} and depth {depth.shape} must be of one shape (N,)")
    if not is_answer(depth).all():
        raise ValueError(f"{(~is_answer(depth)).sum()} depths are not above 0; leave points without ground truth out")
    return prediction, depth


def checked_maps(prediction: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, depth = np.asarray(prediction, np.float64), np.asarray(depth, np.float64)
    if prediction.shape != depth.shape or depth.ndim != 2:
        raise ValueError(f"prediction {prediction.shape} and depth {depth.shape} must be maps of one size (H, W)")
    if not (np.isfinite(depth) & (depth >= 0)).all():
        raise ValueError("the ground truth has depths that are negative or not finite; mark them with 0")
    return prediction, depth


def answered(prediction: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, at the points whose prediction is finite and above 0."""
    kept = is_answer(prediction)
    return prediction[kept], depth[kept]


def is_answer(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (values > 0)


def errors(name: str, prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """One of `ERRORS` at each answered point."""
    return ERRORS[name](*answered(*checked(prediction, depth)))


def mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def harmonic_mean(precision: float, recall: float) -> float:
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
