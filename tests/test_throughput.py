"""bench/throughput.py: what is timed is what the commands do."""

import json

import pytest
from test_evaluate import ROOT, make_row, write_bench

from bench import results, throughput


def test_evaluate_is_timed_against_its_forwards_alone(tmp_path):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", index, 2) for index in range(5)])
    measured = throughput.evaluation_overhead(str(ROOT), str(bench))
    assert measured["images"] == 5
    assert 0 < measured["forward_seconds_within"] < measured["seconds"]
    assert measured["overhead"] == pytest.approx(measured["seconds"] / measured["forward_seconds_alone"] - 1)


def test_report_is_timed_on_results_that_it_accepts(tmp_path, monkeypatch, capsys):
    throughput.write_results(tmp_path / "run", "A", 0.1, 1000)
    run = results.read_results(tmp_path / "run")
    assert len(run.scores) == 9 and all(source["points"] == 1000 for source in run.scores.values())
    # P(|error| < ln 1.25) of a normal error of sigma 0.1 is 0.974
    assert run.summary["mean"]["delta1"] == pytest.approx(0.974, abs=0.01)
    cost = throughput.report_cost
    monkeypatch.setattr(throughput, "report_cost", lambda: cost(contestants=2, points=1000))
    throughput.main(["report"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["sets"] == 9 and 0 < printed["seconds"] and 50 << 20 < printed["peak_bytes"]
