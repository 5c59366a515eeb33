"""`python -m bench report` on small results made by hand."""

import argparse
import csv
import json
import re
import shutil

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from bench import metrics
from bench.report import add_report, protocol, read_results, report, worst_first

PAPER_SOURCES = ["argoverse2", "waymo", "ddad", "nuscenes", "eth3d", "scannetpp", "sunrgbd", "ibims1", "nyuv2"]


def points_of(source, images=3, points=10) -> pandas.DataFrame:
    noise = np.random.default_rng(len(source))
    n = images * points
    return pandas.DataFrame(
        {
            "id": np.repeat([f"{source}-{image}" for image in range(images)], points),
            "source": source,
            "u": noise.integers(0, 64, n).astype(float),
            "v": noise.integers(0, 48, n).astype(float),
            "gt": noise.uniform(0.5, 30, n),
        }
    )


def write_run(folder, title, predict, sources=("ibims1", "scannetpp"), dense=True, **protocol):
    """Results as `evaluate` writes them; `predict(table)` gives the predictions, NaN for none."""
    table = pandas.concat([points_of(source) for source in sources], ignore_index=True)
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
        scored[name]["metrics"] = scores
    contestant = {"model": title, "title": title, "quantity": "z", "uses_intrinsics": False, "dense": dense}
    summary = {
        "format": "depthvlm-bench-results/1",
        "contestant": contestant,
        "protocol": {"mode": "points", "as_released": False, "data": str(folder)} | protocol,
        "versions": {},
        "sources": scored,
        "mean": {"delta1": float(np.mean([own["metrics"]["delta1"] for own in scored.values()]))},
    }
    folder.mkdir()
    table.to_parquet(folder / "predictions.parquet", index=False)
    (folder / "summary.json").write_text(json.dumps(summary))
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


def test_paper_and_measured_stand_apart(tmp_path):
    runs = [write_run(tmp_path / "a", "Noisy", noisy), write_run(tmp_path / "b", "Words", constant, dense=False)]
    text = report(runs, tmp_path / "out", paper=True).read_text()
    first, second = rows_of(text, "table 1 of the paper:"), rows_of(text, "table 2 of the paper:")
    assert first["header"][2:-1] == PAPER_SOURCES
    assert first["paper", "Always Output 2.0m"][-1] == "0.157"
    assert len([key for key in first if key[0] == "paper"]) == 16
    assert len([key for key in second if key[0] == "paper"]) == 11
    assert ("measured", "**Words**") in first and ("measured", "**Words**") not in second  # no maps
    measured = first["measured", "**Noisy**"]
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert measured[PAPER_SOURCES.index("ibims1")] == f"{summary['sources']['ibims1']['metrics']['delta1']:.3f}"
    assert measured[0] == "-" and measured[-1] == "-"  # seven sources lack, so there is no mean
    assert "drew other points" in text
    with (tmp_path / "out" / "report.csv").open() as file:
        records = list(csv.DictReader(file))
    assert {record["from"] for record in records} == {"paper", "measured"}


def test_mean_needs_every_source(tmp_path):
    runs = [
        write_run(tmp_path / "a", "Both", constant),
        write_run(tmp_path / "b", "One", constant, sources=("ibims1",)),
    ]
    rows = rows_of(report(runs, tmp_path / "out", paper=False).read_text(), "### δ1")
    both, one = rows["measured", "**Both**"], rows["measured", "**One**"]
    assert float(both[2]) == pytest.approx((float(both[0]) + float(both[1])) / 2, abs=1e-3)
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


def test_figures_and_depth_ranges(tmp_path):
    run = write_run(tmp_path / "a", "Cost $x$ | <b>", noisy)
    text = report([run], tmp_path / "out", paper=False).read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        with Image.open(tmp_path / "out" / picture) as image:
            assert min(image.size) > 200
    assert "<b>" not in text and "give `--data" in text
    table = pandas.read_parquet(run / "predictions.parquet")
    with (tmp_path / "out" / "report.csv").open() as file:
        records = [record for record in csv.DictReader(file) if record["table"] == "depth 10–20 m"]
    own = table[(table["gt"] > 10) & (table["gt"] <= 20)]
    right = sum(max(p / d, d / p) < 1.25 for p, d in zip(own.prediction, own["gt"], strict=True))
    assert float(records[0]["value"]) == pytest.approx(right / len(own)) and int(records[0]["count"]) == len(own)


def write_images(folder, source) -> None:
    """A built source, as far as the contact sheet reads it."""
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3)))
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    rows = {"id": [f"{source}-{image}" for image in range(3)], "image": [picture] * 3}
    (folder / source).mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / source / "test-00000.parquet")


def test_worst_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, configs = tmp_path / "data", ""
    for source in ("ibims1", "scannetpp"):
        write_images(data, source)
        configs += f"- config_name: {source}\n  data_files:\n  - split: test\n    path: {source}/test-*.parquet\n"
    (data / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def predict(table):
        prediction = table["gt"].copy()
        prediction[table["id"] == "ibims1-1"] *= 2
        prediction[table["id"] == "scannetpp-2"] *= 3
        prediction[table["id"] == "scannetpp-0"] = np.nan
        return prediction

    run = write_run(tmp_path / "a", "A", predict)
    order = worst_first(read_results(run).table)
    assert order[:3] == [("scannetpp", "scannetpp-0"), ("scannetpp", "scannetpp-2"), ("ibims1", "ibims1-1")]
    report([run], tmp_path / "out", paper=False, data=str(data))
    assert (tmp_path / "out" / "worst-1-1.png").stat().st_size > 5000


def test_efficiency(tmp_path):
    run = write_run(tmp_path / "a", "A", constant)
    timings = {"layers": 3, "seconds": {"plain prefill": [2.0, 1.0, 3.0], "forward with depth": [2.2, 1.1, 3.3]}}
    timings |= {"ratios": {"forward with depth": 1.1}, "alternatives": {"forward with depth": "plain prefill"}}
    timings |= {"extrapolated": {"a map of 64 x 32 points in words": 4096.0}, "machine": {"device": "cpu"}}
    timings |= {"peak_bytes": {"forward with depth": 3 * 2**29}}
    file = tmp_path / "efficiency.json"
    file.write_text(json.dumps(timings))
    text = report([run], tmp_path / "out", paper=True, efficiency=file).read_text()
    rows = rows_of(text, "## Efficiency")
    assert rows["measured", "forward with depth"] == ["2.2", "3.19", "3", "1.100 of plain prefill"]
    assert rows["extrapolated", "a map of 64 x 32 points in words"] == ["4096", "-", "-", "-"]
    assert "Peak memory of forward with depth: 1.50 GiB." in text
    assert rows["paper", "DepthLM-12B"] == ["-", "-", "-", "-"]  # lost in the text, not invented
    file.write_text("{}")
    with pytest.raises(ValueError, match="efficiency.json has no lists of seconds"):
        report([run], tmp_path / "out", paper=False, efficiency=file)


def test_dense_results(tmp_path):
    run = write_run(tmp_path / "a", "A", constant, sources=("ibims1",))
    summary = json.loads((run / "summary.json").read_text())
    summary["protocol"]["mode"] = "dense"
    summary["sources"]["ibims1"]["metrics"] |= {"boundary_f1": None, "point_cloud_f_score": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    images = {"id": ["ibims1-0", "ibims1-1", "ibims1-2"], "source": "ibims1", "points": 10, "delta1": 0.5}
    pandas.DataFrame(images).to_parquet(run / "images.parquet")
    text = report([run], tmp_path / "out", paper=True).read_text()
    assert (
        "over full maps" in text
        and "| repository | Depth Pro |" in text
        and "table 1 of the paper:" not in text
        and "point_cloud_f_score" in text
    )


def broken(change):
    def apply(folder):
        summary = json.loads((folder / "summary.json").read_text())
        change(summary)
        (folder / "summary.json").write_text(json.dumps(summary))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "summary.json cannot be read as JSON"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json cannot be read as JSON"),
        (lambda folder: (folder / "summary.json").write_text("[1]"), "has format 'list'"),
        (broken(lambda summary: summary.update(format="else/1")), "has format 'else/1'"),
        (broken(lambda summary: summary.pop("contestant")), "'contestant'"),
        (broken(lambda summary: summary["protocol"].update(mode="sparse")), "'sparse'"),
        (broken(lambda summary: summary.update(sources={})), "has no sources"),
        (broken(lambda summary: summary["sources"]["ibims1"].update(points=7)), "summary.json counts"),
        (broken(lambda summary: summary["sources"]["ibims1"]["metrics"].update(rmse="1")), "rmse '1'"),
        (broken(lambda summary: summary["sources"]["ibims1"]["metrics"].update(rmse=float("nan"))), "NaN"),
        (lambda folder: (folder / "predictions.parquet").unlink(), "predictions.parquet cannot be read"),
        (lambda folder: (folder / "predictions.parquet").write_bytes(b"PAR1"), "predictions.parquet cannot be read"),
        (
            lambda folder: pandas.DataFrame({"id": []}).to_parquet(folder / "predictions.parquet"),
            "has no columns gt, prediction",
        ),
    ],
)
def test_ill_formed_results(tmp_path, spoil, words):
    run = write_run(tmp_path / "run", "A", constant)
    spoil(run)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        report([run], tmp_path / "out", paper=False)
    assert str(run) in str(error.value) and "`python -m bench evaluate`" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_points_are_refused(tmp_path):
    runs = [write_run(tmp_path / "a", "A", constant), write_run(tmp_path / "b", "B", constant)]
    table = pandas.read_parquet(runs[1] / "predictions.parquet")
    table.loc[3, "u"] += 1
    table.to_parquet(runs[1] / "predictions.parquet", index=False)
    with pytest.raises(ValueError, match="scored different points of ibims1"):
        report(runs, tmp_path / "out", paper=False)


def test_same_title_and_same_folder(tmp_path):
    run = write_run(tmp_path / "a", "A", constant)
    shutil.copytree(run, tmp_path / "b")
    assert f"**A ({run})**" in report([run, tmp_path / "b"], tmp_path / "out", paper=False).read_text()
    with pytest.raises(ValueError, match="given twice"):
        report([run, run], tmp_path / "out", paper=False)
    assert protocol(read_results(run)) == "mode points, as released False"


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_report(parser.add_subparsers())
    run = write_run(tmp_path / "a", "A", constant)
    args = parser.parse_args(["report", str(run), "--paper", "--out", str(tmp_path / "out")])
    assert args.run(args) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.md")
