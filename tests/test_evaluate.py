"""`python -m bench evaluate` on small hand-made benchmarks, against plain loops and known answers."""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.ndimage
import torch
from bench_fixtures_toy import Toy, bomb, write_toy
from PIL import Image

from bench import build, evaluate, geometry, manifest, metrics, released, sampling, scoring, sources
from bench.__main__ import main
from bench.contestants._base import Answer, Contestant, Query
from bench.contestants.constant import Constant
from bench.contestants.depthvlm import DepthVLM
from bench.depthvlm_bench import FEATURES
from bench.evaluate import CHUNK, Run
from bench.rows import contents_of, open_sources

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
FX, FY, CX, CY = 40.0, 44.0, 30.0, 22.0


def make_row(source: str, index: int, points: int, depth_type="z", size=(64, 48), depth_size=(32, 24)) -> dict:
    rng = np.random.default_rng([index, len(source)])
    words = rng.integers(500, 8000, depth_size[::-1]).astype(np.uint16)
    words[rng.random(words.shape) < 0.2] = 0
    u, v = rng.uniform(-0.5, size[0] - 0.501, points), rng.uniform(-0.5, size[1] - 0.501, points)
    return {
        "id": f"row-{index:03d}",
        "source": source,
        "split": "test",
        "scene": "",
        "camera": "",
        "image": Image.fromarray(rng.integers(0, 255, (*size[::-1], 3)).astype(np.uint8)),
        "depth": Image.fromarray(words),
        "depth_scale": 1000.0,
        "depth_type": depth_type,
        **{"fx": FX, "fy": FY, "cx": CX, "cy": CY},
        "points_u": u,
        "points_v": v,
        "points_depth": rng.uniform(1.2, 3.5, points),
        "qa": {"kind": [], "question": [], "answer": []},
    }


def write_bench(folder: Path, **sources: list[dict]) -> Path:
    configs = ""
    for name, rows in sources.items():
        (folder / name).mkdir(parents=True)
        datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / name / "test-00000.parquet")
        configs += f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """Two sources of 37 and 20 images with 1 to 5 points each."""
    alpha, beta = ([make_row(name, i, 1 + i % 5) for i in range(n)] for name, n in (("alpha", 37), ("beta", 20)))
    return write_bench(tmp_path_factory.mktemp("bench"), alpha=alpha, beta=beta)


class Unloaded(Contestant):
    def __init__(self):
        pass


class Columns(Unloaded):
    """Says the number of the pixel's column + 1: where a value was read can be told from it."""

    title, dense = "Columns", True

    def maps(self, queries):
        return [np.broadcast_to(np.arange(1.0, q.image.size[0] + 1), q.image.size[::-1]) for q in queries]


def run(contestant, bench, out, batch_size=4, **fields) -> dict:
    sources = tuple(open_sources(str(bench), None))
    return evaluate.evaluate(Run("test:it", str(bench), sources, **fields), contestant, Path(out), batch_size)


def predictions(out: Path) -> pandas.DataFrame:
    return pandas.read_parquet(out / "predictions.parquet")


def saved_maps(out: Path, source: str) -> dict[str, np.ndarray]:
    """As bench/README.md tells to read them."""
    rows = datasets.load_dataset("parquet", data_files=str(out / "maps" / f"{source}.parquet"), split="train")
    return {row["id"]: np.frombuffer(row["depth"], "<f2").reshape(row["height"], row["width"]) for row in rows}


def all_rows(bench: Path, source: str) -> list[dict]:
    return list(datasets.load_dataset(str(bench), source, split="test"))


# Scores


def test_constant_scores_as_a_plain_loop_does(bench, tmp_path):
    summary = run(Constant("2.0"), bench, tmp_path)
    for source in ("alpha", "beta"):
        truth = [depth for row in all_rows(bench, source) for depth in row["points_depth"]]
        right = sum(max(2 / depth, depth / 2) < 1.25 for depth in truth)
        error = sum(abs(2 - depth) / depth for depth in truth)
        scored = summary["sources"][source]
        assert scored["points"] == len(truth) and scored["counts"] == {"ok": len(truth)}
        assert scored["metrics"]["delta1"] == right / len(truth)
        assert scored["metrics"]["abs_rel"] == pytest.approx(error / len(truth), rel=1e-12)
    both = [summary["sources"][source]["metrics"]["delta1"] for source in ("alpha", "beta")]
    assert summary["mean"]["delta1"] == pytest.approx(sum(both) / 2, rel=1e-12)  # unweighted: 37 and 20 images


def evaluate_two_metres(name: str, folder: Path) -> None:
    """Import real frames, and write FOLDER/out by the commands of bench/README.md."""
    data = SHARED / name
    if not data.exists():
        pytest.skip(f"../shared/data/{name} is not there")
    folders = ["--images", str(data), "--source", name, "--out", str(folder / "data")]
    if name == "scannetpp":
        folders[1:2] = [str(data / "rgb"), "--depths", str(data / "depth")]
    assert main(["import", str(data / "annotations.jsonl"), *folders]) == 0
    command = ["evaluate", "--model", "constant:2.0", "--data", str(folder / "data"), "--out", str(folder / "out")]
    assert main(command) == 0


@pytest.mark.parametrize(("name", "delta1", "points"), [("ibims1", 0.2648, 5000), ("scannetpp", 0.2850, 200)])
def test_two_metres_everywhere_on_real_frames(tmp_path, name, delta1, points):
    evaluate_two_metres(name, tmp_path)
    scored = json.loads((tmp_path / "out" / "summary.json").read_text())["sources"][name]
    assert scored["points"] == points
    assert scored["metrics"]["delta1"] == pytest.approx(delta1, abs=1e-12)


def test_a_point_is_read_between_the_pixels_around_it(bench, tmp_path):
    run(Columns(), bench, tmp_path)
    found = predictions(tmp_path)
    # the first pixel's centre is at 0; left of it, and right of the last one's at 63, there is nothing to look between
    expected = [1 + min(max(u, 0), 63) for u in found.u]
    assert found.prediction.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_point_beside_a_hole_is_read_in_its_pixel(bench, tmp_path):
    """Holes in every third column: no point has four pixels around it, or it lies on a row of whole ones."""

    class Holes(Columns):
        def maps(self, queries):
            maps = [depth.copy() for depth in super().maps(queries)]
            for depth in maps:
                depth[:, 1::3] = math.nan
                depth[:, 2::3] = -1
            return maps

    run(Holes(), bench, tmp_path)
    found = predictions(tmp_path)
    columns = np.floor(found.u + 0.5)
    assert found.prediction[columns % 3 == 0].tolist() == (1 + columns[columns % 3 == 0]).tolist()
    assert (found.status[columns % 3 > 0] == "invalid").all()


def test_maps_are_read_as_torch_reads_them():
    depth = hilly((64, 48), 0.5, 80, 0)
    u, v = np.random.default_rng(1).uniform([[-0.5], [-0.5]], [[63.5], [47.5]], (2, 1000))
    places = torch.tensor(np.stack([(2 * u + 1) / 64 - 1, (2 * v + 1) / 48 - 1], -1))[None, None]
    torchs = torch.nn.functional.grid_sample(
        torch.tensor(depth, dtype=torch.float64)[None, None], places, padding_mode="border", align_corners=False
    )
    assert geometry.read_map(depth, u, v) == pytest.approx(torchs[0, 0, 0].numpy(), rel=1e-9)
    constant = np.full((48, 64), 1.6, np.float32)
    assert set(geometry.read_map(constant, u, v)) == {float(np.float32(1.6))}  # 2.0 m stays 2.0 m to the last digit


class Slope(Unloaded):
    """The z-depth of a slanted plane at every pixel of the image: it is right everywhere."""

    title, dense = "Slope", True

    @staticmethod
    def depth(u, v):
        return 1 / (0.9 + 0.006 * u - 0.004 * v)

    def maps(self, queries):
        return [self.depth(*np.meshgrid(*map(np.arange, query.image.size))) for query in queries]


@pytest.mark.parametrize("mode", ["points", "dense"])
@pytest.mark.parametrize("depth_size", [(32, 24), (16, 12), (20, 15), (64, 48), (128, 96)])
def test_a_plane_is_read_without_bias_whatever_the_depth_maps_size(tmp_path, mode, depth_size):
    """As `build` and `import` write points: the centres of the depth map's pixels, and what these hold."""
    row = make_row("alpha", 0, 0, depth_size=depth_size)
    u, v = np.meshgrid(*((np.arange(n) + 0.5) * full / n - 0.5 for n, full in zip(depth_size, (64, 48), strict=True)))
    within = (u >= 0) & (v >= 0) & (u <= 63) & (v <= 47)  # between centres
    words = np.where(within, np.rint(Slope.depth(u, v) * 20_000), 0).astype(np.uint16)
    row |= {"depth": Image.fromarray(words), "depth_scale": 20_000.0}
    drawn = sampling.draw_points(words, 20_000.0, (64, 48), 10**6, "a")
    row |= dict(zip(("points_u", "points_v", "points_depth"), drawn, strict=True))
    bench = write_bench(tmp_path / "bench", alpha=[row])
    summary = run(Slope(), bench, tmp_path / "out", mode=mode)
    if mode == "points":
        found = predictions(tmp_path / "out")
        prediction, truth = found.prediction.to_numpy(), found["gt"].to_numpy()
    else:
        prediction, truth = saved_maps(tmp_path / "out", "alpha")["row-000"][words > 0], words[words > 0] / 20_000
    bias = np.mean(prediction / truth - 1)
    assert abs(bias) < (2e-5 if mode == "points" else 1e-4), bias  # maps are kept in float16
    assert summary["mean"]["abs_rel"] < (5e-5 if mode == "points" else 3e-4)


def test_points_of_annotations_are_read_without_bias(tmp_path):
    """`import`, with a depth map of half the image's size."""
    columns, rows = (axis.ravel().tolist() for axis in np.meshgrid(np.arange(32), np.arange(24)))
    metres = Slope.depth(2 * np.array(columns) + 0.5, 2 * np.array(rows) + 0.5)
    words = np.rint(metres.reshape(24, 32) * 1000).astype(np.uint16)
    Image.fromarray(words).save(tmp_path / "depth.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    record = {"image": "image.png", "depth_path": "depth.png", "depth_scale": 1000, "original_rgb_size": [64, 48]}
    record |= {"original_depth_size": [32, 24], "original_fx": 40.0, "canonical_size": [1600, 1200]}
    record |= {"pixel_coords": list(zip(columns, rows, strict=True)), "depth": (words.ravel() / 1000).tolist()}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(record))
    folders = ["--images", str(tmp_path), "--depths", str(tmp_path), "--source", "scannetpp"]
    assert main(["import", str(tmp_path / "annotations.jsonl"), *folders, "--out", str(tmp_path / "data")]) == 0
    run(Slope(), tmp_path / "data", tmp_path / "out")
    found = predictions(tmp_path / "out")
    bias = np.mean(found.prediction / found["gt"] - 1)  # what is left: millimetres, and the slope's curvature
    assert len(found) == 32 * 24 and abs(bias) < 5e-5, bias


def test_predictions_keep_every_point_in_order(bench, tmp_path):
    run(Columns(), bench, tmp_path)
    found = predictions(tmp_path)
    rows = all_rows(bench, "alpha") + all_rows(bench, "beta")
    assert found["id"].tolist() == [row["id"] for row in rows for _ in row["points_u"]]
    assert found["gt"].tolist() == [depth for row in rows for depth in row["points_depth"]]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_prediction_is_wrong_and_counted(bench, tmp_path, bad):
    class Half(Constant):
        def maps(self, queries):
            maps = super().maps(queries)
            for depth in maps:
                depth[:, :32] = bad
            return maps

    summary = run(Half("2.0"), bench, tmp_path)
    found = predictions(tmp_path)
    left = (found.u < 31.5) & (found.source == "alpha")
    scored, count = summary["sources"]["alpha"], int((found.source == "alpha").sum())
    assert scored["counts"] == {"invalid": int(left.sum()), "ok": count - int(left.sum())}
    truth = found["gt"][(found.source == "alpha") & ~left]
    assert scored["metrics"]["delta1"] == sum(max(2 / depth, depth / 2) < 1.25 for depth in truth) / count
    assert found.prediction[left].isna().all()


def test_answers_of_a_contestant_without_maps_keep_status_and_words(bench, tmp_path):
    class Speaker(Unloaded):
        title, dense = "Speaker", False

        def answers(self, queries):
            kinds = (Answer(2.0, "ok", "2 m"), Answer(math.nan, "refused", "No."), Answer(-3.0, "ok", "-3"))
            return [[kinds[n % 3] for n in range(len(query.points))] for query in queries]

    summary = run(Speaker(), bench, tmp_path)
    found = predictions(tmp_path)
    counts = summary["sources"]["alpha"]["counts"]
    numbers = [n % 3 for row in all_rows(bench, "alpha") for n in range(len(row["points_u"]))]
    assert counts == {"ok": numbers.count(0), "refused": numbers.count(1), "invalid": numbers.count(2)}
    assert found.text[1] == "No." or found.text[0] == "2 m"
    assert set(found.text) == {"2 m", "No.", "-3"}


def test_ray_distance_is_converted_with_the_intrinsics(tmp_path):
    """A wall at z = 2 m: a contestant that says the distance to the camera is right to the digit, another is not."""
    row = make_row("alpha", 0, 40)
    row["points_u"], row["points_v"] = np.round(row["points_u"]), np.round(row["points_v"])
    row["points_depth"] = np.full(40, 2.0)
    bench = write_bench(tmp_path / "bench", alpha=[row])

    class Ray(Unloaded):
        title, dense, quantity = "Ray", True, "ray"

        def maps(self, queries):
            v, u = np.mgrid[:48, :64]
            return [2.0 * np.sqrt(1 + ((u - CX) / FX) ** 2 + ((v - CY) / FY) ** 2)]

    assert run(Ray(), bench, tmp_path / "ray")["mean"]["abs_rel"] < 1e-12
    Ray.quantity = "z"
    assert run(Ray(), bench, tmp_path / "z")["mean"]["abs_rel"] > 0.05


def test_z_is_scored_as_ray_distance_where_the_rows_hold_it(tmp_path):
    row = make_row("alpha", 0, 40, depth_type="ray")
    u, v = (np.asarray(row[name], np.float32).astype(float) for name in ("points_u", "points_v"))
    row["points_depth"] = 2 * np.sqrt(1 + ((u - CX) / FX) ** 2 + ((v - CY) / FY) ** 2)
    bench = write_bench(tmp_path / "bench", alpha=[row])
    assert run(Constant("2.0"), bench, tmp_path / "ray")["mean"]["abs_rel"] < 1e-6


# Dense mode


def test_dense_scores_are_taken_on_the_depth_maps_grid(bench, tmp_path):
    summary = run(Columns(), bench, tmp_path, mode="dense")
    errors = []
    for row in all_rows(bench, "beta"):
        words = np.asarray(row["depth"])
        values = []
        for y, x in np.argwhere(words > 0):
            centre = (x + 0.5) * 64 / 32 - 0.5  # of a depth pixel, two image pixels wide
            values.append(abs(centre + 1 - words[y, x] / 1000) / (words[y, x] / 1000))
        errors.append(sum(values) / len(values))
    scored = summary["sources"]["beta"]
    assert scored["metrics"]["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-9)
    assert len(pandas.read_parquet(tmp_path / "images.parquet")) == 57


def test_point_clouds_of_ray_distances_are_those_of_z(tmp_path):
    """The same scene and the same contestant, once as z and once as distances from the camera."""
    scores = {}
    for kind in ("z", "ray"):
        row = make_row("alpha", 0, 4, kind, depth_size=(64, 48))
        u, v = np.meshgrid(np.arange(64), np.arange(48))
        factor = np.sqrt(1 + ((u - CX) / FX) ** 2 + ((v - CY) / FY) ** 2) if kind == "ray" else 1.0
        row["depth"] = Image.fromarray(np.round((1.9 + u / 100) * factor * 8000).astype(np.uint16))
        row["depth_scale"] = 8000.0
        bench = write_bench(tmp_path / kind, alpha=[row])
        scores[kind] = run(Constant("2.0"), bench, tmp_path / f"out-{kind}", mode="dense")["mean"][
            "point_cloud_f_score"
        ]
    assert 0.2 < scores["z"] < 0.95 and scores["ray"] == pytest.approx(scores["z"], abs=0.01)


# As released


class Ramp(Unloaded):
    """Another depth at every pixel, growing to the right and downwards."""

    title, dense = "Ramp", True

    def maps(self, queries):
        return [1 + np.add.outer(np.arange(q.image.size[1]) / 50, np.arange(q.image.size[0]) / 40) for q in queries]


def test_as_released_reads_canonical_coordinates_on_another_grid(tmp_path):
    rows = [make_row("alpha", i, 5, size=(66, 48)) | {"fx": 105.94} for i in range(20)]
    bench = write_bench(tmp_path / "bench", alpha=rows)
    summary = run(Ramp(), bench, tmp_path, as_released=True)
    found = predictions(tmp_path)
    # 66x48 px at fx 105.94 -> 623x453 canonical px -> 22x16 times 28 = 616x448 -> 19x14 times 32 = 608x448 px
    ramp = Ramp().maps([Query("", rows[0]["image"], (106, 106, 0, 0), np.zeros((0, 2)))])[0].astype(np.float32)
    grid = torch.nn.functional.interpolate(torch.tensor(ramp)[None, None], size=(448, 608), mode="bilinear")[0, 0]
    outside = 0
    for u, v, prediction in zip(found.u, found.v, found.prediction, strict=True):
        column, row = round(u * 623 / 66), round(v * 453 / 48)
        beyond = column >= 608 or row >= 448
        assert math.isnan(prediction) == beyond
        outside += beyond
        if not beyond and min(column, row) >= 0:  # below 0 it wraps, as there
            assert prediction == pytest.approx(float(grid[row, column]), abs=1e-4)
    assert outside
    means = []
    for _, own in found.groupby("id"):
        kept = own[own.prediction > 0]
        right = [max(p / d, d / p) < 1.25 for p, d in zip(kept.prediction, kept["gt"], strict=True)]
        means.append(sum(right) / len(right) if right else 0.0)
    assert summary["sources"]["alpha"]["metrics"] == {"delta1": pytest.approx(np.mean(means), rel=1e-12)}


def test_rows_as_released_and_corrected_ones_are_not_mistaken_for_each_other(tmp_path):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", 0, 3)])
    for made, remedy in ((True, "add --as-released"), (False, "leave --as-released out")):
        (bench / "alpha" / "test.json").write_text(json.dumps({"parameters": {"as_released": made}}))
        with pytest.raises(ValueError, match=remedy):
            run(Columns(), bench, tmp_path / "out", as_released=not made)
        run(Columns(), bench, tmp_path / f"out-{made}", as_released=made)


# (W, H) of the image, of the depth map, and fx
RELEASED_SETS = {
    "ibims1": ((640, 480), (640, 480), 559.62),
    "nuscenes": ((1600, 900), (1600, 900), 1266.42),
    "nyuv2": ((561, 427), (561, 427), 518.86),
    "scannetpp": ((1920, 1440), (256, 192), 1430.94),
    "ddad": ((1936, 1216), (1936, 1216), 2181.54),
}


def hilly(size: tuple[int, int], low: float, high: float, seed) -> np.ndarray:
    """Another depth at every pixel, (H, W) float32."""
    return np.random.default_rng(seed).uniform(low, high, size[::-1]).astype(np.float32)


class Hilly(Unloaded):
    title, dense = "Hilly", True

    def maps(self, queries):
        return [hilly(query.image.size, 1.5, 4.0, query.image.size) for query in queries]


@pytest.mark.parametrize("source", RELEASED_SETS)
def test_as_released_is_the_released_scorer_restated(source, tmp_path):
    """`import --as-released` and `evaluate --as-released` against the rules with OpenCV, on maps with holes."""
    (width, height), depth_size, focal = RELEASED_SETS[source]
    low, high = sources.get(source).depth_range
    scale = {"scannetpp": 1000.0, "nyuv2": 8000.0, "ibims1": 65535 / 50}.get(source, 256.0)
    canonical = [round(side * 1000 / focal) for side in (width, height)]
    lines, means = [], []
    for folder in ("images", "depths"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        random = np.random.default_rng([number, width])
        words = np.rint(hilly(depth_size, 1.5, 4.0, [number, 7]) * scale).astype(np.uint16)
        words[random.random(words.shape) < 0.4] = 0
        words[random.random(words.shape) < 0.1] = np.uint16(min(65535, 1.5 * high * scale))  # too far
        depth = words.astype(np.float32) / np.float32(scale)
        depth[(depth < low) | (depth > high)] = 0
        rows, columns = np.nonzero(depth)
        picked = random.choice(len(rows), 200, replace=False)
        points = np.column_stack([columns, rows])[picked].tolist()
        metres = [round(float(depth[row, column]), 4) for column, row in points]
        Image.new("RGB", (width, height)).save(tmp_path / "images" / f"{number}.png", compress_level=1)
        Image.fromarray(words).save(tmp_path / "depths" / f"{number}.png", compress_level=1)
        names = {"image": f"{number}.png", "depth_path": f"{number}.png", "depth_type": "z_depth"}
        sizes = {"original_rgb_size": [width, height], "original_depth_size": depth_size, "canonical_size": canonical}
        numbers = {"original_fx": focal, "depth_scale": scale, "pixel_coords": points, "depth": metres}
        lines.append(json.dumps(names | sizes | numbers))

        # the released rules
        stretched = cv2.resize(depth, canonical, interpolation=cv2.INTER_NEAREST)
        grid = [max(1, round(max(28, round(side / 28) * 28) / 32)) * 32 for side in canonical]
        predicted = Image.fromarray(hilly((width, height), 1.5, 4.0, (width, height)))
        predicted = np.asarray(predicted.resize(grid, Image.Resampling.BILINEAR))
        right = []
        for (x, y), fallback in zip(points, metres, strict=True):
            column, row = round(x * (canonical[0] / width)), round(y * (canonical[1] / height))
            if column >= canonical[0] or row >= canonical[1] or column >= grid[0] or row >= grid[1]:
                continue
            gt, p = float(stretched[row, column]) or fallback, float(predicted[row, column])
            right.append(max(p / gt, gt / p) < 1.25)
        means.append(sum(right) / len(right))

    (tmp_path / "annotations.jsonl").write_text("\n".join(lines))
    folders = ["--images", str(tmp_path / "images"), "--depths", str(tmp_path / "depths"), "--source", source]
    command = ["import", str(tmp_path / "annotations.jsonl"), *folders, "--out", str(tmp_path / "data")]
    assert main([*command, "--as-released", "--strict"]) == 0
    summary = run(Hilly(), tmp_path / "data", tmp_path / "out", as_released=True)
    assert summary["sources"][source]["images"] == 3
    assert summary["sources"][source]["metrics"] == {"delta1": np.mean(means)}
    assert 0.2 < np.mean(means) < 0.8


def test_released_grid_has_the_sizes_found_in_the_released_code():
    """Facts: width x height of the stored image and fx -> the grid that the released scorer indexes."""
    cases = {  # canonical size -> grid
        (1341, 1006): (1344, 1024),
        (1081, 823): (1088, 800),
        (1379, 1001): (1376, 1024),
        (934, 623): (928, 608),
        (888, 558): (896, 576),
        (1263, 711): (1248, 704),
        (1144, 858): (1152, 864),
        (1819, 1212): (1824, 1216),
    }
    for (width, height), expected in cases.items():
        assert released.grid(np.ones((height, width)), 1000.0).shape == expected[::-1]


# Processes, interruptions, limits


def test_three_processes_give_the_summary_of_one(bench, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "bench", "evaluate", "--model", "constant:2.0", "--data", str(bench), "--out"]
    # accelerate's own launcher starts a single process on CPUs, whatever it is told
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    done = subprocess.run(
        [*launch, *command, str(tmp_path / "three")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean: ") == 1, "three processes that know nothing of each other"
    assert main(["evaluate", *command[3:], str(tmp_path / "one")]) == 0
    for name in ("summary.json", "run.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    pandas.testing.assert_frame_equal(predictions(tmp_path / "three"), predictions(tmp_path / "one"))


KILLED = """
import os, signal, sys
from bench.contestants.constant import Constant
from test_evaluate import run

class Dies(Constant):
    calls = 0

    def maps(self, queries):
        self.calls += 1
        if self.calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().maps(queries)

run(Dies("2.0"), *sys.argv[1:])
"""


UNEQUAL = """
import json, sys, time
from pathlib import Path
from bench import evaluate
from bench.contestants.constant import Constant
from test_evaluate import run

index = evaluate.processes().process_index

class Counts(Constant):
    asked = []

    def maps(self, queries):
        time.sleep(0.02 if index else 1.0)
        self.asked.extend(query.id for query in queries)
        return super().maps(queries)

for number in range(2):
    run(Counts("2.0"), sys.argv[1], f"{sys.argv[2]}/{number}", batch_size=8)
Path(sys.argv[2], f"{index}.json").write_text(json.dumps(Counts.asked))
"""


def test_processes_share_the_images_exactly_and_a_slow_one_holds_nobody_back(tmp_path):
    """Two runs one after the other, of 12 chunks each; the main process takes 50 times as long as the others."""
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", number, 1) for number in range(12 * CHUNK)])
    (tmp_path / "script.py").write_text(UNEQUAL)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [*launch, str(tmp_path / "script.py"), str(bench), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    slow, *others = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(3))
    assert Counter([*slow, *itertools.chain(*others)]) == Counter(dict.fromkeys(set(slow).union(*others), 2))
    assert len(set(slow).union(*others)) == 12 * CHUNK
    assert len(slow) <= 2 * 3 * CHUNK, "of 12 chunks a third is 4: the slow process took its share all the same"


def test_what_failed_is_asked_again(bench, tmp_path):
    class Server(Unloaded):
        title, dense, up, asked = "Server", False, False, 0

        def answers(self, queries):
            self.asked += len(queries)
            answer = Answer(2.0) if self.up else Answer(math.nan, "failed", "no connection")
            return [[answer] * len(query.points) for query in queries]

    server = Server()
    assert run(server, bench, tmp_path)["sources"]["beta"]["counts"] == {"failed": 60}
    server.up = True
    assert run(server, bench, tmp_path)["sources"]["beta"]["counts"] == {"ok": 60}
    assert server.asked == 2 * 57
    run(server, bench, tmp_path)
    assert server.asked == 2 * 57


def test_a_checkpoint_or_data_that_has_changed_is_not_taken_for_the_old(tmp_path):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", 0, 3)])
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.parent.mkdir()

    def score(contestant):
        asked = Run(f"depthvlm:{weights.parent}", str(bench), ("alpha",))
        return evaluate.evaluate(asked, contestant, tmp_path / "out")

    weights.write_bytes(b"one")
    score(Constant("2.0"))
    score(Constant("2.0"))
    weights.write_bytes(b"two")
    with pytest.raises(ValueError, match="holds another run .checkpoint '.*choose another --out"):
        score(Constant("2.0"))
    weights.write_bytes(b"one")
    shutil.rmtree(bench)
    write_bench(bench, alpha=[make_row("alpha", 1, 3)])
    with pytest.raises(ValueError, match="holds another run .content {'alpha': "):
        score(Constant("2.0"))
    contestant = Constant("2.0")
    contestant.served_at = "http://127.0.0.1:1/v1"
    with pytest.raises(ValueError, match="served_at ''.*now .*127.0.0.1:1"):
        score(contestant)


def test_a_run_without_a_result_does_not_stand_in_the_way(bench, tmp_path):
    class Fails(Constant):
        def maps(self, queries):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(Fails("2.0"), bench, tmp_path, dtype="float32")
    run(Constant("2.0"), bench, tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="holds another run .dtype 'bfloat16'"):
        run(Constant("2.0"), bench, tmp_path, dtype="float32")


def test_files_that_make_no_answers_may_change(bench, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    asked = Run(f"depthvlm:{folder}", str(bench), ("beta",))
    evaluate.evaluate(asked, Constant("2.0"), tmp_path / "out")
    (folder / "retention.json").write_text("{}")
    evaluate.evaluate(asked, Constant("2.0"), tmp_path / "out")
    (folder / "chat_template.jinja").write_text("")
    with pytest.raises(ValueError, match="holds another run .checkpoint '"):
        evaluate.evaluate(asked, Constant("2.0"), tmp_path / "out")


def test_a_checkpoint_named_by_a_dot_has_a_folder_of_its_own(bench, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(evaluate, "find_contestant", lambda model: ("constant", "2.0"))
    monkeypatch.setattr(evaluate, "identity_of", lambda *args: {})
    assert main(["evaluate", "--model", ".", "--data", str(bench)]) == 0
    assert Path("results/mine/summary.json").is_file()


def test_max_points_is_refused_for_whole_maps(bench, tmp_path):
    with pytest.raises(ValueError, match="--max-points 10 is of points, and --mode dense scores whole maps"):
        run(Constant("2.0"), bench, tmp_path, mode="dense", max_points=10)


def test_images_without_a_point_to_score_are_not_looked_at(bench, tmp_path):
    class Counts(Constant):
        calls = 0

        def maps(self, queries):
            self.calls += len(queries)
            return super().maps(queries)

    contestant = Counts("2.0")
    summary = run(contestant, bench, tmp_path / "ten", max_points=10)
    images = sum(source["images"] for source in summary["sources"].values())
    assert contestant.calls == images == predictions(tmp_path / "ten")["id"].count() == 10
    with pytest.raises(ValueError, match="--max-points 1 leaves no point of alpha; raise it or leave alpha out"):
        run(contestant, bench, tmp_path / "one", max_points=1)


def test_a_killed_run_goes_on_to_the_same_files(bench, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", KILLED, str(bench), str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "parts").iterdir()}
    assert parts and not (tmp_path / "killed" / "summary.json").exists()
    run(Constant("2.0"), bench, tmp_path / "killed")
    run(Constant("2.0"), bench, tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == time for file, time in parts.items())
    assert (tmp_path / "killed/summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()
    pandas.testing.assert_frame_equal(predictions(tmp_path / "killed"), predictions(tmp_path / "whole"))


def test_max_points_spreads_over_everything(bench, tmp_path):
    summary = run(Constant("2.0"), bench, tmp_path, max_points=30)
    counts = [own["points"] for own in summary["sources"].values()]
    whole = [sum(len(row["points_u"]) for row in all_rows(bench, name)) for name in ("alpha", "beta")]
    assert sum(counts) == 30
    assert counts[0] == pytest.approx(30 * whole[0] / sum(whole), abs=1)


def test_a_contestant_that_depends_on_its_batch_runs_alone(bench, tmp_path):
    class Alone(Constant):
        batch_safe = False

        def maps(self, queries):
            assert len(queries) == 1
            return super().maps(queries)

    run(Alone("2.0"), bench, tmp_path)


# DepthVLM


def test_depthvlm_scores_what_its_processor_and_model_say(bench, tmp_path):
    contestant = DepthVLM(str(ROOT))
    run(contestant, bench, tmp_path, batch_size=3)
    row = all_rows(bench, "beta")[7]
    inputs = contestant.processor(images=[row["image"]], focal_lengths=[FX], return_tensors="pt")
    with torch.inference_mode():
        outputs = contestant.model(**inputs)
    depth = contestant.processor.post_process_depth_estimation(outputs)[0]["predicted_depth"].numpy()
    found = predictions(tmp_path)
    found = found[(found.source == "beta") & (found["id"] == row["id"])]
    expected = scipy.ndimage.map_coordinates(depth.astype(np.float64), [found.v, found.u], order=1, mode="nearest")
    assert found.prediction.to_numpy() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "depthvlm"}, "depthvlm"),
        ({"model_type": "qwen3_vl", "depth_head_type": "dpt"}, "depthvlm"),  # as the published checkpoint has it
        ({"model_type": "zoedepth"}, "zoedepth"),
    ],
)
def test_a_checkpoint_says_which_contestant_it_is(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert evaluate.find_contestant(str(tmp_path)) == (expected, str(tmp_path))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "constant:0"], "constant:0 is no depth"),
        (["--model", "constant:"], "names no checkpoint"),
        (["--model", "constant:2", "--sources", "alpha", "gamma"], "has no source gamma; it has alpha, beta"),
        (["--model", "constant:2", "--mode", "dense", "--as-released"], "with --mode points"),
    ],
)
def test_refusals_are_a_sentence(bench, tmp_path, capsys, arguments, said):
    assert main(["evaluate", "--data", str(bench), "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_metric_depth_is_refused(tmp_path, bench, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert main(["evaluate", "--model", str(tmp_path), "--data", str(bench)]) == 2
    assert "is a 'bert' model, which no contestant takes by itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["spatialrgpt", "cambrian_s", "youtu_vl", "spacellava"])
def test_a_model_of_another_environment_is_sent_to_an_endpoint(bench, capsys, name):
    assert main(["evaluate", "--model", f"{name}:checkpoint", "--data", str(bench)]) == 2
    assert "is served there and passed as openai:MODEL, see the table of bench/README.md" in capsys.readouterr().err


def test_options_are_of_the_contestant_that_is_named(bench, capsys):
    command = ["evaluate", "--data", str(bench), "--price", "2", "10", "--model"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "constant:2"])
    assert "unrecognized arguments: --price 2 10" in capsys.readouterr().err
    for model, listed in (("openai:some", True), ("constant:2", False)):
        with pytest.raises(SystemExit, match="0"):
            main([*command, model, "--help"])
        assert ("--requests-per-minute" in capsys.readouterr().out) is listed


def test_no_benchmark_is_refused(tmp_path, capsys):
    assert main(["evaluate", "--model", "constant:2", "--data", str(tmp_path)]) == 2
    assert "is no built benchmark" in capsys.readouterr().err


def test_results_of_another_run_are_not_mixed(bench, tmp_path):
    run(Constant("2.0"), bench, tmp_path)
    with pytest.raises(ValueError, match="holds another run .*choose another --out"):
        run(Constant("2.0"), bench, tmp_path, max_points=5)


def test_a_map_of_another_size_is_refused(bench, tmp_path):
    class Small(Constant):
        def maps(self, queries):
            return [np.ones((2, 2)) for _ in queries]

    with pytest.raises(ValueError, match=r"gave a map of \(2, 2\) for alpha/test/row-000 of \(48, 64\)"):
        run(Small("2.0"), bench, tmp_path)


def test_points_without_maps_have_no_dense_mode(bench, tmp_path):
    class Speaker(Unloaded):
        title, dense = "Speaker", False

    with pytest.raises(ValueError, match="Speaker answers point by point"):
        run(Speaker(), bench, tmp_path, mode="dense")


def test_a_corrected_import_reads_again(tmp_path, capsys):
    """A first command with a wrong folder leaves nothing that the corrected one would take for finished."""
    if not (SHARED / "ibims1").exists():
        pytest.skip("../shared/data/ibims1 is not there")
    command = ["import", str(SHARED / "ibims1/annotations.jsonl"), "--source", "ibims1", "--out", str(tmp_path)]
    assert main([*command, "--images", str(SHARED / "ibims1/rgb")]) == 2
    assert main([*command, "--images", str(SHARED / "ibims1")]) == 0


# What is scored is what was built


def rewrite(bench: Path, source: str, change) -> None:
    """Apply `change` to the list of rows of a source, images as files."""
    file = bench / source / "test-00000.parquet"
    rows = pq.read_table(file)
    content = rows.to_pylist()
    change(content)
    pq.write_table(pa.Table.from_pylist(content, rows.schema), file)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["points", "dense"])
@pytest.mark.parametrize("column", ["image", "depth", "fx", "depth_type", "points_depth"])
def test_other_data_under_the_same_ids_is_not_taken_for_the_old(tmp_path, mode, column):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", index, 3) for index in range(3)])
    run(Constant("2.0"), bench, tmp_path / "out", mode=mode)

    def change(rows):
        old = rows[1][column]
        new = {"fx": 41.0, "depth_type": "ray", "points_depth": [1.0, 2.0, 3.0]}
        new["image"] = {"bytes": png(np.zeros((48, 64, 3), np.uint8)), "path": None}
        if column == "depth":  # half of it
            new["depth"] = {"bytes": png(np.asarray(Image.open(io.BytesIO(old["bytes"]))) // 2), "path": None}
        rows[1][column] = new[column]

    rewrite(bench, "alpha", change)
    with pytest.raises(ValueError, match="holds another run .content .*choose another --out or remove it"):
        run(Constant("2.0"), bench, tmp_path / "out", mode=mode)


def corrupt_png(row):
    data = bytearray(png(np.zeros((48, 64, 3), np.uint8)))
    data[60] ^= 1
    row["image"] = {"bytes": bytes(data), "path": None}


def truncated_jpeg(row):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(buffer, "JPEG")
    row["image"] = {"bytes": buffer.getvalue()[:-30], "path": None}


def turned_jpeg(row):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    row["image"] = {"bytes": buffer.getvalue(), "path": None}


BROKEN = {  # what a row is made of, and what the error says
    "corrupt PNG": (corrupt_png, "its image is broken"),
    "truncated JPEG": (truncated_jpeg, "cannot be decoded"),
    "turned JPEG": (turned_jpeg, "says to be turned"),
    "decompression bomb": (lambda row: row.update(image={"bytes": bomb(), "path": None}), "decompression bomb"),
    "null image": (lambda row: row.update(image=None), "its image is null"),
    "empty image": (lambda row: row.update(image={"bytes": None, "path": "a.png"}), "its image is null"),
    "no image": (lambda row: row.update(image={"bytes": b"hello", "path": None}), "not a readable"),
    "null depth": (lambda row: row.update(depth=None), "its depth is null"),
    "depth of 8 bits": (
        lambda row: row.update(depth={"bytes": png(np.zeros((4, 4), np.uint8)), "path": None}),
        "Pillow mode 'L'",
    ),
    "unequal lists": (lambda row: row.update(points_u=[1.0]), "have 1, 3 and 3 values"),
    "no v": (lambda row: row.update(points_v=None), "have 3, 0 and 3 values"),
    "NaN for truth": (lambda row: row.update(points_depth=[1.0, math.nan, 2.0]), "not finite and above 0"),
    "null for truth": (lambda row: row.update(points_depth=[1.0, None, 2.0]), "not finite and above 0"),
    "negative truth": (lambda row: row.update(points_depth=[1.0, -1.0, 2.0]), "not finite and above 0"),
    "point outside": (lambda row: row.update(points_u=[64.0, 1.0, 1.0]), "points outside its image of 64x48 px"),
    "point left of it": (lambda row: row.update(points_u=[-1.0, 1.0, 1.0]), "left of"),
    "unknown depth type": (lambda row: row.update(depth_type="inverse"), "depth_type is 'inverse'"),
    "null depth type": (lambda row: row.update(depth_type=None), "depth_type is None"),
    "scale 0": (lambda row: row.update(depth_scale=0.0), "depth_scale, fx, fy"),
    "null focal length": (lambda row: row.update(fx=None), "depth_scale, fx, fy"),
    "duplicate id": (lambda row: row.update(id="row-000"), "row 0 has its id"),
    "null id": (lambda row: row.update(id=None), "its id is None"),
}


class Counting(Constant):
    def __init__(self):
        super().__init__("2.0")
        self.images = 0

    def maps(self, queries):
        self.images += len(queries)
        return super().maps(queries)


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_cannot_be_scored_is_named_before_any_is_scored(tmp_path, name):
    spoil, reason = BROKEN[name]
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", index, 3) for index in range(20)])
    rewrite(bench, "alpha", lambda rows: spoil(rows[17]))
    contestant = Counting()
    with pytest.raises(ValueError, match="row 17 of alpha in .*bench, '.*', cannot be scored: .*--skip-bad") as error:
        run(contestant, bench, tmp_path / "out")
    assert reason in str(error.value)
    assert contestant.images == (16 if name in ("truncated JPEG", "turned JPEG") else 0)  # seen when it is decoded
    check_skipped(bench, tmp_path / "skipped", reason, "points")


def check_skipped(bench, out, reason, mode):
    summary = run(Constant("2.0"), bench, out, mode=mode, skip_bad=True)
    assert summary["sources"]["alpha"]["images"] == 19
    data = summary["data"]["alpha"]
    assert (data["rows"], data["images_of"]) == (20, 20)
    ((row, given),) = [(bad["row"], bad["reason"]) for bad in data["bad_rows"]]
    assert row == 17 and reason in given
    assert run(Constant("2.0"), bench, out, mode=mode, skip_bad=True) == summary


@pytest.mark.parametrize("name", ["truncated JPEG", "null depth"])
def test_a_row_whose_map_cannot_be_scored_is_named_or_counted(tmp_path, name):
    spoil, reason = BROKEN[name]
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", index, 3) for index in range(20)])
    rewrite(bench, "alpha", lambda rows: spoil(rows[17]))
    with pytest.raises(ValueError, match="row 17 of alpha"):
        run(Constant("2.0"), bench, tmp_path / "out", mode="dense")
    check_skipped(bench, tmp_path / "skipped", reason, "dense")


def test_negative_depth_is_refused_where_the_depth_is_read(tmp_path):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", 0, 3)])
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32), -5, np.int32)).save(buffer, "TIFF")
    rewrite(bench, "alpha", lambda rows: rows[0].update(depth={"bytes": buffer.getvalue(), "path": None}))
    with pytest.raises(ValueError, match="row 0 of alpha .*negative values, down to -5"):
        run(Constant("2.0"), bench, tmp_path / "out", mode="dense")


def test_bad_rows_are_printed_and_counted(tmp_path, capsys):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", index, 3) for index in range(4)])
    rewrite(bench, "alpha", lambda rows: rows[2].update(image=None))
    command = ["evaluate", "--model", "constant:2.0", "--data", str(bench), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "row 2 of alpha" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 4 images, 9 points" in printed and "left out, row 2, row-002: its image is null" in printed


def test_a_missing_source_folder_disables_only_that_source(bench, tmp_path, caplog, capsys):
    shutil.copytree(bench, tmp_path / "bench")
    shutil.rmtree(tmp_path / "bench" / "beta")
    summary = run(Constant("2.0"), tmp_path / "bench", tmp_path / "out")
    assert list(summary["sources"]) == ["alpha"]
    assert "beta is left out: the card of" in caplog.text and "its files are missing" in caplog.text
    command = ["evaluate", "--model", "constant:2.0", "--data", str(tmp_path / "bench"), "--sources", "beta"]
    assert main(command) == 2
    assert "beta in" in capsys.readouterr().err


def test_rows_without_a_column_are_refused(bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    file = tmp_path / "bench" / "beta" / "test-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["cx"]), file)
    with pytest.raises(ValueError, match="rows of beta in .* have no cx"):
        run(Constant("2.0"), tmp_path / "bench", tmp_path / "out")


def build_toy(tmp_path: Path, monkeypatch, frames: int = 6, **fields) -> Path:
    monkeypatch.setattr(build, "SHARD_IMAGES", 4)
    reader = build.SourceReader(Toy, str(write_toy(tmp_path / "raw", {"a/x": frames})), "test")
    parameters, items = reader.plan()
    build.write_split(tmp_path / "built", Toy, "test", reader, parameters, items)
    return tmp_path / "built"


def test_summary_and_run_hold_the_builders_hash(tmp_path, monkeypatch):
    bench = build_toy(tmp_path, monkeypatch)
    record = json.loads((bench / "toy" / "test.json").read_text())
    summary = run(Constant("2.0"), bench, tmp_path / "out")
    assert summary["data"] == {"toy": {"hash": record["content"], "rows": 6, "images_of": 6, "bad_rows": []}}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["content"] == {"toy": record["content"]}
    assert set(predictions(tmp_path / "out").scene) == {"a"}
    content = (tmp_path / "out" / "predictions.parquet").read_bytes()
    assert summary["hashes"] == {"predictions.parquet": hashlib.sha256(content).hexdigest()}


def test_shards_that_are_not_what_was_built_are_refused(tmp_path, monkeypatch):
    bench = build_toy(tmp_path, monkeypatch)
    file = bench / "toy" / "test-00001-of-00002.parquet"
    rows = pq.read_table(file)
    content = rows.to_pylist()
    content[0]["points_depth"][0] += 0.001
    pq.write_table(pa.Table.from_pylist(content, rows.schema), file)
    with pytest.raises(ValueError, match="the rows of toy in .* have changed since they were built"):
        run(Constant("2.0"), bench, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="toy in .* cannot be read"):
        run(Constant("2.0"), bench, tmp_path / "out")


def test_a_build_that_has_not_finished_is_not_scored(tmp_path, monkeypatch):
    bench = build_toy(tmp_path, monkeypatch)
    record = json.loads((bench / "toy" / "test.json").read_text())
    manifest.write_record(bench / "toy" / "test.json", {"finished": False, "parameters": record["parameters"]})
    with pytest.raises(ValueError, match="the build of toy in .* has not finished"):
        run(Constant("2.0"), bench, tmp_path / "out")


# Kept predictions


class Bumpy(Unloaded):
    """Right on average, another value at every pixel."""

    title, dense = "Bumpy", True

    def maps(self, queries):
        return [hilly(query.image.size, 0.5, 9.0, len(query.id)) for query in queries]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_any_number_of_workers_gives_the_same_files(bench, tmp_path):
    sources = tuple(open_sources(str(bench), None))
    for number, num_proc in ((1, 1), (2, 3)):
        asked = Run("test:it", str(bench), sources, "dense")
        evaluate.evaluate(asked, Bumpy(), tmp_path / str(number), num_proc=num_proc)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert set(files(tmp_path / "1")) >= {"images.parquet", "maps/alpha.parquet", "maps/beta.parquet", "summary.json"}


def test_saved_maps_are_what_was_scored(bench, tmp_path):
    run(Bumpy(), bench, tmp_path, mode="dense")
    images = pandas.read_parquet(tmp_path / "images.parquet").set_index(["source", "id"])
    maps = saved_maps(tmp_path, "alpha")
    rows = all_rows(bench, "alpha")
    assert list(maps) == [row["id"] for row in rows]
    for row in rows[::9]:
        depth, prediction = np.asarray(row["depth"]) / 1000, maps[row["id"]].astype(float)
        whole = hilly((64, 48), 0.5, 9.0, len(f"alpha/test/{row['id']}"))
        # a depth pixel's centre lies between four of the image's
        expected = whole.reshape(24, 2, 32, 2).mean((1, 3))
        np.testing.assert_allclose(prediction, expected, rtol=2**-11)
        scores = images.loc["alpha", row["id"]]
        valid = depth > 0
        assert scores.abs_rel == pytest.approx(np.mean(np.abs(prediction - depth)[valid] / depth[valid]), rel=1e-12)
        assert scores.boundary_f1 == metrics.boundary_f1(prediction, depth)
        intrinsics = (FX / 2, FY / 2, (CX + 0.5) / 2 - 0.5, (CY + 0.5) / 2 - 0.5)
        assert scores.point_cloud_f_score == metrics.point_cloud_f_score(prediction, depth, intrinsics)


@pytest.mark.parametrize("mode", ["points", "dense"])
def test_rescore_computes_the_scores_from_what_is_saved(bench, tmp_path, capsys, mode):
    summary = run(Bumpy(), bench, tmp_path / "out", mode=mode)
    before = files(tmp_path / "out")
    wrong = {key: value for key, value in summary.items() if key != "checksum"}
    wrong["sources"] = json.loads(json.dumps(summary["sources"]).replace('"delta1": 0.', '"delta1": 0.9'))
    if mode == "dense":  # as another version had scored
        table = pandas.read_parquet(tmp_path / "out" / "images.parquet")
        table.assign(delta1=0.9).to_parquet(tmp_path / "out" / "images.parquet", index=False)
        changed = manifest.fingerprint(tmp_path / "out" / "images.parquet")["sha256"]
        wrong["hashes"] = wrong["hashes"] | {"images.parquet": changed}
    manifest.write_record(tmp_path / "out" / "summary.json", wrong)
    assert main(["rescore", str(tmp_path / "out")]) == 0
    assert f"delta1 {summary['mean']['delta1']:.4f}" in capsys.readouterr().out
    assert files(tmp_path / "out") == before


def test_maps_are_rescored_against_the_data_they_are_of(bench, tmp_path, capsys):
    shutil.copytree(bench, tmp_path / "bench")
    summary = run(Bumpy(), tmp_path / "bench", tmp_path / "out", mode="dense")
    (tmp_path / "bench").rename(tmp_path / "elsewhere")
    assert main(["rescore", str(tmp_path / "out")]) == 2
    assert "is no built benchmark" in capsys.readouterr().err
    assert evaluate.rescore(tmp_path / "out", str(tmp_path / "elsewhere"))["sources"] == summary["sources"]
    rewrite(tmp_path / "elsewhere", "alpha", lambda rows: rows[0].update(fx=1.0))
    with pytest.raises(ValueError, match="was evaluated on other rows of alpha"):
        evaluate.rescore(tmp_path / "out", str(tmp_path / "elsewhere"))


def test_a_part_or_map_that_has_changed_is_made_again(bench, tmp_path, caplog):
    run(Bumpy(), bench, tmp_path, mode="dense")
    before = files(tmp_path)
    for name in ("parts/alpha-0000016.parquet", "maps/beta.parquet", "parts/beta-0000000.json"):
        content = bytearray(before[name])
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)
        contestant = Bumpy()
        run(contestant, bench, tmp_path, mode="dense")
        assert name.removesuffix(".json").removesuffix(".parquet") in caplog.text and "made again" in caplog.text
        assert files(tmp_path) == before
        caplog.clear()


def test_a_broken_run_record_is_refused(bench, tmp_path):
    run(Constant("2.0"), bench, tmp_path)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(ValueError, match="holds results of an unknown run .*choose another --out or remove it"):
        run(Constant("2.0"), bench, tmp_path)


# Single bytes


def flips(folder: Path, count: int, random):
    """(file, what it held): each time with one byte of one file changed, and put back after."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".json"))
    for _ in range(count):
        path = paths[random.integers(len(paths))]
        content = path.read_bytes()
        changed = bytearray(content)
        changed[random.integers(len(content))] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        yield path
        path.write_bytes(content)


def test_every_changed_byte_is_detected(tmp_path, monkeypatch, capsys):
    """Of shards, records, predictions, maps and summaries: by `verify`, and by reading results where they are of it."""
    bench = build_toy(tmp_path, monkeypatch)
    for mode in ("points", "dense"):
        run(Bumpy(), bench, tmp_path / mode, mode=mode)
    random = np.random.default_rng(0)
    for folder, count in ((bench, 100), (tmp_path / "points", 50), (tmp_path / "dense", 50)):
        for path in flips(folder, count, random):
            assert main(["verify", str(folder)]) == 1, path
            assert path.stem in capsys.readouterr().out
            if path.name in ("summary.json", "predictions.parquet", "images.parquet") or path.parent.name == "maps":
                if path.suffix == ".parquet" or path.name == "summary.json":
                    with pytest.raises(ValueError, match="changed since it was written|no record with a checksum"):
                        scoring.read_summary(folder)
        assert main(["verify", str(folder)]) == 0


def test_no_changed_byte_of_a_shard_changes_what_is_scored_in_silence(tmp_path, monkeypatch):
    bench = build_toy(tmp_path, monkeypatch)
    opened = open_sources(str(bench), None)
    whole = contents_of(str(bench), opened, False)
    refused = 0
    for path in flips(bench / "toy", 60, np.random.default_rng(1)):
        try:
            opened = open_sources(str(bench), None)
            assert contents_of(str(bench), opened, False) == whole, path  # a byte that holds nothing
        except ValueError:
            refused += 1
    assert refused > 20


# Endpoints


def test_an_endpoint_is_not_asked_before_its_estimate_is_accepted(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    command = ["evaluate", "--model", "openai:some", "--data", str(bench), "--out", str(tmp_path / "out")]
    assert main([*command, "--max-points", "30", "--price", "2", "10"]) == 0
    said = capsys.readouterr().out
    assert "30 requests to some about 30 images" in said and "nothing was asked; add --yes" in said
    assert not (tmp_path / "out").exists()


def test_marked_pictures_are_saved_for_a_look(bench, tmp_path):
    class Speaker(Unloaded):
        title, dense = "Speaker", False

    asked = Run("test:it", str(bench), ("alpha", "beta"))
    evaluate.save_marked(asked, Speaker(), tmp_path, 1)
    points = all_rows(bench, "alpha")[0]["points_u"]
    pictures = list(tmp_path.glob("*.png"))
    assert 0 < len(pictures) <= len(points)
    with pytest.raises(ValueError, match="is not shown marked images"):
        evaluate.save_marked(asked, Constant("2.0"), tmp_path, 1)
