"""Folders of `python -m bench evaluate`: read, and checked against their saved predictions.

They may be other people's: nothing in a summary is believed that the predictions can tell.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas
import pyarrow.parquet

from . import scoring

COLUMNS = {  # mode -> those that are read, and have to be there; a table of images has other scores too
    "points": ["id", "source", "scene", "u", "v", "gt", "prediction", "status"],
    "dense": ["id", "source", "scene", "points", "answered", "delta1"],
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
    summary = scoring.read_summary(folder)
    check_fields(folder / "summary.json", summary)
    mode = summary["protocol"]["mode"]
    file = folder / scoring.table_file(mode)
    table = read_table(file, mode)
    rows = table.source.value_counts().to_dict()
    stated = {name: source["images" if mode == "dense" else "points"] for name, source in summary["sources"].items()}
    if rows != stated:
        raise ValueError(f"{file} has rows {rows}, but summary.json counts {stated}; {REMEDY}")
    try:
        scores = scoring.of_sources(table, list(summary["sources"]), mode, summary["protocol"]["as_released"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be scored ({error}); {REMEDY}") from error
    for difference in differences(scores, {name: summary[name] for name in scores}):
        raise ValueError(f"{file} gives {difference}; {REMEDY}")
    table = table.astype({column: "category" for column in TEXT if column in table})  # a tenth of the memory
    return Results(folder, summary, table, scores["sources"])


def check_fields(file: Path, summary: dict) -> None:
    """Raise ValueError for a summary without the fields that a report reads, or with others in their place."""
    try:
        COLUMNS[summary["protocol"]["mode"]]
        summary["contestant"]["dense"], summary["protocol"]["as_released"], summary["mean"]["delta1"]
        summary["hashes"][scoring.table_file(summary["protocol"]["mode"])]
        texts = [summary["contestant"][name] for name in ("title", "group")]
        for name, source in summary["sources"].items():
            data = summary["data"][name]
            texts.append(data["hash"])
            counts = [source["images"], source["points"], data["images_of"]]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError(f"{file} has counts of {name} that are no whole numbers; {REMEDY}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} lacks or misstates a field ({error!r}); {REMEDY}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file} has a title, group or hash that is no text; {REMEDY}")
    if not summary["sources"]:
        raise ValueError(f"{file} has no sources; {REMEDY}")


def read_table(file: Path, mode: str) -> pandas.DataFrame:
    """Predictions or images, with the columns that a report reads."""
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:  # not read_parquet, to which folders named a=b are columns
            names = opened.schema_arrow.names
            wanted = [name for name in names if mode == "dense" or name in COLUMNS[mode]]  # not the replies
            table = opened.read(wanted).to_pandas()
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{file} cannot be read ({error}); {REMEDY}") from error
    if missing := sorted(set(COLUMNS[mode]) - set(names)):
        raise ValueError(f"{file} has no columns {', '.join(missing)}; {REMEDY}")
    for column in table:
        if pandas.api.types.is_numeric_dtype(table[column]) == (column in TEXT):
            raise ValueError(f"{file} has a column {column} of {table[column].dtype}; {REMEDY}")
    return table


def differences(computed, stated, name: str = "") -> Iterator[str]:
    """Where a summary's scores are not those of the predictions, but for the order of summation."""
    if isinstance(computed, dict) and isinstance(stated, dict):
        for key in dict.fromkeys([*computed, *stated]):
            yield from differences(computed.get(key), stated.get(key), f"{name} {key}".strip())
    elif not (
        computed is stated is None
        or isinstance(computed, int | float)
        and isinstance(stated, int | float)
        and math.isclose(computed, stated, rel_tol=1e-9)
    ):
        yield f"{name} {computed}, but summary.json says {stated!r}"


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
