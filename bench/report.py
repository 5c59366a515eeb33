"""Tables and figures of results of `python -m bench evaluate`, beside the paper's numbers if asked.

OUT gets report.md, report.csv and the PNG files that report.md shows. Runs of different protocols (mode, scorer's
conventions, choice of points) are never put in one table.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .scoring import FORMAT
from .tables import markdown

PAPER = Path(__file__).with_name("paper_results.json")
POINT_COLUMNS = ["id", "source", "u", "v", "gt", "prediction", "status"]
DEPTH_EDGES = (0, 1, 2, 3, 5, 10, 20, 40, 80, np.inf)  # metres
WORST = 12  # images of a contact sheet
COLUMNS = ["protocol", "table", "from", "method", "source", "metric", "value", "count"]  # of report.csv


@dataclass(frozen=True, slots=True)
class Results:
    """A folder of `evaluate`. table: predictions.parquet, a row a point; images.parquet, a row an image, if dense."""

    folder: Path
    summary: dict
    table: pandas.DataFrame
    name: str = ""  # as tables name it, unique in a report

    def score(self, source: str, metric: str = "delta1") -> float | None:
        return self.summary["sources"].get(source, {}).get("metrics", {}).get(metric)


def add_report(commands) -> None:
    parser = commands.add_parser("report", help="results of `evaluate` -> Markdown, CSV and PNG")
    parser.add_argument("results", nargs="+", metavar="RESULTS", type=Path, help="folders of `evaluate`")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--paper", action="store_true", help="the paper's rows beside the measured ones")
    parser.add_argument("--data", metavar="DIR_OR_ID", help="what was evaluated, for pictures of the worst images")
    parser.add_argument("--efficiency", metavar="FILE", type=Path, help="JSON of `python -m bench.efficiency --output`")
    parser.set_defaults(run=run_report)


def run_report(args) -> int:
    print(report(args.results, args.out, args.paper, args.data, args.efficiency))
    return 0


def report(
    results: list[Path], out: Path, paper: bool, data: str | None = None, efficiency: Path | None = None
) -> Path:
    """
    Write the report of some `evaluate` folders; returns the path of report.md.

    data: the built benchmark, for the contact sheets. efficiency: a JSON file of `bench.efficiency`. Raises ValueError
    for files that are not what they should be, and for runs of one protocol that scored different points.
    """
    runs = name_apart([read_results(folder) for folder in results])
    timings = read_efficiency(efficiency) if efficiency else None
    published = json.loads(PAPER.read_text()) if paper else {}
    groups = {}
    for run in runs:
        groups.setdefault(protocol(run), []).append(run)
    for group in groups.values():
        check_same_points(group)

    out.mkdir(parents=True, exist_ok=True)
    lines, records = ["# Report\n"], []
    if paper:
        lines.append(
            "Rows from 'paper' are the paper's own numbers. It drew other points (and frames) of the same data sets, "
            "so that small differences from 'measured' rows mean nothing.\n"
        )
    for number, (key, group) in enumerate(groups.items(), 1):
        lines.append(f"## Protocol {number}: {key}\n")
        lines += delta1_tables(group, published, number, records)
        lines += score_table(group, number, records)
        lines += bars(group, out / f"sources-{number}.png")
        if group[0].summary["protocol"]["mode"] == "points":
            lines += depth_ranges(group, out / f"depth-{number}.png", number, records)
            lines += worst_images(group, out, number, data)
        else:
            lines.append("Error by depth range and the worst images need results of `--mode points`.\n")
    lines += efficiency_table(timings, published, records)
    frame = pandas.DataFrame(records, columns=COLUMNS, dtype=object)  # a count beside None stays a whole number
    frame.to_csv(out / "report.csv", index=False, lineterminator="\r\n")
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    return out / "report.md"


# Reading


def read_results(folder: Path) -> Results:
    """A folder of `evaluate`, checked. Raises ValueError."""
    file = folder / "summary.json"
    summary = read_json(file, "pass a folder that `python -m bench evaluate` has finished")
    remedy = "run `python -m bench evaluate` again"
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        found = summary.get("format") if isinstance(summary, dict) else type(summary).__name__
        raise ValueError(f"{file} has format {found!r}, not {FORMAT!r}; {remedy}")
    try:
        dense = {"points": False, "dense": True}[summary["protocol"]["mode"]]
        for field in ("title", "model", "dense"):
            summary["contestant"][field]
        bool(summary["protocol"]["as_released"])
        for name, source in summary["sources"].items():
            counts = [source["images"], source["points"], *source["counts"].values()]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError(f"{file} has counts of {name} that are no whole numbers; {remedy}")
            for metric, value in [("delta1", source["metrics"]["delta1"]), *source["metrics"].items()]:
                if value is not None and not isinstance(value, int | float):
                    raise ValueError(f"{file} has {metric} {value!r} for {name}, which is no number; {remedy}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} lacks or misstates a field ({error!r}); {remedy}") from error
    if not summary["sources"]:
        raise ValueError(f"{file} has no sources; {remedy}")

    file = folder / ("images.parquet" if dense else "predictions.parquet")
    try:
        table = pandas.read_parquet(file)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{file} cannot be read ({error}); {remedy}") from error
    if missing := sorted(set(["id", "source"] if dense else POINT_COLUMNS) - set(table.columns)):
        raise ValueError(f"{file} has no columns {', '.join(missing)}; {remedy}")
    rows = table.source.value_counts().to_dict()
    told = {name: source["images" if dense else "points"] for name, source in summary["sources"].items()}
    if rows != told:
        raise ValueError(f"{file} has rows {rows}, but summary.json counts {told}; {remedy}")
    return Results(folder, summary, table)


def read_json(file: Path, remedy: str):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); {remedy}") from error


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


def name_apart(runs: list[Results]) -> list[Results]:
    """Runs with names that no two share: their titles, with the folder where titles repeat."""
    titles = [run.summary["contestant"]["title"] for run in runs]
    names = [
        title if titles.count(title) == 1 else f"{title} ({run.folder})"
        for title, run in zip(titles, runs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"the same folder is given twice: {', '.join(names)}; name each once")
    return [Results(run.folder, run.summary, run.table, name) for run, name in zip(runs, names, strict=True)]


def protocol(run: Results) -> str:
    """What has to be equal for two runs to stand in one table, in words; the model's dtype and data's path are not."""
    fields = {key: value for key, value in run.summary["protocol"].items() if key not in ("data", "dtype")}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in fields.items())


def check_same_points(group: list[Results]) -> None:
    """Runs of one protocol must have scored the same: the same points, or images with as many pixels."""
    dense = group[0].summary["protocol"]["mode"] == "dense"
    columns = ["id", "points"] if dense else ["id", "u", "v", "gt"]
    first = {}
    for run in group:
        for name in run.summary["sources"]:
            own = run.table[run.table.source == name].reindex(columns=columns).reset_index(drop=True)
            other, there = first.setdefault(name, (run, own))
            if not own.equals(there):
                raise ValueError(
                    f"{run.folder} and {other.folder} scored different points of {name}; report them apart, or "
                    "evaluate both on the same build"
                )


# Tables


def delta1_tables(group: list[Results], published: dict, number: int, records: list) -> list[str]:
    """Tables 1 and 2 (or the full-map one) with the paper's rows, and what is in none of them."""
    present = list(dict.fromkeys(name for run in group for name in run.summary["sources"]))
    if not published:
        return delta1_table("δ1", group, present, [], number, records)
    lines = []
    if group[0].summary["protocol"]["mode"] == "dense":
        wanted = {"2-full-map": group}
    else:
        wanted = {"1": group, "2": [run for run in group if run.summary["contestant"]["dense"]]}
    for table, members in wanted.items():
        sources, rows = published[table]["columns"][:-1], published[table]["rows"]
        title = f"δ1, {'over full maps' if table == '2-full-map' else f'table {table} of the paper'}"
        title += f": {published[table]['title']}"
        lines += delta1_table(
            title,
            members,
            sources,
            rows,
            number,
            records,
            published[table].get("note"),
            published[table].get("from", "paper"),
        )
    shown = {name for table in wanted for name in published[table]["columns"]}
    if rest := [name for name in present if name not in shown]:
        lines += delta1_table("δ1, sources that no table above has", group, rest, [], number, records)
    return lines


def delta1_table(title, runs, sources, paper_rows, number, records, note=None, origin="paper") -> list[str]:
    rows = [(origin, row["method"], row["values"]) for row in paper_rows]
    for run in runs:
        values = [run.score(name) for name in sources]
        rows.append(("measured", run.name, [*values, None if None in values else statistics.fmean(values)]))
    lines = [f"### {title}\n", *([f"{note}\n"] if note else [])]
    if runs and any(values[-1] is None for kind, _, values in rows if kind == "measured"):
        lines.append("A mean is given where all sources of the table are there: it is over all of them, unweighted.\n")
    for kind, method, values in rows:
        for source, value in zip([*sources, "mean"], values, strict=True):
            records.append((number, title, kind, method, source, "delta1", value, None))
    cells = [[kind, escape(method), *map(three_digits, values)] for kind, method, values in rows]
    for row in cells:
        if row[0] == "measured":
            row[1] = f"**{row[1]}**"
    return [*lines, markdown(["from", "method", *sources, "mean"], cells, labels=2)]


def score_table(group: list[Results], number: int, records: list) -> list[str]:
    """Every metric and count of every run and source."""
    sources = [source for run in group for source in run.summary["sources"].values()]
    metrics = list(dict.fromkeys(name for source in sources for name in source["metrics"]))
    rows = []
    for run in group:
        for name, source in run.summary["sources"].items():
            values = [source["metrics"].get(metric) for metric in metrics]
            counts = ", ".join(f"{count} {status}" for status, count in source["counts"].items())
            rows.append([escape(run.name), name, source["images"], counts, *map(three_digits, values)])
            for metric, value in zip(metrics, values, strict=True):
                records.append((number, "scores", "measured", run.name, name, metric, value, source["points"]))
    told = group[0].summary["protocol"]
    if told["as_released"]:
        note = "As released: points without an answer leave the mean; an image with none left counts 0."
    else:
        note = "Points without an answer are wrong for δ; errors are over the answered ones."
        note += " Means of the images' scores." if told["mode"] == "dense" else ""
    return [
        "### All scores\n",
        f"{note}\n",
        markdown(["method", "source", "images", "points", *metrics], rows, labels=2),
    ]


def efficiency_table(timings: dict | None, published: dict, records: list) -> list[str]:
    lines = ["## Efficiency (the paper's table 8)\n"]
    if published:
        lines.append(f"{published['8']['note']}\n")
    if timings is None:
        return [*lines, "Left out: give `--efficiency FILE`, of `python -m bench.efficiency --output FILE`.\n"]
    settings = {key: value for key, value in timings.items() if not isinstance(value, dict)}
    settings |= timings.get("machine", {})
    lines.append(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()) + "\n")
    ratios, others, rows = timings.get("ratios", {}), timings.get("alternatives", {}), []
    for kind, method in [("paper", row["method"]) for row in published.get("8", {}).get("rows", [])]:
        rows.append([kind, method, "-", "-", "-", "-"])
        records.append(("", "efficiency", kind, method, "", "seconds", None, None))
    for name, samples in timings["seconds"].items():
        median = statistics.median(samples)
        rows.append(["measured", escape(name), f"{median:.4g}", f"{np.percentile(samples, 95):.4g}", len(samples)])
        rows[-1].append(f"{ratios[name]:.3f} of {others.get(name, 'its alternative')}" if name in ratios else "-")
        records.append(("", "efficiency", "measured", name, "", "seconds", median, len(samples)))
    for name, seconds in timings.get("extrapolated", {}).items():
        rows.append(["extrapolated", escape(name), f"{seconds:.4g}", "-", "-", "-"])
        records.append(("", "efficiency", "extrapolated", name, "", "seconds", seconds, None))
    for name, peak in timings.get("peak_bytes", {}).items():
        lines.append(f"Peak memory of {escape(name)}: {peak / 2**30:.2f} GiB.\n")
        records.append(("", "efficiency", "measured", name, "", "peak bytes", peak, None))
    return [*lines, markdown(["from", "what", "median s", "p95 s", "rounds", "ratio"], rows, labels=2)]


def escape(text: str) -> str:
    """Text of a results file, for a cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


# Pictures


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure


def bars(group: list[Results], file: Path) -> list[str]:
    """δ1 of each run on each source; a run without the source has no bar."""
    sources = list(dict.fromkeys(name for run in group for name in run.summary["sources"]))
    figure = new_figure(8, 1.4 + 0.28 * len(sources) * (len(group) + 0.6))
    axes, width = figure.add_subplot(), 0.8 / len(group)
    for index, run in enumerate(group):
        places = [place for place, name in enumerate(sources) if run.score(name) is not None]
        values = [run.score(sources[place]) for place in places]
        offsets = np.array(places) + (index - (len(group) - 1) / 2) * width
        drawn = axes.barh(offsets, values, width, label=plain(run.name), color=colour(index))
        axes.bar_label(drawn, [f"{value:.3f}" for value in values], padding=2, fontsize=8)
    axes.set(yticks=range(len(sources)), yticklabels=sources, xlim=(0, 1.08), xlabel="δ1", title="δ1 by source")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=min(len(group), 3), fontsize=8)
    figure.savefig(file)
    return [f"![δ1 by source]({file.name})\n"]


def depth_ranges(group: list[Results], file: Path, number: int, records: list) -> list[str]:
    """δ1 and AbsRel over ranges of the true depth, pooled over the sources that all runs have."""
    from . import metrics

    shared = [name for name in group[0].summary["sources"] if all(name in run.summary["sources"] for run in group)]
    if not shared:
        return ["Error by depth range is left out: these runs share no source.\n"]
    ranges = list(zip(DEPTH_EDGES[:-1], DEPTH_EDGES[1:], strict=True))
    labels = [f"{low}–{high}" if np.isfinite(high) else f"> {low}" for low, high in ranges]
    figure, rows = new_figure(8, 6.5), []
    upper, lower = figure.subplots(2, 1, sharex=True)
    for index, run in enumerate(group):
        table = run.table[run.table.source.isin(shared)]
        scores = []
        for low, high in ranges:
            own = table[(table["gt"] > low) & (table["gt"] <= high)]
            scores.append(metrics.scores(own.prediction.to_numpy(float), own["gt"].to_numpy(float)))
        counts = [score["points"] for score in scores]
        for label, score in zip(labels, scores, strict=True):
            rows.append([escape(run.name), label, score["points"], score["answered"]])
            rows[-1] += [three_digits(score[metric]) for metric in ("delta1", "abs_rel")]
            for metric in ("delta1", "abs_rel"):
                row = (number, f"depth {label} m", "measured", run.name, "+".join(shared), metric)
                records.append((*row, score[metric], score["points"]))
        for axes, metric in ((upper, "delta1"), (lower, "abs_rel")):
            values = [np.nan if score[metric] is None else score[metric] for score in scores]
            axes.plot(labels, values, "o-", color=colour(index), label=plain(run.name))
    upper.set(ylabel="δ1", ylim=(-0.03, 1.03), title=f"By true depth: {', '.join(shared)}")
    lower.set(ylabel="AbsRel of answered points", xlabel="true depth in metres, and number of points")
    lower.set_ylim(bottom=0)
    lower.set_xlim(-0.5, len(labels) - 0.5)
    lower.set_xticks(range(len(labels)), [f"{label}\n{count}" for label, count in zip(labels, counts, strict=True)])
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(group), 3), fontsize=8)
    figure.savefig(file)
    header = ["method", "true depth, m", "points", "answered", "delta1", "abs_rel"]
    note = "Here points without an answer are wrong for δ1, whatever the protocol.\n"
    return ["### By depth\n", note, f"![by depth]({file.name})\n", markdown(header, [row for row in rows if row[2]], 2)]


def worst_images(group: list[Results], out: Path, number: int, data: str | None) -> list[str]:
    if data is None:
        return ["The worst images are left out: give `--data DIR_OR_ID`, what was evaluated.\n"]
    lines = ["### Worst images\n", "Lowest δ1 first, then by the mean of |ln p - ln d|. Green: right; red: wrong.\n"]
    for index, run in enumerate(group, 1):
        file = out / f"worst-{number}-{index}.png"
        contact_sheet(run, data, worst_first(run.table)[:WORST], file)
        lines.append(f"{escape(run.name)}:\n\n![worst images of {escape(run.name)}]({file.name})\n")
    return lines


def is_right(table: pandas.DataFrame) -> np.ndarray:
    ratio = np.maximum(table.prediction / table["gt"], table["gt"] / table.prediction)
    return ((ratio < 1.25) & (table.prediction > 0)).to_numpy()


def worst_first(table: pandas.DataFrame) -> list[tuple[str, str]]:
    """(source, id) of all images; no answer at all is worst."""
    answered = table.prediction.where((table.prediction > 0) & np.isfinite(table.prediction))
    error = (np.log(answered) - np.log(table["gt"])).abs()
    scored = table[["source", "id"]].assign(right=is_right(table), error=error)
    means = scored.groupby(["source", "id"], sort=True)[["right", "error"]].mean()
    means = means.assign(error=means.error.fillna(np.inf))
    return list(means.sort_values(["right", "error"], ascending=[True, False], kind="stable").index)


def contact_sheet(run: Results, data: str, images: list[tuple[str, str]], file: Path) -> None:
    """Images with their points in a grid. Raises ValueError where `data` has not what was evaluated."""
    from .rows import open_test_rows

    columns = min(4, len(images))
    figure = new_figure(3.4 * columns, 3.1 * -(-len(images) // columns) + 0.4)
    opened = {}
    for place, (source, name) in enumerate(images, 1):
        if source not in opened:
            rows = open_test_rows(data, source)
            if rows is None:
                raise ValueError(f"{data} has no test rows of {source}; pass --data that {run.folder} was made from")
            opened[source] = rows, {own: index for index, own in enumerate(rows.select_columns(["id"])["id"])}
        rows, index = opened[source]
        if name not in index:
            raise ValueError(f"{data} has no image {name!r} in {source}; pass --data that {run.folder} was made from")
        own = run.table[(run.table.source == source) & (run.table["id"] == name)]
        right = is_right(own)
        axes = figure.add_subplot(-(-len(images) // columns), columns, place)
        axes.imshow(rows[index[name]]["image"].convert("RGB"))
        axes.scatter(own.u, own.v, s=14, c=np.where(right, "lime", "red"), edgecolors="white", linewidths=0.4)
        worst = own.assign(error=(own.prediction.clip(lower=1e-6) / own["gt"]).pipe(np.log).abs().fillna(np.inf))
        worst = worst.loc[worst.error.idxmax()]
        said = f"{worst.prediction:.2f}" if np.isfinite(worst.prediction) else worst.status
        counts = f"{right.sum()} of {len(own)} right; worst {said} for {worst['gt']:.2f} m"
        axes.set_title(f"{plain(source)}/{plain(name)[-28:]}\n{counts}", fontsize=7.5)
        axes.set_axis_off()
    figure.suptitle(plain(run.name), fontsize=10)
    figure.savefig(file)


def colour(index: int) -> str:
    return f"C{index % 10}"


def plain(text: str) -> str:
    """Text of a results file, for a figure: no mathematics in it."""
    return " ".join(text.split()).replace("$", r"\$")
