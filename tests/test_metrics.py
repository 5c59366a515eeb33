"""bench/metrics.py against the formulas point by point, and against scenes whose scores are known."""

import json
import math

import numpy as np
import pytest

from bench import metrics

INTRINSICS = (70.0, 60.0, 39.5, 29.5)


def restated(prediction, depth) -> dict:
    """The definitions with loops and `math`, on answered points; delta over all."""
    pairs = [(float(p), float(d)) for p, d in zip(prediction, depth, strict=True) if math.isfinite(p) and p > 0]
    n, errors = len(pairs), [math.log(p / d) for p, d in pairs]
    mean = math.fsum(errors) / n
    mean_square = math.fsum(e * e for e in errors) / n
    squares = math.fsum((p - d) ** 2 for p, d in pairs)
    deltas = {f"delta{k}": sum(max(p / d, d / p) < 1.25**k for p, d in pairs) / len(depth) for k in (1, 2, 3)}
    return deltas | {
        "abs_rel": math.fsum(abs(p - d) / d for p, d in pairs) / n,
        "sq_rel": math.fsum((p - d) ** 2 / d for p, d in pairs) / n,
        "rmse": math.sqrt(squares / n),
        "rmse_log": math.sqrt(mean_square),
        "log10": math.fsum(abs(math.log(p / d, 10)) for p, d in pairs) / n,
        "silog_half": math.sqrt(mean_square - mean * mean / 2),
        "silog_std": 100 * math.sqrt(math.fsum((e - mean) ** 2 for e in errors) / n),
        "points": len(depth),
        "answered": n,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_are_the_definitions(dtype):
    noise = np.random.default_rng(0)
    depth = noise.uniform(0.3, 80, 500).astype(dtype)
    prediction = (depth * np.exp(noise.normal(0.1, 0.4, 500))).astype(dtype)
    prediction[:5] = np.nan, np.inf, -np.inf, 0, -1
    assert metrics.scores(prediction, depth) == pytest.approx(restated(prediction, depth), rel=1e-12)


def test_no_answer_is_wrong_and_without_error():
    scores = metrics.scores(np.array([1.0, np.nan, 0.0, -2.0]), np.ones(4))
    assert (scores["delta1"], scores["abs_rel"], scores["answered"]) == (0.25, 0.0, 1)


def test_delta_is_strict():
    assert metrics.delta(np.array([2.0, 1.6]), np.array([1.6, 2.0])) == 0  # 2 / 1.6 is 1.25 exactly
    assert metrics.delta(np.array([1.9999]), np.array([1.6])) == 1


@pytest.mark.parametrize("prediction", [np.array([]), np.array([np.nan, -1.0])])
def test_nothing_answered_is_json(prediction):
    scores = metrics.scores(prediction, np.ones(len(prediction)))
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert scores["rmse"] is None and scores["answered"] == 0


def test_too_large_to_square_is_json():
    scores = metrics.scores(np.array([1e300]), np.ones(1))
    assert scores["rmse"] is None and scores["delta1"] == 0 and scores["answered"] == 1


def test_silog_of_a_wrong_scale():
    depth = np.array([1.0, 2.0, 5.0])
    assert metrics.silog_std(2 * depth, depth) == pytest.approx(0, abs=1e-6)
    assert metrics.silog_half(2 * depth, depth) == pytest.approx(math.log(2) / math.sqrt(2))


@pytest.mark.parametrize("depth", [np.array([1.0, 0.0]), np.array([1.0, np.nan]), np.ones(3), np.ones((1, 2))])
def test_what_has_no_truth_is_refused(depth):
    with pytest.raises(ValueError, match="depths? "):
        metrics.scores(np.ones(2), depth)


def edge(column, near=1.0, far=3.0) -> np.ndarray:
    depth = np.full((60, 80), near)
    depth[:, column:] = far
    return depth


def test_boundary_f1_of_an_edge():
    depth = edge(40)
    # one direction of four has boundaries, and it is found wholly
    assert metrics.boundary_f1(depth, depth) == pytest.approx(0.25)
    assert metrics.boundary_f1(7 * depth, depth) == metrics.boundary_f1(depth, depth)
    assert metrics.boundary_f1(edge(41), depth) == 0
    assert metrics.boundary_f1(np.ones_like(depth), depth) == 0


def test_boundary_f1_at_some_thresholds():
    """A step of 10 % is found up to t = 1.1, by the truth's step of 100 % at every t."""
    thresholds = np.linspace(1.05, 1.25, 10)
    expected = 0.25 * thresholds[thresholds < 1.1].sum() / thresholds.sum()
    assert metrics.boundary_f1(edge(40, 1.0, 1.1), edge(40, 1.0, 2.0)) == pytest.approx(expected)


def test_boundary_f1_counts_false_boundaries():
    prediction = edge(40)
    prediction[:, 20:40] = 0.3  # edges at 20, downwards, and at 40
    # upwards: precision 1; downwards: a false one, and none to find. So P = 1/4, R = 1/4
    assert metrics.boundary_f1(prediction, edge(40)) == pytest.approx(0.25)
    prediction[:, 60:] = 30.0  # a second one upwards: its precision is 1/2
    assert metrics.boundary_f1(prediction, edge(40)) == pytest.approx(2 * 0.125 * 0.25 / 0.375)


def test_boundary_f1_leaves_out_what_has_no_truth():
    depth = edge(40)
    depth[:30] = 0
    prediction = edge(40)
    prediction[:30] = np.random.default_rng(0).uniform(1, 9, (30, 80))
    assert metrics.boundary_f1(prediction, depth) == pytest.approx(0.25)
    prediction[30:] = np.nan
    assert metrics.boundary_f1(prediction, depth) == 0
    assert math.isnan(metrics.boundary_f1(depth, np.ones_like(depth)))


def test_f_score_of_a_plane():
    depth = np.full((60, 80), 2.0)
    score = metrics.point_cloud_f_score
    assert score(depth, depth, INTRINSICS) == 1
    # 5 cm behind: the nearest point is 5 cm away or a little more, for rays diverge
    assert score(depth + 0.05, depth, INTRINSICS, 0.08, relative=False) == 1
    assert score(depth + 0.05, depth, INTRINSICS, 0.0499, relative=False) == 0
    # relative: 5 cm is 2.5 % of 2 m
    assert score(depth + 0.05, depth, INTRINSICS, 0.03) == 1
    assert score(depth + 0.05, depth, INTRINSICS, 0.01) == 0


def test_f_score_of_half_a_plane():
    """Half of the pixels right, half far off: precision and recall are 1/2 but for neighbours at the border."""
    depth = np.full((60, 80), 2.0)
    prediction = depth.copy()
    prediction[:, 40:] = 9.0
    assert metrics.point_cloud_f_score(prediction, depth, INTRINSICS, 0.001) == pytest.approx(0.5)
    prediction[:, 40:] = np.nan  # no answer, no precision either
    assert metrics.point_cloud_f_score(prediction, depth, INTRINSICS, 0.001) == pytest.approx(0.5)


def test_f_score_by_brute_force():
    noise = np.random.default_rng(0)
    depth = noise.uniform(2, 3, (12, 16))
    depth[noise.random((12, 16)) < 0.3] = 0
    prediction = depth * np.exp(noise.normal(0, 0.05, depth.shape))
    fx, fy, cx, cy = INTRINSICS
    pixels = [(v, u) for v in range(12) for u in range(16) if depth[v, u] > 0]
    true, predicted = (
        [((u - cx) / fx * z[v, u], (v - cy) / fy * z[v, u], z[v, u]) for v, u in pixels] for z in (depth, prediction)
    )
    precision = sum(min(math.dist(p, q) for q in true) < 0.04 for p in predicted) / len(pixels)
    recall = sum(min(math.dist(p, q) for p in predicted) < 0.04 for q in true) / len(pixels)
    found = metrics.point_cloud_f_score(prediction, depth, INTRINSICS, 0.04, relative=False)
    assert 0.2 < found < 0.98
    assert found == pytest.approx(2 * precision * recall / (precision + recall))


def test_f_score_of_few_points_and_of_none():
    depth = np.full((60, 80), 2.0)
    score = metrics.point_cloud_f_score
    assert score(depth, depth, INTRINSICS, max_points=100) == 1
    assert score(depth, depth, INTRINSICS, max_points=100) == score(depth, depth, INTRINSICS, max_points=100)
    assert score(np.zeros_like(depth), depth, INTRINSICS) == 0
    assert math.isnan(score(depth, np.zeros_like(depth), INTRINSICS))
