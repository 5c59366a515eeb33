"""Tables and figures of results of `python -m bench evaluate`, beside the paper's numbers if asked.

All scores are computed again from the saved predictions, with 95 % intervals (see `intervals`); a folder whose summary
says otherwise is refused. Runs of different protocols (mode, scorer's conventions, choice of points) or of different
data are never put in one table. OUT gets report.md, report.csv, tables.tex, leaderboard.html and the figures.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas

from . import ablate, figures, intervals
from .breakdowns import camera_tables, data_note, depth_tables, entry, evaluated_rows, scene_tables, worst_images
from .files import read_json, write_text
from .paper import MEASURED, read_tables, table_of, vqa_rows
from .results import (
    Group,
    Results,
    best_first,
    best_of,
    check_same_points,
    is_beyond_chance,
    name_apart,
    protocol,
    read_results,
    score_sources,
)
from .tables import Row, Score, Table, csv_value, latex, markdown, markdown_text, page, plain

COLUMNS = ["protocol", "table", "from", "method", "against", "source", "metric", "value", "low", "high", "count"]
COLUMNS += ["images", "images_of", "data"]  # of report.csv
PAGE = 60  # rows of a table that can be printed
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


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="results of `evaluate` -> Markdown, CSV, LaTeX, HTML and figures")
    parser.add_argument("results", nargs="+", metavar="RESULTS", type=Path, help="folders of `evaluate`")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the report")
    parser.add_argument("--paper", action="store_true", help="the paper's tables, its rows beside the measured ones")
    parser.add_argument(
        "--data", metavar="DIR_OR_ID", help="the benchmark that was evaluated, for worst images and cameras"
    )
    parser.add_argument("--efficiency", metavar="FILE", type=Path, help="JSON of `python -m bench.efficiency --output`")
    parser.add_argument("--ablations", metavar="DIR", type=Path, help="the --out of `python -m bench ablate`")
    parser.add_argument("--vqa", metavar="FILE", type=Path, nargs="+", default=[], help="*_results.json of lmms-eval")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
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
    printed = ["% needs \\usepackage{booktabs,graphicx}"]
    for table in (table for _, blocks in tables for table in blocks):
        fits = len(table.rows) <= PAGE
        printed.append(latex(table) if fits else f"% more than {PAGE} rows, in report.csv: {plain(table.title)}")
    write_text(out / "tables.tex", "\n".join(printed))
    lines = [[csv_value(record.get(column)) for column in COLUMNS] for record in records]
    frame = pandas.DataFrame(lines, columns=COLUMNS, dtype=object)  # a count beside None stays a whole number
    write_text(out / "report.csv", frame.to_csv(index=False))


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
    tables = []
    for number, runs in wanted.items():
        runs = [run for run in runs if set(shown[number]) & set(run.scores)]
        tables.append(delta1_table(group, number, shown[number], runs, records))
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
            cells = [scored.score(run, name) for name in names]
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
