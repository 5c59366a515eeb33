"""`python -m bench report` on small results made by hand."""

import argparse
import csv
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pandas
import pytest
from PIL import Image
from scipy import stats
from test_evaluate import Unloaded, evaluate_two_metres, make_row, write_bench
from test_evaluate import run as evaluate_run

from bench import contestants, figures, manifest, metrics, paper, tables
from bench.__main__ import main
from bench.breakdowns import map_errors, worst_first
from bench.contestants.constant import Constant
from bench.report import add_report, report
from bench.results import protocol, read_results
from bench.scoring import FORMAT

PAPER_SOURCES = ["argoverse2", "waymo", "ddad", "nuscenes", "eth3d", "scannetpp", "sunrgbd", "ibims1", "nyuv2"]
PURE, TRAINED = "Pure Vision Models", "VLMs Trained on Metric Depth Estimation"


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Figures take most of a report's time; tests that look at them ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "save", lambda figure, folder, stem: f"{stem}.png")


@pytest.fixture
def pictures():
    pass


def points_of(source, images=3, points=10) -> pandas.DataFrame:
    noise = np.random.default_rng(len(source))
    n = images * points
    return pandas.DataFrame(
        {
            "id": np.repeat([f"{source}-{image}" for image in range(images)], points),
            "source": source,
            "scene": "",
            "u": noise.integers(0, 64, n).astype(float),
            "v": noise.integers(0, 48, n).astype(float),
            "gt": noise.uniform(0.5, 30, n),
        }
    )


def write_run(
    folder, title, predict, sources=("ibims1", "scannetpp"), dense=True, group=PURE, images=3, images_of=3, **protocol
):
    """Results as `evaluate` writes them; `predict(table)` gives the predictions, NaN for none."""
    table = pandas.concat([points_of(source, images) for source in sources], ignore_index=True)
    table["prediction"] = predict(table)
    table["status"] = np.where(table.prediction.isna(), "unparsable", "ok")
    table["text"] = ""
    scored = {}
    for name in sources:
        own = table[table.source == name]
        scores = metrics.scores(own.prediction.to_numpy(), own["gt"].to_numpy())
        counts = own.status.value_counts().to_dict()
        scored[name] = {"images": own["id"].nunique(), "points": scores.pop("points"), "counts": counts}
        scores.pop("answered")
        released = {"delta1": scores["delta1"]}  # of images with as many points each, all answered
        scored[name]["metrics"] = released if protocol.get("as_released") else scores
    contestant = {"model": title, "title": title, "group": group, "quantity": "z", "uses_intrinsics": False}
    summary = {
        "format": FORMAT,
        "contestant": contestant | {"dense": dense},
        "protocol": {"mode": "points", "as_released": False, "data": str(folder)} | protocol,
        "versions": {},
        "sources": scored,
        "mean": {},
        "data": {name: {"hash": hashlib.sha256(name.encode()).hexdigest(), "images_of": images_of} for name in sources},
    }
    for metric in scored[sources[0]]["metrics"]:
        summary["mean"][metric] = float(np.mean([own["metrics"][metric] for own in scored.values()]))
    folder.mkdir()
    table.to_parquet(folder / "predictions.parquet", index=False)
    (folder / "summary.json").write_text(json.dumps(summary))
    return seal(folder)


def seal(folder):
    """Give the files of results the hashes and the checksum that `evaluate` would have given them."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("checksum", None)
    files = [file for name in ("predictions", "images") for file in folder.glob(f"{name}.parquet")]
    summary["hashes"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest.write_record(folder / "summary.json", summary)
    return folder


def noisy(table):
    prediction = table["gt"] * np.exp(np.random.default_rng(1).normal(0, 0.2, len(table)))
    return prediction.where(np.arange(len(table)) % 9 > 0)


def constant(table):
    return np.full(len(table), 2.0)


def rows_of(text, title) -> dict[tuple[str, str], list[str]]:
    """(from, method) -> cells of the first table after a heading that holds `title`."""
    body = text.split(title, 1)[1].split("\n#", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    return {(row[0], row[1]): row[2:] for row in cells[2:]} | {"header": cells[0]}


def value_of(cell: str) -> float:
    """The number of a cell, without its interval."""
    return float(cell.strip("*").split(" ")[0].strip("*"))


def records_of(out) -> list[dict]:
    with (out / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Tables


def test_paper_and_measured_stand_apart(tmp_path):
    runs = [write_run(tmp_path / "a", "Noisy", noisy), write_run(tmp_path / "b", "Words", constant, dense=False)]
    text = report(runs, tmp_path / "out", paper=True).read_text()
    first, second = rows_of(text, "Table 1 of the paper:"), rows_of(text, "Table 2 of the paper:")
    assert first["header"][2:-1] == PAPER_SOURCES
    assert first["paper", "Always Output 2.0m"][-1] == "0.157"
    assert len([key for key in first if key[0] == "paper"]) == 16
    assert len([key for key in second if key[0] == "paper"]) == 11
    assert ("measured", "**Words**") in first and ("measured", "**Words**") not in second  # no maps
    measured = first["measured", "**Noisy**"]
    summary = json.loads((runs[0] / "summary.json").read_text())
    delta1 = summary["sources"]["ibims1"]["metrics"]["delta1"]
    assert measured[PAPER_SOURCES.index("ibims1")].startswith(f"**{delta1:.3f}** (")
    assert measured[0] == "-" and measured[-1] == "-"  # seven sources lack, so there is no mean
    assert "drew other points" in text
    assert {record["from"] for record in records_of(tmp_path / "out")} == {"paper", "measured"}


def test_mean_needs_every_source(tmp_path):
    runs = [
        write_run(tmp_path / "a", "Both", constant),
        write_run(tmp_path / "b", "One", constant, sources=("ibims1",)),
    ]
    rows = rows_of(report(runs, tmp_path / "out", paper=False).read_text(), "### δ1")
    both, one = rows["measured", "**Both**"], rows["measured", "**One**"]
    assert value_of(both[2]) == pytest.approx((value_of(both[0]) + value_of(both[1])) / 2, abs=1e-3)
    assert one == [both[0], "-", "-"]


def test_protocols_are_kept_apart(tmp_path):
    runs = [
        write_run(tmp_path / "a", "A", constant),
        write_run(tmp_path / "b", "B", constant, as_released=True),
        write_run(tmp_path / "c", "C", constant, dtype="bfloat16"),
    ]
    text = report(runs, tmp_path / "out", paper=False).read_text()
    first, second = text.split("## Protocol ")[1:3]
    assert "**A**" in first and "**C**" in first and "**B**" not in first
    assert "**B**" in second and "**A**" not in second


def test_groups_are_the_papers(tmp_path):
    """A constant and DepthVLM do not stand among the pure vision models, nor a pure vision model among the VLMs."""
    runs = [
        write_run(tmp_path / "a", "Always 2 m", constant, group="Naive Prediction with Constant Answers"),
        write_run(tmp_path / "b", "DepthVLM", noisy, group=TRAINED),
        write_run(tmp_path / "c", "ZoeDepth", noisy),
    ]
    text = report(runs, tmp_path / "out", paper=True).read_text()
    for number, order in (
        (
            "1",
            ["Naive Prediction with Constant Answers", "General-Purpose VLMs", "Spatial-Enhanced VLMs", TRAINED, PURE],
        ),
        ("2", [PURE, TRAINED, "Naive Prediction with Constant Answers"]),
    ):
        body = text.split(f"Table {number} of the paper:")[1].split("\n#")[0]
        groups = dict(zip(order, re.split(r"\| \*\*[^|]*\*\* \|(?: \|)+\n", body)[1:], strict=True))
        assert "**Always 2 m**" in groups["Naive Prediction with Constant Answers"]
        assert "**DepthVLM**" in groups[TRAINED] and "| Ours-8B |" in groups[TRAINED]
        assert "**ZoeDepth**" in groups[PURE] and "**DepthVLM**" not in groups[PURE]
        assert [text.index(group) for group in order] == sorted(text.index(group) for group in order) or number == "2"


def test_every_contestant_is_of_a_group_of_the_paper():
    published = paper.read_tables()
    groups = {row["group"] for number in ("1", "2") for row in published[number]["rows"]}
    assert {contestants.get(name).group for name in contestants.names()} <= groups


def test_dense_results(tmp_path):
    run = write_run(tmp_path / "a", "A", constant, sources=("ibims1",))
    summary = json.loads((run / "summary.json").read_text())
    summary["protocol"]["mode"] = "dense"
    images = {"id": ["ibims1-0", "ibims1-1", "ibims1-2"], "source": "ibims1", "scene": "", "points": 10}
    images |= {"answered": [10, 9, 10], "delta1": [0.2, 0.5, 0.8], "boundary_f1": [None, np.nan, 0.25]}
    images |= {"point_cloud_f_score": np.nan}
    pandas.DataFrame(images).to_parquet(run / "images.parquet")
    means = {"delta1": 0.5, "boundary_f1": 0.25, "point_cloud_f_score": None}
    scored = {"images": 3, "points": 30, "counts": {"invalid": 1, "ok": 29}, "metrics": means}
    scored["images_with"] = {"delta1": 3, "boundary_f1": 1, "point_cloud_f_score": 0}
    summary |= {"sources": {"ibims1": scored}, "mean": means}
    (run / "summary.json").write_text(json.dumps(summary))
    text = report([seal(run)], tmp_path / "out", paper=True).read_text()
    assert (
        "over full maps" in text
        and "| repository | Depth Pro |" in text
        and "Table 1 of the paper:" not in text
        and "point_cloud_f_score" in text
    )
    scores = next(line for line in text.splitlines() if line.startswith("| ibims1 | A |"))
    assert "0.500 (0." in scores and scores.endswith("| 0.250 | - |")  # one image with a boundary has no interval


# The data


def test_every_table_of_scores_names_its_data(tmp_path):
    runs = [write_run(tmp_path / "a", "A", noisy), write_run(tmp_path / "b", "B", constant)]
    text = report(runs, tmp_path / "out", paper=True).read_text().split("## Other tables")[0]
    digest = hashlib.sha256(b"ibims1").hexdigest()
    for block in text.split("\n### ")[1:]:
        if "ibims1 " in block.split("\n|")[0] or ": ibims1" in block.splitlines()[0]:
            assert f"ibims1 {digest[:8]}…, 3 of 3 images" in block, block[:300]
    assert text.count(f"{digest[:8]}…") >= 6
    assert {record["data"] for record in records_of(tmp_path / "out") if record["source"] == "ibims1"} <= {digest, ""}


def test_what_covers_less_says_so_in_its_cell(tmp_path):
    run = write_run(tmp_path / "a", "A", noisy, images_of=1000)
    rows = rows_of(report([run], tmp_path / "out", paper=False).read_text(), "### δ1")
    assert all(cell.endswith("3/1000 images)") for cell in rows["measured", "**A**"][:2])
    whole = write_run(tmp_path / "b", "B", noisy)
    assert "/3 images" not in report([whole], tmp_path / "out", paper=False).read_text()


def test_other_data_are_refused(tmp_path):
    runs = [write_run(tmp_path / "a", "A", constant), write_run(tmp_path / "b", "B", constant)]
    table = pandas.read_parquet(runs[1] / "predictions.parquet")
    table.loc[3, "u"] += 1
    table.to_parquet(runs[1] / "predictions.parquet", index=False)
    seal(runs[1])
    with pytest.raises(ValueError, match="scored different points of ibims1"):
        report(runs, tmp_path / "out", paper=False)
    other = write_run(tmp_path / "c", "C", constant)
    sealed(lambda summary: summary["data"]["scannetpp"].update(hash="0123"))(other)
    with pytest.raises(ValueError, match=r"scored different builds of scannetpp \(0123 and"):
        report([runs[0], other], tmp_path / "out", paper=False)


# Intervals


def test_scores_have_intervals_and_ties_are_marked(tmp_path):
    """Two contestants with the same answers are both best; a constant is beyond chance behind them."""
    runs = [write_run(tmp_path / name, name, predict, images=40) for name, predict in (("A", noisy), ("B", noisy))]
    runs.append(write_run(tmp_path / "c", "C", constant, images=40))
    text = report(runs, tmp_path / "out", paper=False).read_text()
    rows = rows_of(text, "### δ1")
    number = r"\d\.\d{3}"
    for name in "AB":
        assert all(re.match(rf"\*\*{number}\*\* \({number}–{number}", cell) for cell in rows["measured", f"**{name}**"])
    assert all(re.match(rf"{number} \({number}–{number}", cell) for cell in rows["measured", "**C**"])
    pairs = {(r["method"], r["against"], r["source"]): r for r in records_of(tmp_path / "out") if r["table"] == "pairs"}
    assert len(pairs) == 9  # three pairs, two sources and their mean
    assert all(float(pairs["A", "B", source][end]) == 0 for source in ("ibims1", "mean") for end in ("low", "high"))
    assert all(float(pairs["A", "C", source]["low"]) > 0 for source in ("ibims1", "scannetpp", "mean"))
    for record in records_of(tmp_path / "out"):
        if record["table"] == "scores":
            assert float(record["low"]) <= float(record["value"]) <= float(record["high"])


# Breakdowns


@pytest.mark.usefixtures("pictures")
def test_figures_and_depth_ranges(tmp_path):
    run = write_run(tmp_path / "a", "Cost $x$ | <b>", noisy)
    text = report([run], tmp_path / "out", paper=False).read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        with Image.open(tmp_path / "out" / picture) as image:
            assert min(image.size) > 200
            width = image.size[0] / 200  # inches
        pdf = (tmp_path / "out" / picture).with_suffix(".pdf").read_bytes()
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
        assert float(box[1]) / 72 == pytest.approx(width, abs=0.01) and width <= 7.01
        assert "<svg" in (tmp_path / "out" / picture).with_suffix(".svg").read_text()[:1000]
    assert "<b>" not in text and "give `--data" in text
    table = pandas.read_parquet(run / "predictions.parquet")
    records = [record for record in records_of(tmp_path / "out") if record["table"] == "depth 10–20 m"]
    for source in ("ibims1", "scannetpp"):
        own = table[(table["gt"] > 10) & (table["gt"] <= 20) & (table.source == source)]
        right = sum(max(p / d, d / p) < 1.25 for p, d in zip(own.prediction, own["gt"], strict=True))
        delta1 = next(record for record in records if (record["source"], record["metric"]) == (source, "delta1"))
        assert float(delta1["value"]) == pytest.approx(right / len(own)) and int(delta1["count"]) == len(own)
        error = own[own.prediction.notna()].eval("abs(prediction - gt) / gt").mean()
        abs_rel = next(record for record in records if (record["source"], record["metric"]) == (source, "abs_rel"))
        assert float(abs_rel["value"]) == pytest.approx(error)


def test_the_same_results_make_the_same_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = write_run(tmp_path / "a", "A", noisy)
    report([run], tmp_path / "one", paper=True)
    report([run], tmp_path / "two", paper=True)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"report.md", "report.csv", "leaderboard.html", "tables.tex", "delta1-1.svg"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_scenes(tmp_path):
    run = write_run(tmp_path / "a", "A", noisy, images=6)
    table = pandas.read_parquet(run / "predictions.parquet")
    table["scene"] = np.where(table.source == "ibims1", "room " + table["id"].str[-1].replace({"5": "4"}), "")
    table.to_parquet(run / "predictions.parquet", index=False)
    text = report([seal(run)], tmp_path / "out", paper=False).read_text()
    assert "### δ1 by scene: ibims1" in text and "by scene: scannetpp" not in text and "(5 scenes)" in text
    records = {r["table"]: r for r in records_of(tmp_path / "out") if r["table"].startswith("scene ")}
    assert sorted(records) == [f"scene room {n}" for n in range(5)]
    own = table[table.scene == "room 4"]
    right = sum(max(p / d, d / p) < 1.25 for p, d in zip(own.prediction, own["gt"], strict=True))
    record = records["scene room 4"]
    assert float(record["value"]) == pytest.approx(right / 20) and record["images"] == "2" and record["low"]
    assert not records["scene room 0"]["low"]  # one image says nothing about others


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("mode", ["points", "dense"])
def test_worst_images_and_cameras(tmp_path, mode):
    """From a benchmark of two cameras, through `evaluate`: the second image is twice too near, the third unanswered."""
    rows = [make_row("alpha", index, 8, depth_size=(64, 48)) | {"camera": "lr"[index % 2]} for index in range(4)]
    data = write_bench(tmp_path / "data", alpha=rows, beta=[make_row("beta", 7, 8)])

    class Knows(Unloaded):
        title, dense = "Knows", True

        def maps(self, queries):
            maps = []
            for query in queries:
                index = int(query.id[-3:])
                if mode == "dense":
                    words = np.asarray((rows[index] if index < 4 else make_row("beta", 7, 8))["depth"])
                    depth = np.kron(words, np.ones((48 // words.shape[0],) * 2)) / 1000
                else:
                    depth = np.full((48, 64), 2.0)
                maps.append((depth * {1: 0.5, 2: np.nan}.get(index, 1)).astype(np.float32))
            return maps

    evaluate_run(Knows(), data, tmp_path / "run", mode=mode)
    table = read_results(tmp_path / "run").table
    order = worst_first(table)
    assert order[0] == ("alpha", "row-002") and len(order) == 5
    assert mode == "points" or order[1] == ("alpha", "row-001")
    text = report([tmp_path / "run"], tmp_path / "out", paper=False, data=str(data)).read_text()
    assert (tmp_path / "out" / "worst-1-1.png").stat().st_size > 5000
    cells = next(line for line in text.split("by camera: alpha")[1].splitlines() if line.startswith("| Knows"))
    left, right = (value_of(cell) for cell in cells.split(" | ")[1:3])
    means = table[table.source == "alpha"].assign(camera=table["id"].astype(str).str[-1].astype(int) % 2)
    if mode == "dense":
        assert (left, right) == (0.5, 0.5)  # rows 0 and 2, 1 and 3
    else:
        ratio = np.maximum(means.prediction / means["gt"], means["gt"] / means.prediction)
        expected = (ratio < 1.25).groupby(means.camera).mean()
        assert (left, right) == pytest.approx((expected[0], expected[1]), abs=6e-4)
    assert "by camera: beta" not in text  # it has one
    other = write_bench(tmp_path / "other", alpha=rows[:3], beta=[make_row("beta", 7, 8)])
    with pytest.raises(ValueError, match="was evaluated on other rows of alpha .hash .*; pass --data with the former"):
        report([tmp_path / "run"], tmp_path / "out", paper=False, data=str(other))


def test_errors_of_a_sparse_map_are_dots(tmp_path):
    """Where few pixels have ground truth, such as lidar's: at their centres, in px of the image."""
    row, places = make_row("alpha", 0, 8, depth_size=(32, 24)), [(3, 5), (20, 30), (23, 0)]
    depth = np.zeros((24, 32), np.uint16)
    for place in places:
        depth[place] = 4000
    evaluate_run(Constant("2.0"), write_bench(tmp_path / "data", alpha=[row | {"depth": Image.fromarray(depth)}]),
                 tmp_path / "run", mode="dense")  # fmt: skip
    stored = {"source": "alpha", "id": "row-000", "depth": depth, "depth_scale": 1000.0, "size": (64, 48)}
    u, v, error = map_errors(read_results(tmp_path / "run"), stored)["points"]
    assert list(zip(v, u, strict=True)) == [(2 * row + 0.5, 2 * column + 0.5) for row, column in places]
    assert error == pytest.approx(np.log([0.5] * 3))


@pytest.mark.parametrize(("name", "delta1", "images"), [("ibims1", 0.2648, 50), ("scannetpp", 0.2850, 20)])
def test_two_metres_everywhere_on_real_frames_with_intervals(tmp_path, name, delta1, images):
    evaluate_two_metres(name, tmp_path)
    assert main(["report", str(tmp_path / "out"), "--paper", "--out", str(tmp_path / "report")]) == 0
    scored = [record for record in records_of(tmp_path / "report") if record["table"] == "scores"]
    record = next(record for record in scored if record["metric"] == "delta1")
    assert float(record["value"]) == pytest.approx(delta1, abs=1e-12) and int(record["images"]) == images
    table = read_results(tmp_path / "out").table
    unit = table.scene.astype(str).where(table.scene != "", table["id"].astype(str))
    right = table.assign(right=(table["gt"] > 1.6) & (table["gt"] < 2.5)).groupby(unit.to_numpy()).right
    se = stats.bootstrap(
        (right.sum().to_numpy(float), right.count().to_numpy(float)),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        rng=np.random.default_rng(0),
    ).standard_error
    half = (float(record["high"]) - float(record["low"])) / 2
    assert half == pytest.approx(stats.t.ppf(0.975, len(right) - 1) * se, rel=0.15)
    assert float(record["low"]) < delta1 < float(record["high"])


# Other results


def test_efficiency(tmp_path):
    run = write_run(tmp_path / "a", "A", constant)
    timings = {"layers": 3, "seconds": {"plain prefill": [2.0, 1.0, 3.0], "forward with depth": [2.2, 1.1, 3.3]}}
    timings |= {"ratios": {"forward with depth": 1.1}, "alternatives": {"forward with depth": "plain prefill"}}
    timings |= {"extrapolated": {"a map of 64 x 32 points in words": 4096.0}, "machine": {"device": "cpu"}}
    timings |= {"peak_bytes": {"forward with depth": 3 * 2**29}}
    file = tmp_path / "efficiency.json"
    file.write_text(json.dumps(timings))
    text = report([run], tmp_path / "out", paper=True, efficiency=file).read_text()
    rows = rows_of(text, "Table 8 of the paper")
    assert rows["measured", "forward with depth"] == ["2.2", "3.19", "3", "1.100 of plain prefill"]
    assert rows["extrapolated", "a map of 64 x 32 points in words"] == ["4096", "-", "-", "-"]
    assert "Peak memory of forward with depth: 1.50 GiB." in text
    assert rows["paper", "DepthLM-12B"] == ["-", "-", "-", "-"]  # lost in the text, not invented
    file.write_text("{}")
    with pytest.raises(ValueError, match="efficiency.json has no lists of seconds"):
        report([run], tmp_path / "out", paper=False, efficiency=file)


def write_vqa(file, model, effective=1500, **results):
    """A result file as lmms-eval 0.7 writes it, as far as it is read."""
    parts = {"blink": ["blink_counting", "blink_jigsaw"]} if "blink" in results else {}
    tasks = [task for name in results for task in parts.get(name, [name])]
    samples = {task: {"original": 1500, "effective": effective} for task in tasks}
    content = {"results": results, "model_name": model, "group_subtasks": parts, "n-samples": samples}
    file.write_text(json.dumps(content))
    return file


def test_general_benchmarks_of_lmms_eval(tmp_path):
    run = write_run(tmp_path / "a", "A", constant)
    mmstar = {"alias": "mmstar", "coarse perception,none": 0.7, "average,none": 0.609, "average_stderr,none": "N/A"}
    first = write_vqa(
        tmp_path / "1_results.json", "my/model", mmstar=mmstar, ocrbench={"ocrbench_accuracy,none": 0.832}
    )
    second = write_vqa(tmp_path / "2_results.json", "my/model", effective=8, blink={"blink_acc,none": 0.25})
    text = report([run], tmp_path / "out", paper=True, vqa=[first, second]).read_text()
    rows = rows_of(text, "Table 3 of the paper")
    cells = dict(zip(rows["header"][2:], rows["measured", "**my/model**"], strict=True))
    assert (cells["MMStar"], cells["OCRBench"], cells["POPE"]) == ("60.9", "832", "-")
    assert cells["BLINK"] == "25.0 (16/3000 questions)"
    assert rows["paper", "Ours-4B"][0] == "82.9 (-0.5)"  # to its base, Qwen3-VL-4B
    with pytest.raises(ValueError, match="1_results.json has mmstar of my/model again"):
        report([run], tmp_path / "out", paper=True, vqa=[first, first])
    for content, words in (("{}", "is no result file of lmms-eval"), ("[", "cannot be read as JSON")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"bad.json {words}.*`lmms_eval --output_path`"):
            report([run], tmp_path / "out", paper=False, vqa=[tmp_path / "bad.json"])
    other = write_vqa(tmp_path / "other.json", "my/model", gsm8k={"exact_match,none": 0.5})
    with pytest.raises(ValueError, match="other.json has none of the tasks mmbench_en_dev_static"):
        report([run], tmp_path / "out", paper=False, vqa=[other])
    text_score = write_vqa(tmp_path / "text.json", "my/model", pope={"pope_accuracy,none": "N/A"})
    with pytest.raises(ValueError, match="text.json has pope_accuracy 'N/A' of pope"):
        report([run], tmp_path / "out", paper=False, vqa=[text_score])


def test_ablations_stand_beside_the_papers(tmp_path):
    run, folder = write_run(tmp_path / "a", "A", constant), tmp_path / "ablations"
    folder.mkdir()
    lines = "row,paper waymo,delta1,delta1 spread,delta1 seed 0,abs_rel,abs_rel spread,abs_rel seed 0\n"
    lines += 'Raw mixed-source,0.999,0.25,,0.25,0.5,,0.5\n"Canonical, 1000 px",0.1,0.75,0.01,0.75,0.125,0.02,0.125\n'
    (folder / "table7.csv").write_text(lines)
    text = report([run], tmp_path / "out", paper=True, ablations=folder).read_text()
    body = text.split("Table 7 of the paper")[1]
    assert "| Raw mixed-source | 0.802 | 0.715 | 0.770 | 0.630 | 0.729 | 0.250 | 0.500 |" in body  # the paper's own
    assert "| Canonical, 1000 px | 0.879 | 0.821 | 0.882 | 0.912 | 0.874 | 0.750 ± 0.010 | 0.125 ± 0.020 |" in body
    assert "| paper | Two-layer MLP, single-scale |" in text  # not measured
    (folder / "table7.csv").write_text(lines.replace("Raw", "<script>"))
    with pytest.raises(ValueError, match="table7.csv is no table of an ablation .*`python -m bench ablate`"):
        report([run], tmp_path / "out", paper=True, ablations=folder)
    with pytest.raises(ValueError, match="has none of the files table4.csv"):
        report([run], tmp_path / "out", paper=True, ablations=tmp_path)


# What is refused


def broken(change):
    def apply(folder):
        summary = json.loads((folder / "summary.json").read_text())
        change(summary)
        (folder / "summary.json").write_text(json.dumps(summary))

    return apply


def sealed(change):
    """The same with the checksum that belongs to it."""
    return lambda folder: (broken(change)(folder), seal(folder))


def predictions(change):
    """Another predictions.parquet, with the hash that belongs to it."""
    return lambda folder: (change(folder / "predictions.parquet"), seal(folder))


def table_of(change):
    return predictions(lambda file: change(pandas.read_parquet(file)).to_parquet(file))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "has no summary.json; pass a folder that"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json is no record"),
        (lambda folder: (folder / "summary.json").write_text("[1]"), "summary.json is no record"),
        (sealed(lambda summary: summary.update(format="else/1")), "has format 'else/1'"),
        (sealed(lambda summary: summary.pop("contestant")), "'contestant'"),
        (sealed(lambda summary: summary["contestant"].update(title=["A"])), "that is no text"),
        (sealed(lambda summary: summary["data"].pop("ibims1")), "'ibims1'"),
        (sealed(lambda summary: summary["data"]["ibims1"].update(images_of="all")), "no whole numbers"),
        (sealed(lambda summary: summary["protocol"].update(mode="sparse")), "'sparse'"),
        (sealed(lambda summary: summary.update(sources={})), "has no sources"),
        (sealed(lambda summary: summary["sources"]["ibims1"].update(points=7)), "summary.json counts"),
        (sealed(lambda summary: summary["sources"]["ibims1"]["metrics"].update(rmse="1")), "summary.json says '1'"),
        (broken(lambda summary: summary["sources"]["ibims1"]["metrics"].update(rmse=float("nan"))), "no record"),
        (broken(lambda summary: summary["contestant"].update(title="B")), "has changed since it was written"),
        (lambda folder: (folder / "predictions.parquet").unlink(), "predictions.parquet is missing"),
        (lambda folder: (folder / "predictions.parquet").write_bytes(b"PAR1"), "its hash does not match"),
        (predictions(lambda file: file.write_bytes(b"PAR1")), "predictions.parquet cannot be read"),
        (table_of(lambda table: table[["id"]]), "has no columns gt, prediction"),
        (table_of(lambda table: table.astype({"gt": str})), "has a column gt of"),
        (table_of(lambda table: table.assign(gt=-1.0)), "predictions.parquet cannot be scored (30 depths"),
    ],
)
def test_ill_formed_results(tmp_path, spoil, words):
    run = write_run(tmp_path / "run", "A", constant)
    spoil(run)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        report([run], tmp_path / "out", paper=False)
    assert str(run) in str(error.value) and "`python -m bench evaluate`" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda summary: summary["sources"]["ibims1"]["metrics"].update(delta1=0.99), "metrics delta1 0.73.* 0.99"),
        (lambda summary: summary["sources"]["ibims1"]["metrics"].update(extra=0.5), "metrics extra None.* 0.5"),
        (lambda summary: summary["sources"]["ibims1"]["metrics"].update(rmse=None), "metrics rmse 2.7.* None"),
        (lambda summary: summary["sources"]["ibims1"].update(images=2), "sources ibims1 images 3, but .* says 2"),
        (
            lambda summary: summary["sources"]["ibims1"].update(counts={"ok": 30}),
            "counts unparsable 4.* None|ok 26.* 30",
        ),
        (lambda summary: summary["mean"].update(delta1=0.99), "mean delta1 .*, but summary.json says 0.99"),
    ],
)
def test_a_summary_that_the_predictions_do_not_give_is_refused(tmp_path, change, words):
    """With hashes and checksum in order: whoever makes them up has to make up the predictions too."""
    run = write_run(tmp_path / "run", "A", noisy)
    sealed(change)(run)
    with pytest.raises(ValueError, match=words):
        report([run], tmp_path / "out", paper=False)


def test_numbers_are_those_of_the_predictions(tmp_path):
    """Other predictions, with every hash in order but the summary's scores as they were."""
    run = write_run(tmp_path / "run", "A", noisy)
    table_of(lambda table: table.assign(prediction=table["gt"].where(table.prediction.notna())))(run)
    with pytest.raises(ValueError, match="gives sources ibims1 metrics delta1 0.86.*, but summary.json says 0.73"):
        report([run], tmp_path / "out", paper=False)


def test_no_changed_byte_is_read(tmp_path):
    """Single bytes of summary and predictions, each changed at 60 places."""
    run, noise = write_run(tmp_path / "run", "A", noisy), np.random.default_rng(0)
    for name in ("summary.json", "predictions.parquet"):
        content = (run / name).read_bytes()
        for place in noise.choice(len(content), 60, replace=False):
            changed = bytearray(content)
            changed[place] ^= noise.integers(1, 256)
            (run / name).write_bytes(changed)
            with pytest.raises(ValueError, match=re.escape(str(run))):
                read_results(run)
        (run / name).write_bytes(content)
    read_results(run)


def test_same_title_and_same_folder(tmp_path):
    run = write_run(tmp_path / "a", "A", constant)
    shutil.copytree(run, tmp_path / "b")
    assert f"**A ({run})**" in report([run, tmp_path / "b"], tmp_path / "out", paper=False).read_text()
    with pytest.raises(ValueError, match="given twice"):
        report([run, run], tmp_path / "out", paper=False)
    assert protocol(read_results(run)) == "mode points, as released False"


# Other people's text

HOSTILE = (
    "[click](javascript:alert(1))",
    "<javascript:alert(2)> <script>alert(3)</script><img src=x onerror=alert(4)>",
    '=HYPERLINK("http://x","y")',
    "+1|-1\n# heading",
    "@SUM(A1) `code` *bold* _slant_ ![p](http://x/p.png) &lt;b&gt;",
    r"\input{secret} $x^2$ {{ 7 * 7 }} % \\[9pt]",
    "\u202egnp.exe\u202c\x00\x1b[31m",
)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data.strip())


def hostile_report(tmp_path):
    runs = [
        write_run(tmp_path / str(n), text, noisy, sources=("ibims1", "<b>=s[](x)"), note=HOSTILE[n % 2], group=text)
        for n, text in enumerate(HOSTILE)
    ]
    timings = {"seconds": {text: [1.0] for text in HOSTILE}, HOSTILE[0]: HOSTILE[1]}
    (tmp_path / "efficiency.json").write_text(json.dumps(timings))
    vqa = write_vqa(tmp_path / "vqa.json", HOSTILE[0], pope={"pope_accuracy,none": 0.5})
    report(runs, tmp_path / "out", paper=True, efficiency=tmp_path / "efficiency.json", vqa=[vqa])
    return tmp_path / "out"


def test_other_peoples_text_stays_text(tmp_path):
    out = hostile_report(tmp_path)
    markdown_it = pytest.importorskip("markdown_it", reason="an independent renderer of Markdown")
    rendered = (
        markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render((out / "report.md").read_text())
    )
    made = Page(rendered)
    assert not {"a", "script", "b", "pre"} & set(made.tags) and "<code>code" not in rendered
    assert all(value.endswith(".png") and "/" not in value for name, value in made.attributes if name == "src")
    assert not [name for name, _ in made.attributes if name.startswith("on")]
    assert "[click](javascript:alert(1))" in made.texts and made.tags.count("h1") == 1

    page = Page((out / "leaderboard.html").read_text())
    assert page.tags.count("script") == 1 and not {"a", "img", "b", "link", "iframe"} & set(page.tags)
    assert "[click](javascript:alert(1))" in page.texts and "<b>=s[](x)" in page.texts

    for record in records_of(out):
        for name, text in record.items():
            assert re.fullmatch(r"-?[\d.e+-]+", text) or not text.startswith(("=", "+", "-", "@")), (name, text)
    assert {'\'=HYPERLINK("http://x","y")', "'+1|-1 # heading"} <= {record["method"] for record in records_of(out)}
    assert not re.search(r"(?<!\\textbackslash\{\})\\input", (out / "tables.tex").read_text())
    for name in ("report.md", "report.csv", "tables.tex", "leaderboard.html"):
        assert not set("\u202e\x00\x1b") & set((out / name).read_text()), name


def test_page_is_one_file_that_runs_its_own_script_alone(tmp_path):
    run = write_run(tmp_path / "a", "A", noisy)
    text = report([run], tmp_path / "out", paper=True).with_name("leaderboard.html").read_text()
    page = Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"(?m)//.*$", "", text))
    policy = next(value for name, value in page.attributes if name == "content" and "script-src" in value)
    script = re.search(r"<script>(.*)</script>", text, re.S)[1]
    digest = hashlib.sha256(script.encode()).digest()
    assert "default-src 'none'" in policy and f"'sha256-{tables.base64.b64encode(digest).decode()}'" in policy
    headers = re.findall(r'<th scope="col" aria-sort="none"[^>]*><button type="button">', text)
    assert len(headers) == len(re.findall(r'<th scope="col"', text)) > 20  # each sortable with the keyboard


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_tables_compile(tmp_path):
    out = hostile_report(tmp_path)
    document = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}\begin{document}"
    (out / "all.tex").write_text(document + r"\input{tables.tex}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]


# The paper

TEXT = paper.FILE.parents[2] / "shared" / "paper.txt"


def numbers_of(cells) -> list[str]:
    """Numbers as they are printed, with those in brackets but without signs: the text has lost the paper's arrows."""
    found = [re.fullmatch(r"(\d+(?:\.\d+)?)(?: \([ +-]*(\d+(?:\.\d+)?)\))?", cell) for cell in cells]
    return [number for cell in found if cell for number in cell.groups() if number]


def printed_tables() -> dict[str, list[list[str]]]:
    """Number -> rows of cells of tables 1 to 7 in the paper's text, headers and groups included."""
    heads = ("of various methods", "Methods", "Depth Head", "Feature Source", "Training Strategy", "Training Setting")
    blocks, inside = [], False
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        _, bar, row = line.partition("| ")  # before the first one a caption may end
        cells = [cell.strip() for cell in row.strip().removesuffix("|").split("|")]
        if bar and cells[0] in heads:
            blocks.append([])
        inside = bool(bar) and (cells[0] in heads or inside)
        if inside:
            blocks[-1].append(cells)
    return dict(zip("1234567", blocks, strict=True))


def test_tables_are_the_papers_number_by_number(tmp_path):
    if not TEXT.exists():
        pytest.skip("../shared/paper.txt is not there")
    run = write_run(tmp_path / "a", "A", constant)
    text = report([run], tmp_path / "out", paper=True).read_text()
    compared = 0
    for number, printed in printed_tables().items():
        ours = rows_of(text, f"Table {number} of the paper")
        ours = [(name, cells) for (origin, name), cells in list(ours.items())[:-1] if origin == "paper"]
        theirs = [row for row in printed if numbers_of(row[1:]) or "N/A" in row]
        assert len(ours) == len(theirs), number
        for (name, cells), row in zip(ours, theirs, strict=True):
            words = re.sub(r" \(?\w+ et al.*| Hurst.*| OpenAI.*", "", row[0]).replace("†", "").replace("‡", "")
            assert name.startswith(words.split(" (")[0]), (number, name, row[0])
            assert numbers_of(cells) == numbers_of(row[1:]), (number, name)
            compared += len(numbers_of(cells))
        if number == "1":
            body = text.split("Table 1 of the paper")[1].split("\n#")[0]
            places = [body.index(f"**{row[0]}**") for row in printed if not any(row[1:])]
            assert len(places) == 4 and places == sorted(places)
    assert compared == 16 * 10 + 11 * 6 + 3 * 8 + 2 * 16 + 3 * 16 + 4 * 8  # all tables but the eighth
    # the text has lost table 8's numbers, and the report says so
    assert "Table 8" in TEXT.read_text() and rows_of(text, "Table 8 of the paper")["paper", "Youtu-VL-4B"][0] == "-"
    assert "The paper's numbers and its input size are lost in its text." in text


def test_means_of_the_papers_tables_are_means():
    """A check of typing: the last column of tables 1 and 2 is the mean of the others, rounded."""
    for number in ("1", "2", "2-full-map"):
        for row in paper.read_tables()[number]["rows"]:
            *values, mean = row["values"]
            assert mean == pytest.approx(np.mean(values), abs=0.0016), row


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_report(parser.add_subparsers())
    run = write_run(tmp_path / "a", "A", constant)
    args = parser.parse_args(["report", str(run), "--paper", "--out", str(tmp_path / "out")])
    assert args.run(args) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.md")
