"""Tables and figures of results of `python -m bench evaluate`, beside the paper's numbers if asked.

All scores are computed again from the saved predictions, with 95 % intervals (see `intervals`); a folder whose summary
says otherwise is refused. Runs of different protocols (mode, scorer's conventions, choice of points) or of different
data are never put in one table. OUT gets report.md, report.csv, tables.tex, leaderboard.html and the figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas
import pyarrow.parquet

from . import ablate, figures, intervals, metrics, scoring
from .files import read_json, write_text
from .paper import MEASURED, read_tables, table_of, vqa_rows
from .results import Results, check_same_points, name_apart, protocol, read_results
from .tables import Row, Score, Table, csv_value, latex, markdown, markdown_text, page, plain

if TYPE_CHECKING:
    import datasets

COLUMNS = ["protocol", "table", "from", "method", "against", "source", "metric", "value", "low", "high", "count"]
COLUMNS += ["images", "images_of", "data"]  # of report.csv
DEPTH_EDGES = (0, 1, 2, 3, 5, 10, 20, 40, 80, np.inf)  # metres
RANGES = [f"{low}–{high}" if np.isfinite(high) else f"> {low}" for low, high in pairwise(DEPTH_EDGES)]
WORST = 12  # images of a contact sheet
PAGE = 60  # rows of a table that can be printed
NO_ANSWER = "Points without an answer are wrong for δ1, whatever the protocol."
INTERVALS = (
    f"In brackets: 95 % intervals by {intervals.RESAMPLES} bootstrap resamples of scenes, or of images where no scene "
    f"is known (seed {intervals.SEED})."
)
PAPER = (
    "Rows from 'paper' are the paper's own numbers. It drew other points (and frames) of the same data sets, so that "
    "small differences from 'measured' rows mean nothing."
)
BEST = (
    "Bold: the best measured score of a column, and those that do not differ from it beyond chance (the 95 % interval "
    "of the paired bootstrap holds 0; one pair at a time, without correction for many)."
)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A source's scores by the runs of one protocol that have it: of the same images and points."""

    source: str
    runs: list[Results]
    units: np.ndarray  # (rows of a run's table,) what is resampled, see `intervals.units_of`
    scenes: int  # how many of the units are scenes
    bounds: np.ndarray  # (2, runs, metrics)
    replicates: np.ndarray  # (intervals.RESAMPLES, runs) δ1

    def count(self) -> int:
        return int(self.units.max()) + 1

    def data(self) -> dict:
        return self.runs[0].summary["data"][self.source]

    def coverage(self) -> str:
        """Such as "20/1000 images"; "" where none lacks."""
        images, images_of = self.runs[0].scores[self.source]["images"], self.data()["images_of"]
        return f"{images}/{images_of} images" if images < images_of else ""

    def score(self, run: Results, metric: str) -> Score:
        values = run.scores[self.source]["metrics"]
        low, high = self.bounds[:, self.runs.index(run), list(values).index(metric)]
        return score_of(values[metric], low, high)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Runs of one protocol."""

    number: int
    title: str
    runs: list[Results]
    scored: dict[str, Scored]

    def mode(self) -> str:
        return self.runs[0].summary["protocol"]["mode"]

    def have(self, sources: Sequence[str]) -> list[Results]:
        """The runs that have all the sources."""
        return [run for run in self.runs if all(source in run.scores for source in sources)]

    def replicates(self, run: Results, sources: Sequence[str]) -> np.ndarray:
        """(RESAMPLES,) mean δ1 over the sources; each source is resampled by itself."""
        parts = [self.scored[source] for source in sources]
        return np.mean([part.replicates[:, part.runs.index(run)] for part in parts], axis=0)

    def delta1(self, run: Results, sources: Sequence[str]) -> Score:
        """The unweighted mean over the sources; none where the run lacks one."""
        if run not in self.have(sources):
            return Score(None)
        coverage = self.scored[sources[0]].coverage() if len(sources) == 1 else ""
        bounds = intervals.bounds(self.replicates(run, sources), self.units(sources))
        return score_of(mean_delta1(run, sources), *bounds, coverage=coverage)

    def difference(self, run: Results, other: Results, sources: Sequence[str]) -> Score:
        """δ1 of `run` minus that of `other`, by the paired bootstrap."""
        value = mean_delta1(run, sources) - mean_delta1(other, sources)
        replicates = self.replicates(run, sources) - self.replicates(other, sources)
        return score_of(value, *intervals.bounds(replicates, self.units(sources)))

    def units(self, sources: Sequence[str]) -> int:
        return min(self.scored[source].count() for source in sources)


def mean_delta1(run: Results, sources: Sequence[str]) -> float:
    return statistics.fmean(run.scores[source]["metrics"]["delta1"] for source in sources)


def score_of(value: float | None, low: float, high: float, **fields) -> Score:
    low, high = (float(bound) if np.isfinite(bound) else None for bound in (low, high))
    return Score(value, low, high, **fields)


def is_beyond_chance(difference: Score) -> bool:
    return difference.low is not None and (difference.low > 0 or difference.high < 0)


def add_report(commands) -> None:
    parser = commands.add_parser("report", help="results of `evaluate` -> Markdown, CSV, LaTeX, HTML and figures")
    parser.add_argument("results", nargs="+", metavar="RESULTS", type=Path, help="folders of `evaluate`")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--paper", action="store_true", help="the paper's tables, its rows beside the measured ones")
    parser.add_argument("--data", metavar="DIR_OR_ID", help="what was evaluated: worst images, scores by camera")
    parser.add_argument("--efficiency", metavar="FILE", type=Path, help="JSON of `python -m bench.efficiency --output`")
    parser.add_argument("--ablations", metavar="DIR", type=Path, help="the --out of `python -m bench ablate`")
    parser.add_argument("--vqa", metavar="FILE", type=Path, nargs="+", default=[], help="*_results.json of lmms-eval")
    parser.set_defaults(run=run_report)


def run_report(args) -> int:
    print(report(args.results, args.out, args.paper, args.data, args.efficiency, args.ablations, args.vqa))
    return 0


def report(
    results: list[Path],
    out: Path,
    paper: bool,
    data: str | None = None,
    efficiency: Path | None = None,
    ablations: Path | None = None,
    vqa: Sequence[Path] = (),
) -> Path:
    """
    Write the report of some `evaluate` folders; returns the path of report.md.

    paper: with the paper's tables. data: the built benchmark, for the contact sheets and scores by camera. efficiency:
    a JSON file of `bench.efficiency`. ablations: a folder of `bench ablate`. vqa: result files of lmms-eval. Raises
    ValueError for files that are not what they should be, and for runs of one protocol that scored different points.
    """
    runs = name_apart([read_results(folder) for folder in results])
    by_protocol = {}
    for run in runs:
        by_protocol.setdefault(protocol(run), []).append(run)
    groups = []
    for title, members in by_protocol.items():
        check_same_points(members)
        members = best_first(members)
        groups.append(Group(len(groups) + 1, title, members, score_sources(members)))
    rows = [evaluated_rows(group, data) if data else None for group in groups]
    others, records = other_tables(paper, efficiency, ablations, vqa)

    out.mkdir(parents=True, exist_ok=True)
    notes = [*([PAPER] if paper else []), INTERVALS, BEST]
    sections = []
    with matplotlib.rc_context(figures.STYLE):
        for group, images in zip(groups, rows, strict=True):
            blocks = delta1_tables(group, paper, records) + charts(group, out) + score_table(group, records)
            blocks += pair_table(group, out, records)
            blocks += depth_tables(group, out, records) + scene_tables(group, out, records)
            if images is None:
                blocks.append("Scores by camera and the worst images are left out: give `--data DIR_OR_ID`.")
            else:
                blocks += camera_tables(group, images, records) + worst_images(group, out, images)
            sections.append((f"Protocol {group.number}: {group.title}", blocks))
    sections.append(("Other tables of the paper" if paper else "Other tables", others))
    write(out, notes, sections, records)
    return out / "report.md"


def write(out: Path, notes: list[str], sections: list[tuple[str, list[Table | str]]], records: list[dict]) -> None:
    """A block is a table or, for report.md alone, text in Markdown."""
    lines = ["# Report", *map(markdown_text, notes)]
    for title, blocks in sections:
        lines.append(f"## {markdown_text(title)}")
        lines += [block if isinstance(block, str) else markdown(block) for block in blocks]
    write_text(out / "report.md", "\n\n".join(line.strip() for line in lines) + "\n")
    tables = [(title, [block for block in blocks if isinstance(block, Table)]) for title, blocks in sections]
    write_text(out / "leaderboard.html", page(notes, [(title, blocks) for title, blocks in tables if blocks]))
    printed = ["% needs \\usepackage{booktabs}"]
    for table in (table for _, blocks in tables for table in blocks):
        fits = len(table.rows) <= PAGE
        printed.append(latex(table) if fits else f"% more than {PAGE} rows, in report.csv: {plain(table.title)}")
    write_text(out / "tables.tex", "\n".join(printed))
    lines = [[csv_value(record.get(column)) for column in COLUMNS] for record in records]
    frame = pandas.DataFrame(lines, columns=COLUMNS, dtype=object)  # a count beside None stays a whole number
    write_text(out / "report.csv", frame.to_csv(index=False))


# Scores


def score_sources(runs: list[Results]) -> dict[str, Scored]:
    """Intervals of all scores of some runs of one protocol, by source."""
    scored = {}
    for source in dict.fromkeys(source for run in runs for source in run.scores):
        members = [run for run in runs if source in run.scores]
        units, scenes = intervals.units_of(members[0].of(source))
        names = list(members[0].scores[source]["metrics"])
        sums, finish = [], intervals.means
        for run in members:
            table = run.of(source)
            if run.summary["protocol"]["mode"] == "dense":
                sums.append(intervals.image_sums(table, units, names))
            elif run.summary["protocol"]["as_released"]:
                sums.append(intervals.released_sums(table, units))
            else:
                sums.append(intervals.point_sums(table, units))
                finish = metrics.from_sums
        replicates = finish(intervals.resample(np.stack(sums, axis=1), source))
        bounds = intervals.bounds(replicates, int(units.max()) + 1)
        scored[source] = Scored(source, members, units, scenes, bounds, replicates[..., names.index("delta1")].copy())
    return scored


def best_first(runs: list[Results]) -> list[Results]:
    """By the mean δ1 over the sources that all have; as given where they share none."""
    shared = [source for source in runs[0].scores if all(source in run.scores for run in runs)]
    return sorted(runs, key=lambda run: -mean_delta1(run, shared)) if shared else runs


def best_of(group: Group, runs: list[Results], sources: Sequence[str]) -> dict[str, Score]:
    """Name of a run -> its δ1, the mean over `sources`; with a mark on the best, and on what may equal it."""
    scores = {run.name: group.delta1(run, sources) for run in runs}
    members = [run for run in runs if scores[run.name].value is not None]
    if len(members) > 1:
        top = max(members, key=lambda run: scores[run.name].value)
        for run in members:
            if run is top or not is_beyond_chance(group.difference(top, run, sources)):
                scores[run.name] = replace(scores[run.name], best=True)
    return scores


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


# Tables of scores


def delta1_tables(group: Group, paper: bool, records: list[dict]) -> list[Table]:
    """Tables 1 and 2 (or the full-map one) with the paper's rows, and what is in none of them."""
    present = list(group.scored)
    if not paper:
        return [delta1_table(group, None, present, group.runs, records)]
    wanted = {"2-full-map": group.runs}
    if group.mode() == "points":
        wanted = {"1": group.runs, "2": [run for run in group.runs if run.summary["contestant"]["dense"]]}
    shown = {number: read_tables()[number]["columns"][:-1] for number in wanted}
    tables = [delta1_table(group, number, shown[number], runs, records) for number, runs in wanted.items()]
    if rest := [source for source in present if all(source not in sources for sources in shown.values())]:
        tables.append(delta1_table(group, None, rest, group.runs, records, ", sources that no table above has"))
    return tables


def delta1_table(
    group: Group, number: str | None, sources: list[str], runs: list[Results], records: list[dict], remark: str = ""
) -> Table:
    present = [source for source in sources if source in group.scored]
    columns = [best_of(group, runs, [source]) if source in present else {} for source in sources]
    names = [*sources, "mean"] if number or len(sources) > 1 else sources
    if len(names) > len(sources):
        columns.append(best_of(group, runs, sources) if present == sources else {})
    rows = []
    for run in runs:
        cells = [column.get(run.name, Score(None)) for column in columns]
        rows.append(Row([MEASURED, run.name], cells, run.summary["contestant"]["group"], bold=True))
    notes = [data_note(group, present)] if present else []
    if "mean" in names and any(row.cells[-1].value is None for row in rows):
        notes.append("A mean is given where all sources of the table are there: it is over all of them, unweighted.")
    table = Table(f"δ1{remark}", ["from", "method"], names, rows, notes)
    if number:
        table = table_of(number, rows, notes)
    table = replace(table, shaded=True)
    for row in table.rows:
        line = {"protocol": group.number, "table": table.title, "from": row.labels[0], "method": row.labels[1]}
        for source, cell in zip(table.columns, row.cells, strict=True):
            records.append(line | {"source": source, "metric": "delta1", "value": cell.value})
            run = next((run for run in runs if not row.published and run.name == row.labels[1]), None)
            if run is not None:
                records[-1] = entry(group, table.title, run, source, "delta1", cell)
    return table


def score_table(group: Group, records: list[dict]) -> list[Table]:
    """Every metric and count of every run and source."""
    names = list(dict.fromkeys(m for run in group.runs for scores in run.scores.values() for m in scores["metrics"]))
    rows = []
    for source, scored in group.scored.items():
        for run in scored.runs:
            scores = run.scores[source]
            cells = [scored.score(run, name) if name in scores["metrics"] else Score(None) for name in names]
            counts = ", ".join(f"{count} {status}" for status, count in scores["counts"].items())
            images = f"{scores['images']} of {scored.data()['images_of']}"
            rows.append(Row([source, run.name], [images, counts, *cells]))
            for name, cell in zip(names, cells, strict=True):
                records.append(entry(group, "scores", run, source, name, cell, count=scores["points"]))
    if group.runs[0].summary["protocol"]["as_released"]:
        note = "As released: points without an answer leave the mean; an image with none left counts 0."
    else:
        note = "Points without an answer are wrong for δ; errors are over the answered ones."
        note += " Means of the images' scores." if group.mode() == "dense" else ""
    notes = [note, data_note(group, list(group.scored))]
    return [Table("All scores", ["source", "method"], ["images", "points", *names], rows, notes)]


def pair_table(group: Group, out: Path, records: list[dict]) -> list[Table | str]:
    """Differences in δ1 of all pairs of runs, on each source and in the mean over those that all runs have."""
    if len(group.runs) < 2:
        return []
    shared = [source for source in group.scored if group.have([source]) == group.runs]
    columns = {source: [source] for source in group.scored} | ({"mean": shared} if len(shared) > 1 else {})
    rows, matrix = [], {}
    for run, other in combinations(group.runs, 2):
        cells = []
        for column, sources in columns.items():
            both = run in group.have(sources) and other in group.have(sources)
            cell = group.difference(run, other, sources) if both else Score(None)
            cells.append(replace(cell, best=is_beyond_chance(cell)))
            if both:
                records.append(entry(group, "pairs", run, column, "delta1", cell, against=other.name))
        rows.append(Row([f"{run.name} − {other.name}"], cells))
        if shared:
            matrix[run.name, other.name] = cells[list(columns).index("mean" if len(shared) > 1 else shared[0])]
    notes = ["By the paired bootstrap. Bold: beyond chance, one pair at a time."]
    if len(shared) > 1:
        notes.append(f"The mean is over {', '.join(shared)}.")
    notes.append(data_note(group, list(group.scored)))
    table = Table("Differences in δ1", ["methods"], list(columns), rows, notes)
    if not shared:
        return [table]
    names = [run.name for run in group.runs]
    values, beyond = np.zeros((2, len(names), len(names)))
    for (name, other), cell in matrix.items():
        place = names.index(name), names.index(other)
        values[place], values[place[::-1]] = cell.value, -cell.value
        beyond[place] = beyond[place[::-1]] = cell.best
    file = figures.save(figures.pair_matrix(names, values, beyond.astype(bool)), out, f"pairs-{group.number}")
    caption = f"Row less column, in hundredths of δ1, mean over {', '.join(shared)}; blank: not beyond chance."
    return [table, f"![differences in δ1]({file})", markdown_text(caption)]


def charts(group: Group, out: Path) -> list[str]:
    """Heat map and intervals of δ1, contestant by source."""
    sources = list(group.scored)
    columns = {source: [source] for source in sources} | ({"mean": sources} if len(sources) > 1 else {})
    cells = [best_of(group, group.runs, wanted) for wanted in columns.values()]
    names = [run.name for run in group.runs]

    def matrix(read):
        values = [[read(column[name]) for column in cells] for name in names]
        return np.array(values, dtype=float)  # None: NaN

    values, bounds = matrix(lambda cell: cell.value), [matrix(lambda cell: cell.low), matrix(lambda cell: cell.high)]
    heat = figures.heat_map(names, list(columns), values, matrix(lambda cell: cell.best).astype(bool))
    forest = figures.forest(names, list(columns), values, np.stack(bounds))
    files = [figures.save(heat, out, f"delta1-{group.number}"), figures.save(forest, out, f"intervals-{group.number}")]
    return [f"![δ1 by contestant and source]({files[0]})", f"![δ1 with 95 % intervals]({files[1]})"]


# Breakdowns


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
    from .rows import contents_of, open_sources  # here: it imports transformers, which takes seconds

    opened = open_sources(data, list(group.scored))
    contents = contents_of(data, opened, group.runs[0].summary["protocol"]["as_released"])
    for source, scored in group.scored.items():
        evaluated, given = scored.data()["hash"], contents[source].hash
        if evaluated != given:
            raise ValueError(
                f"{scored.runs[0].folder} was evaluated on other rows of {source} (hash {evaluated[:12]}) than {data} "
                f"holds ({given[:12]}); pass --data with the former"
            )
    return opened


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
    """`errors` and `caption` of an image, from its saved map."""
    file = pyarrow.parquet.ParquetFile(run.folder / "maps" / f"{row['source']}.parquet")
    place = file.read(["id"])["id"].to_pylist().index(row["id"])  # a row group each
    (stored,) = file.read_row_group(place).to_pylist()
    prediction, depth = scoring.stored_map(stored).astype(float), row["depth"] / row["depth_scale"]
    answered = metrics.is_answer(prediction[depth > 0])
    right = metrics.is_right(prediction[depth > 0][answered], depth[depth > 0][answered])
    caption = f"δ1 {right.sum() / len(answered):.3f} of {len(answered)} pixels"
    return {"errors": log_errors(prediction, depth), "labelled": depth > 0, "caption": captioned(row, caption)}


def log_errors(prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """ln(prediction / depth); NaN without an answer or truth."""
    known = metrics.is_answer(prediction) & (depth > 0)
    return np.log(np.where(known, prediction, np.nan)) - np.log(np.where(known, depth, np.nan))


def captioned(row: dict, text: str) -> str:
    name = figures.label(f"{row['source']}/{row['id']}")
    return f"{name}\n{figures.label(text, 60)}"


# Tables of other results


def other_tables(
    paper: bool, efficiency: Path | None, ablations: Path | None, vqa: Sequence[Path]
) -> tuple[list[Table | str], list[dict]]:
    """Tables 3 to 8 of the paper, as far as they are asked for or measured, and their lines of report.csv."""
    blocks = []
    if paper or vqa:
        blocks.append(table_of("3", vqa_rows(vqa)) if paper else replace(table_of("3"), rows=vqa_rows(vqa)))
    measured = ablate.read_records(ablations) if ablations else {}
    for number in ablate.TABLES:
        if number in measured:
            blocks.append(ablate.comparison(number, measured[number]))
        elif paper:
            blocks.append(table_of(str(number)))
    if paper or efficiency:
        blocks += efficiency_tables(paper, efficiency)
    records = []
    for table in blocks:
        if isinstance(table, str):
            continue
        for row in table.rows:
            origin = row.labels[0] if len(row.labels) > 1 else ""
            for column, cell in zip(table.columns, row.cells, strict=True):
                if isinstance(cell, Score):
                    line = {"table": table.title, "from": origin, "method": row.labels[-1], "metric": column}
                    records.append(line | {"value": cell.value})
    return blocks, records


def efficiency_tables(paper: bool, file: Path | None) -> list[Table | str]:
    table = table_of("8")
    table = replace(table, columns=["median s", "p95 s", "rounds", "ratio"], rows=table.rows if paper else [])
    rows = [replace(row, cells=[*row.cells, "-", "-", "-"]) for row in table.rows]
    if file is None:
        left_out = "Nothing measured: give --efficiency FILE, of `python -m bench.efficiency --output FILE`."
        return [replace(table, rows=rows, notes=[*table.notes, left_out])]
    timings = read_efficiency(file)
    settings = {key: value for key, value in timings.items() if not isinstance(value, dict)}
    settings |= timings.get("machine", {})
    notes = [*table.notes, ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())]
    ratios, others = timings.get("ratios", {}), timings.get("alternatives", {})
    for name, samples in timings["seconds"].items():
        medians = [Score(float(value), decimals=None) for value in np.percentile(samples, (50, 95))]
        ratio = f"{ratios[name]:.3f} of {others.get(name, 'its alternative')}" if name in ratios else "-"
        cells = [*medians, str(len(samples)), ratio]
        rows.append(Row([MEASURED, name], cells))
    for name, seconds in timings.get("extrapolated", {}).items():
        rows.append(Row(["extrapolated", name], [Score(seconds, decimals=None), "-", "-", "-"]))
    for name, peak in timings.get("peak_bytes", {}).items():
        notes.append(f"Peak memory of {name}: {peak / 2**30:.2f} GiB.")
    return [replace(table, rows=rows, notes=notes)]


def read_efficiency(file: Path) -> dict:
    remedy = "write it with `python -m bench.efficiency --output FILE`"
    timings = read_json(file, remedy)
    seconds = timings.get("seconds") if isinstance(timings, dict) else None
    if not isinstance(seconds, dict) or not all(
        isinstance(samples, list) and samples and all(isinstance(second, int | float) for second in samples)
        for samples in seconds.values()
    ):
        raise ValueError(f"{file} has no lists of seconds by contestant; {remedy}")
    return timings
