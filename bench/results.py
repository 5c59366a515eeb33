"""Folders of `python -m bench evaluate`: read, and checked against their saved predictions.

They may be other people's: nothing in a summary is believed that the predictions can tell.
"""

import hashlib
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas
import pyarrow.parquet

from . import scoring
from .files import read_json
from .manifest import read_record

FILES = {  # mode -> the table of predictions, and the columns of it that are read
    "points": ("predictions.parquet", ["id", "source", "scene", "u", "v", "gt", "prediction", "status"]),
    "dense": ("images.parquet", ["id", "source", "scene", "points", "answered", "delta1"]),
}
TEXT = ("id", "source", "scene", "status")
REMEDY = "run `python -m bench evaluate` again"


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """A folder of `evaluate`. table: predictions.parquet, a row per point; images.parquet, a row per image, if dense.

    scores: source -> `images`, `points`, `counts` and `metrics`, computed from the table.
    """

    folder: Path
    summary: dict
    table: pandas.DataFrame
    scores: dict[str, dict]
    name: str = ""  # as tables name it, unique in a report

    def of(self, source: str) -> pandas.DataFrame:
        return self.table[self.table.source == source]


def read_results(folder: Path) -> Results:
    """A folder of `evaluate`: its summary, and the predictions that it is checked against. Raises ValueError."""
    file = folder / "summary.json"
    summary = read_json(file, "pass a folder that `python -m bench evaluate` has finished")
    check_fields(file, summary)
    try:
        read_record(file)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error
    dense = summary["protocol"]["mode"] == "dense"
    table = read_table(folder, summary)
    file, scores = folder / FILES["dense" if dense else "points"][0], {}
    rows = table.source.value_counts().to_dict()
    stated = {name: source["images" if dense else "points"] for name, source in summary["sources"].items()}
    if rows != stated:
        raise ValueError(f"{file} has rows {rows}, but summary.json counts {stated}; {REMEDY}")
    for name, stated in summary["sources"].items():
        rows = table[table.source == name]
        try:
            if dense:
                scored = scoring.of_images(rows.drop(columns="scene"))
            else:
                scored = scoring.of_points(rows, summary["protocol"]["as_released"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be scored ({error}); {REMEDY}") from error
        scores[name] = {"images": rows["id"].nunique()} | scored
        check_same_scores(file, name, scores[name], stated)
    table = table.astype({column: "category" for column in TEXT if column in table})  # a tenth of the memory
    for metric, stated in summary["mean"].items():
        mean = scoring.mean_or_none([source["metrics"].get(metric) for source in scores.values()])
        if not is_close(mean, stated):
            raise ValueError(f"{file} gives the mean {metric} {mean}, but summary.json says {stated}; {REMEDY}")
    return Results(folder, summary, table, scores)


def check_fields(file: Path, summary) -> None:
    """Raise ValueError for a summary without the fields that a report reads, or with others in their place."""
    if not isinstance(summary, dict) or summary.get("format") != scoring.FORMAT:
        kind = summary.get("format") if isinstance(summary, dict) else type(summary).__name__
        raise ValueError(f"{file} has format {kind!r}, not {scoring.FORMAT!r}; {REMEDY}")
    try:
        FILES[summary["protocol"]["mode"]]
        texts = [summary["contestant"][name] for name in ("title", "model", "group")]
        summary["contestant"]["dense"], summary["protocol"]["as_released"]
        numbers = []
        for name, source in summary["sources"].items():
            data = summary["data"][name]
            texts.append(data["hash"])
            counts = [source["images"], source["points"], data["images_of"], *source["counts"].values()]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError(f"{file} has counts of {name} that are no whole numbers; {REMEDY}")
            numbers += [(name, metric, value) for metric, value in source["metrics"].items()]
            source["metrics"]["delta1"]
        numbers += [("the mean", metric, value) for metric, value in summary["mean"].items()]
        texts += summary["hashes"].values()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} lacks or misstates a field ({error!r}); {REMEDY}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file} has titles or hashes that are no text; {REMEDY}")
    for name, metric, value in numbers:
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{file} has {metric} {value!r} for {name}, which is no number; {REMEDY}")
    if not summary["sources"]:
        raise ValueError(f"{file} has no sources; {REMEDY}")


def read_table(folder: Path, summary: dict) -> pandas.DataFrame:
    """The predictions, if they are those that the summary was made of."""
    name, columns = FILES[summary["protocol"]["mode"]]
    file = folder / name
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != summary["hashes"].get(name):
            raise ValueError(f"its sha256 is not the one in {folder / 'summary.json'}")
        opened = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        names = opened.schema_arrow.names
        table = opened.read(
            [column for column in (columns if name == "predictions.parquet" else names) if column in names]
        )
        table = table.to_pandas()
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{file} cannot be read ({error}); {REMEDY}") from error
    if missing := sorted(set(columns) - set(table.columns)):
        raise ValueError(f"{file} has no columns {', '.join(missing)}; {REMEDY}")
    for column in table:
        if pandas.api.types.is_numeric_dtype(table[column]) == (column in TEXT):
            raise ValueError(f"{file} has a column {column} of {table[column].dtype}; {REMEDY}")
    return table


def check_same_scores(file: Path, source: str, scores: dict, stated: dict) -> None:
    """Raise ValueError where the summary's line of a source is not what the predictions give."""
    same = {name: scores[name] == stated[name] for name in ("images", "points", "counts")}
    same["metrics"] = scores["metrics"].keys() == stated["metrics"].keys() and all(
        is_close(value, stated["metrics"][metric]) for metric, value in scores["metrics"].items()
    )
    for name, equal in same.items():
        if not equal:
            raise ValueError(
                f"{file} gives {name} {scores[name]} for {source}, but summary.json says {stated[name]}; {REMEDY}"
            )


def is_close(value: float | None, other: float | None) -> bool:
    """Equal but for the order of summation, which is the machine's."""
    return value is other is None or None not in (value, other) and math.isclose(value, other, rel_tol=1e-9)


def name_apart(runs: list[Results]) -> list[Results]:
    """Runs with names that no two share: their titles, with the folder where titles repeat."""
    titles = [run.summary["contestant"]["title"] for run in runs]
    names = [
        title if titles.count(title) == 1 else f"{title} ({run.folder})"
        for title, run in zip(titles, runs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"the same folder is given twice: {', '.join(names)}; name each once")
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def protocol(run: Results) -> str:
    """What has to be equal for two runs to stand in one table; the model's dtype and the data's path need not."""
    fields = {key: value for key, value in run.summary["protocol"].items() if key not in ("data", "dtype")}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in fields.items())


def check_same_points(runs: list[Results]) -> None:
    """Raise ValueError unless runs of one protocol scored the same build, and of it the same points or pixels."""
    columns = ["id", "scene", "points"] if "points" in runs[0].table else ["id", "scene", "u", "v", "gt"]
    first = {}
    for run in runs:
        for source in run.scores:
            rows = run.of(source)[columns]
            rows = rows.astype({column: str for column in TEXT if column in rows}).reset_index(drop=True)
            other, expected = first.setdefault(source, (run, rows))
            build, expected_build = (one.summary["data"][source]["hash"] for one in (run, other))
            what = f"builds of {source} ({build} and {expected_build})" if build != expected_build else ""
            what = what or ("" if rows.equals(expected) else f"points of {source}")
            if what:
                raise ValueError(
                    f"{run.folder} and {other.folder} scored different {what}; report them apart, or evaluate both on "
                    "the same build"
                )
