"""Parts of a report that look closer: scores by true depth, scene and camera, and the worst images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas
import pyarrow.parquet

from . import figures, intervals, metrics, scoring
from .geometry import change_grid
from .paper import MEASURED
from .results import Group, Results, Scored, score_of
from .tables import Row, Score, Table, markdown_text

if TYPE_CHECKING:
    import datasets

DEPTH_EDGES = (0, 1, 2, 3, 5, 10, 20, 40, 80, np.inf)  # metres
RANGES = [f"{low}–{high}" if np.isfinite(high) else f"> {low}" for low, high in pairwise(DEPTH_EDGES)]
WORST = 12  # images of a contact sheet
SPARSE = 0.2  # share of pixels with ground truth up to which an error map is drawn as dots
DOTS = 500
NO_ANSWER = "Points without an answer are wrong for δ1, whatever the protocol."


def data_note(group: Group, sources: Sequence[str]) -> str:
    """What the numbers of a table are of: such as "scannetpp 9f3a12cd…, 1000 of 1000 images (50 scenes)"."""
    parts = []
    for source in sources:
        part = group.scored[source]
        images, data = part.runs[0].scores[source]["images"], part.data()
        scenes = f" ({counted(part.scenes, 'scene')})" if part.scenes else ""
        parts.append(f"{source} {data['hash'][:8]}…, {images} of {data['images_of']} images{scenes}")
    return f"Data: {'; '.join(parts)}."


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def entry(group: Group, table: str, run: Results, source: str, metric: str, score: Score, **fields) -> dict:
    """A line of report.csv about one source, or the mean over some."""
    line = {"protocol": group.number, "table": table, "from": MEASURED, "method": run.name, "source": source}
    line |= {"metric": metric, "value": score.value, "low": score.low, "high": score.high}
    if source in run.scores:
        data = group.scored[source].data()
        line |= {"images": run.scores[source]["images"], "images_of": data["images_of"], "data": data["hash"]}
    return line | fields


def point_terms(run: Results, source: str, names: Sequence[str]) -> np.ndarray:
    """(rows, names): some of `metrics.TERMS` at each point."""
    table = run.of(source)
    terms = metrics.point_terms(table.prediction.to_numpy(float), table["gt"].to_numpy(float))
    return terms[:, [metrics.TERMS.index(name) for name in names]]


def delta1_terms(group: Group, scored: Scored) -> np.ndarray:
    """(runs, rows, 2): what δ1 is a ratio of sums of, per row: right points and points; of images, their δ1 and 1."""
    if group.mode() == "points":
        return np.stack([point_terms(run, scored.source, ("delta1", "points")) for run in scored.runs])
    values = np.stack([run.of(scored.source).delta1.to_numpy(float) for run in scored.runs])
    return np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=-1)


def depth_tables(group: Group, out: Path, records: list[dict]) -> list[Table | str]:
    """δ1 and AbsRel over ranges of the true depth, of each source by itself."""
    if group.mode() == "dense":
        return ["Scores by depth are left out: they need results of `--mode points`."]
    tables, lines = [], {}
    for source, scored in group.scored.items():
        depth = scored.runs[0].of(source)["gt"].to_numpy(float)
        ranges = np.searchsorted(DEPTH_EDGES, depth) - 1  # (low, high]
        points = np.bincount(ranges, minlength=len(RANGES))
        shown = np.flatnonzero(points)
        keys = scored.units * len(RANGES) + ranges
        for metric, terms in {"delta1": ("delta1", "points"), "abs_rel": ("abs_rel", "answered")}.items():
            shape = (scored.count(), len(RANGES), 2)
            by_run = [point_terms(run, source, terms) for run in scored.runs]
            sums = [intervals.sums_by(keys, values, math.prod(shape[:2])).reshape(shape) for values in by_run]
            sums = np.stack(sums, axis=1)  # units, runs, ranges, 2
            values = intervals.means(sums.sum(axis=0))[..., 0]
            bounds = intervals.bounds(intervals.means(intervals.resample(sums, source))[..., 0], scored.count())
            rows = []
            for index, run in enumerate(scored.runs):
                cells = [score_of(finite(values[index, n]), *bounds[:, index, n]) for n in shown]
                rows.append(Row([run.name], cells))
                for n, cell in zip(shown, cells, strict=True):
                    title = f"depth {RANGES[n]} m"
                    records.append(entry(group, title, run, source, metric, cell, count=int(points[n])))
            if metric == "delta1":
                lines[source] = values, bounds, points
            columns = [f"{RANGES[n]} m" for n in shown]
            counts = f"Points: {', '.join(f'{RANGES[n]} m {points[n]}' for n in shown)}."
            notes = [NO_ANSWER if metric == "delta1" else "Over the answered points.", counts]
            notes.append(data_note(group, [source]))
            title = {"delta1": "δ1", "abs_rel": "AbsRel"}[metric]
            tables.append(Table(f"{title} by true depth: {source}", ["method"], columns, rows, notes))
    figure = figures.depth_lines([run.name for run in group.runs], RANGES, spread(group, lines))
    return [f"![δ1 by true depth]({figures.save(figure, out, f'depth-{group.number}')})", *tables]


def spread(group: Group, lines: dict[str, tuple]) -> dict[str, tuple]:
    """The same with a line for every run of the group, NaN for those without the source."""
    full = {}
    for source, (values, bounds, points) in lines.items():
        places = [group.runs.index(run) for run in group.scored[source].runs]
        all_values = np.full((len(group.runs), values.shape[1]), np.nan)
        all_bounds = np.full((2, *all_values.shape), np.nan)
        all_values[places], all_bounds[:, places] = values, bounds
        full[source] = all_values, all_bounds, points
    return full


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def breakdown(
    group: Group, scored: Scored, labels: np.ndarray, units: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """δ1 by label: the labels in order, (labels, runs) scores, their (2, ...) bounds, and how many images each has.

    labels, units: (rows,) of a run's table; units are resampled within a label.
    """
    codes, names = pandas.factorize(labels, sort=True)
    pairs, keys = np.unique(np.stack([codes, units]), axis=1, return_inverse=True)
    terms = delta1_terms(group, scored)
    sums = np.stack([intervals.sums_by(keys, run) for run in terms], axis=1)  # (label and unit), runs, 2
    values, bounds = np.empty((2, len(names), len(scored.runs))), np.empty((2, len(names), len(scored.runs)))
    for code, name in enumerate(names):
        part = sums[pairs[0] == code]
        values[0, code] = intervals.means(part.sum(axis=0))[..., 0]
        resampled = intervals.means(intervals.resample(part, f"{scored.source}/{name}"))[..., 0]
        bounds[:, code] = intervals.bounds(resampled, len(part))
    images = scored.runs[0].of(scored.source)["id"].groupby(codes).nunique().to_numpy()
    return list(names), values[0], bounds, images


def scene_tables(group: Group, out: Path, records: list[dict]) -> list[Table | str]:
    """Lowest, median and highest δ1 of a scene, of each source whose scenes are known; report.csv has them all."""
    tables, strips = [], {}
    for source, scored in group.scored.items():
        table = scored.runs[0].of(source)
        if not 1 < scored.scenes < table["id"].nunique():
            continue
        labels = table.scene.astype(str).replace("", "without a scene").to_numpy(object)
        names, values, bounds, images = breakdown(group, scored, labels, pandas.factorize(table["id"])[0])
        rows = []
        for index, run in enumerate(scored.runs):
            cells = [
                score_of(float(values[n, index]), *bounds[:, n, index], note=f"{name}, {counted(images[n], 'image')}")
                for n, name in enumerate(names)
            ]
            for name, cell, count in zip(names, cells, images, strict=True):
                records.append(entry(group, f"scene {name}", run, source, "delta1", cell) | {"images": int(count)})
            cells.sort(key=lambda cell: cell.value)
            median = Score(statistics.median(cell.value for cell in cells))
            rows.append(Row([run.name], [str(len(names)), cells[0], median, cells[-1]]))
        notes = [
            NO_ANSWER,
            "Intervals: images of the scene resampled. report.csv has all scenes.",
            data_note(group, [source]),
        ]
        tables.append(
            Table(f"δ1 by scene: {source}", ["method"], ["scenes", "lowest", "median", "highest"], rows, notes)
        )
        strips[source] = values.T, np.full((2, *values.T.shape), np.nan), images
    if not tables:
        return ["Scores by scene are left out: no source has scenes of several images."]
    strips = {source: values for source, (values, _, _) in spread(group, strips).items()}
    figure = figures.scene_strips([run.name for run in group.runs], strips)
    return [f"![δ1 by scene]({figures.save(figure, out, f'scenes-{group.number}')})", *tables]


def camera_tables(group: Group, rows: dict[str, datasets.Dataset], records: list[dict]) -> list[Table]:
    """δ1 by camera, of each source that was taken with several."""
    tables = []
    for source, scored in group.scored.items():
        cameras = dict(zip(rows[source]["id"], rows[source]["camera"], strict=True))
        labels = scored.runs[0].of(source)["id"].astype(str).map(cameras).replace("", "unnamed").to_numpy(object)
        names, values, bounds, images = breakdown(group, scored, labels, scored.units)
        if len(names) < 2:
            continue
        lines = []
        for index, run in enumerate(scored.runs):
            cells = [score_of(float(values[n, index]), *bounds[:, n, index]) for n in range(len(names))]
            lines.append(Row([run.name], cells))
            for name, cell, count in zip(names, cells, images, strict=True):
                records.append(entry(group, f"camera {name}", run, source, "delta1", cell) | {"images": int(count)})
        columns = [f"{name} ({counted(count, 'image')})" for name, count in zip(names, images, strict=True)]
        notes = [NO_ANSWER, data_note(group, [source])]
        tables.append(Table(f"δ1 by camera: {source}", ["method"], columns, lines, notes))
    return tables


# Pictures


def evaluated_rows(group: Group, data: str) -> dict[str, datasets.Dataset]:
    """The rows that a group scored, by source. Raises ValueError where `data` holds others."""
    from .rows import open_evaluated  # here: it imports transformers, which takes seconds

    hashes = {source: scored.data()["hash"] for source, scored in group.scored.items()}
    as_released = group.runs[0].summary["protocol"]["as_released"]
    return open_evaluated(data, hashes, as_released, group.runs[0].folder)


def worst_images(group: Group, out: Path, rows: dict[str, datasets.Dataset]) -> list[str]:
    """Contact sheets of each run's worst images, with the error of each point, or pixel where maps were kept."""
    from .rows import read_row

    lines = ["### Worst images", "Lowest δ1 first, then by the mean error. Crosses, and black: no answer."]
    places = {source: {name: place for place, name in enumerate(of["id"])} for source, of in rows.items()}
    for number, run in enumerate(group.runs, 1):
        images = []
        for source, name in worst_first(run.table)[:WORST]:
            row, query = read_row(rows[source], places[source][name], np.zeros(0, int), group.mode())
            errors = point_errors(run, row) if group.mode() == "points" else map_errors(run, row)
            images.append({"image": query.image} | errors)
        file = figures.save(figures.contact_sheet(run.name, images), out, f"worst-{group.number}-{number}")
        lines.append(f"{markdown_text(run.name)}:\n\n![worst images of {markdown_text(run.name)}]({file})")
    return lines


def worst_first(table: pandas.DataFrame) -> list[tuple[str, str]]:
    """(source, id) of all images; no answer at all is worst. table: of points or of images."""
    if "gt" in table:
        terms = metrics.point_terms(table.prediction.to_numpy(float), table["gt"].to_numpy(float))
        right, kept, log = (terms[:, metrics.TERMS.index(name)] for name in ("delta1", "answered", "log"))
        table = table[["source", "id"]].assign(delta1=right, error=np.where(kept > 0, np.abs(log), np.nan))
        table = table.groupby(["source", "id"], observed=True)[["delta1", "error"]].mean().reset_index()
    else:
        table = table[["source", "id", "delta1"]].assign(error=table.abs_rel)
    table = table.assign(error=table.error.fillna(np.inf)).sort_values(["source", "id"])
    table = table.sort_values(["delta1", "error"], ascending=[True, False], kind="stable")
    return list(zip(table.source, table["id"], strict=True))


def point_errors(run: Results, row: dict) -> dict:
    """`points` and `caption` of an image, for `figures.contact_sheet`."""
    table = run.of(row["source"])
    table = table[table["id"] == row["id"]]
    prediction, depth = table.prediction.to_numpy(float), table["gt"].to_numpy(float)
    answered = metrics.is_answer(prediction)
    error = log_errors(prediction, depth)
    right = int(metrics.is_right(prediction[answered], depth[answered]).sum())
    worst = int(np.argmax(np.where(answered, np.abs(error), np.inf)))
    answer = f"{prediction[worst]:.2f}" if answered[worst] else table.status.iloc[worst]
    caption = f"{right} of {len(table)} right; worst {answer} for {depth[worst]:.2f} m"
    return {"points": (table.u.to_numpy(float), table.v.to_numpy(float), error), "caption": captioned(row, caption)}


def map_errors(run: Results, row: dict) -> dict:
    """`errors`, or `points` where few pixels have ground truth, and `caption` of an image, from its saved map."""
    file = pyarrow.parquet.ParquetFile(run.folder / "maps" / f"{row['source']}.parquet")
    place = file.read(["id"])["id"].to_pylist().index(row["id"])  # a row group each
    (stored,) = file.read_row_group(place).to_pylist()
    prediction, depth = scoring.stored_map(stored).astype(float), row["depth"] / row["depth_scale"]
    answered = metrics.is_answer(prediction[depth > 0])
    right = metrics.is_right(prediction[depth > 0][answered], depth[depth > 0][answered])
    caption = f"δ1 {right.sum() / len(answered):.3f} of {len(answered)} pixels"
    errors, labelled, shown = log_errors(prediction, depth), depth > 0, {"caption": captioned(row, caption)}
    if labelled.mean() > SPARSE:
        return shown | {"errors": errors, "labelled": labelled}
    v, u = np.nonzero(labelled)  # lidar: single pixels would not be seen
    chosen = np.linspace(0, len(u) - 1, min(len(u), DOTS)).astype(int)
    u, v = u[chosen], v[chosen]
    return shown | {"points": (*change_grid(u, v, depth.shape[::-1], row["size"]), errors[v, u])}


def log_errors(prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """ln(prediction / depth); NaN without an answer or truth."""
    known = metrics.is_answer(prediction) & (depth > 0)
    return np.log(np.where(known, prediction, np.nan)) - np.log(np.where(known, depth, np.nan))


def captioned(row: dict, text: str) -> str:
    name = figures.label(f"{row['source']}/{row['id']}")
    return f"{name}\n{figures.label(text, 60)}"
