"""What the benchmark's commands cost beside the models: `python -m bench.throughput evaluate CHECKPOINT DATA`, what
`evaluate` adds to the model's forwards, and `python -m bench.throughput report`, time and memory of a report of the
paper's nine sets by 25 contestants, 10 000 points each. Both print JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa

from . import evaluate, manifest, rows, scoring
from .contestants.depthvlm import DepthVLM
from .depthvlm_bench import GROUPS
from .efficiency import machine

BATCH_SIZE = 4  # photos; what `evaluate` does by default


def evaluation_overhead(checkpoint: str, data: str, rounds: int = 3) -> dict:
    """
    `python -m bench evaluate` against its forwards alone, over all points of `data`, both in this process.

    The forwards alone are timed one batch after the other with nothing beside them: while `evaluate` reads and prepares
    ahead, its own forwards share a CPU's cores with that. Both take turns, after a round of forwards that is not
    counted; the seconds are of the round with the median overhead.
    """
    contestant, seconds = DepthVLM(checkpoint), []
    forward = contestant.model.forward

    def timed(*args, **kwargs):
        start = time.perf_counter()
        outputs = forward(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return outputs

    contestant.model.forward = timed
    opened = rows.open_sources(data, None)
    run = evaluate.Run(checkpoint, data, tuple(opened))
    kept = rows.points_of(opened, run.mode, run.max_points)
    chunks = [(name, start) for name, held in opened.items() for start in range(0, len(held), evaluate.CHUNK)]
    batches = evaluate.Batches(run, contestant, opened, kept, chunks, BATCH_SIZE)

    def forwards_alone() -> float:
        seconds.clear()
        for number in range(len(batches)):
            *_, prepared = batches[number]
            contestant.maps(prepared)
        return sum(seconds)

    forwards_alone()
    measured = []
    for _ in range(rounds):
        alone = forwards_alone()
        seconds.clear()
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            summary = evaluate.evaluate(run, contestant, Path(folder), BATCH_SIZE)
            whole = time.perf_counter() - start
        measured.append((whole / alone - 1, whole, alone, sum(seconds)))
    overhead, whole, alone, within = sorted(measured)[rounds // 2]
    images = sum(source["images"] for source in summary["sources"].values())
    return {
        "images": images,
        "images_per_second": images / whole,
        "seconds": whole,
        "forward_seconds_alone": alone,
        "forward_seconds_within": within,
        "overhead": overhead,
        "overheads": [overhead for overhead, *_ in measured],
        "machine": machine("cpu"),
    }


def report_cost(contestants: int = 25, points: int = 10_000) -> dict:
    """
    `python -m bench report --paper` in a process of its own: seconds, and the bytes that it takes at its peak (Linux),
    for results of all the paper's sets, each of `points` points in 1000 images of 50 scenes.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{number:02d}" for number in range(contestants)]
        for number, result in enumerate(results):
            write_results(result, f"Contestant {number}", 0.1 + 0.02 * number, points)
        command = [sys.executable, "-m", "bench", "report", *results, "--paper", "--out", f"{folder}/report"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "sets": len(GROUPS["paper_eval"][1]),
        "contestants": contestants,
        "points": points,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "machine": machine("cpu"),
    }


def write_results(folder: Path, title: str, sigma: float, points: int) -> None:
    """A folder as `evaluate` writes it, of predictions whose ln is off by a normal error of `sigma`."""
    sources, tables = GROUPS["paper_eval"][1], []
    for source in sources:
        truth = np.random.default_rng([*source.encode()])  # the same for all contestants
        image = np.arange(points) * 1000 // points
        depth, u, v = truth.uniform((0.5, 0, 0), (50, 640, 480), (points, 3)).T
        error = np.random.default_rng([*source.encode(), *title.encode()]).normal(0, sigma, points)
        names = {"id": [f"image-{i}" for i in image], "source": source, "scene": [f"scene-{i // 20}" for i in image]}
        values = {"u": u, "v": v, "gt": depth, "prediction": depth * np.exp(error), "status": "ok", "text": ""}
        tables.append(pandas.DataFrame(names | values))
    table = pandas.concat(tables)
    folder.mkdir()
    file = folder / scoring.table_file("points")
    evaluate.write_table(file, pa.Table.from_pandas(table, scoring.POINTS, preserve_index=False))
    contestant = {"title": title, "group": DepthVLM.group, "dense": True}
    data = {source: {"hash": manifest.content_hash([source]), "images_of": 1000} for source in sources}
    summary = {"format": scoring.FORMAT, "contestant": contestant, "data": data}
    summary |= {"protocol": {"mode": "points", "as_released": False, "data": ""}}
    summary |= scoring.of_sources(table, sources, "points", False)
    manifest.write_record(
        folder / "summary.json", summary | {"hashes": {file.name: manifest.fingerprint(file)["sha256"]}}
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    evaluated = commands.add_parser("evaluate", help="what scoring adds to the model's forwards")
    evaluated.add_argument("checkpoint", metavar="CHECKPOINT")
    evaluated.add_argument("data", metavar="DATA", help="what `build` or `import` wrote")
    evaluated.set_defaults(measure=lambda options: evaluation_overhead(options.checkpoint, options.data))
    reported = commands.add_parser("report", help="time and memory of a report of 9 sets x 25 contestants")
    reported.set_defaults(measure=lambda _: report_cost())
    options = parser.parse_args(arguments)
    print(json.dumps(options.measure(options), indent=1))


if __name__ == "__main__":
    main()
