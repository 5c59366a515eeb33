"""Folders of `python -m bench evaluate`: read, checked against their saved predictions, and scored with intervals.

They may be other people's: nothing in a summary is believed that the predictions can tell.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet

from . import intervals, metrics, scoring
from .tables import Score

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
    for name, source in scores["sources"].items():
        if source["metrics"]["delta1"] is None:
            raise ValueError(f"{file} scores nothing of {name}; run `python -m bench evaluate` without it")
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


def differences(computed: object, stated: object, name: str = "") -> Iterator[str]:
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


# Scores


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A source's scores by the runs of one protocol that have it: of the same images and points."""

    source: str
    runs: list[Results]
    units: np.ndarray  # (rows of a run's table,) what is resampled, see `intervals.units_of`
    scenes: int  # how many of the units are scenes
    metrics: list[str]  # that all the runs have
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
        value = run.scores[self.source]["metrics"].get(metric)
        if metric not in self.metrics:
            return Score(value)
        return score_of(value, *self.bounds[:, self.runs.index(run), self.metrics.index(metric)])


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


def score_sources(runs: list[Results]) -> dict[str, Scored]:
    """Intervals of all scores of some runs of one protocol, by source."""
    scored = {}
    for source in dict.fromkeys(source for run in runs for source in run.scores):
        members = [run for run in runs if source in run.scores]
        units, scenes = intervals.units_of(members[0].of(source))
        by_run = [run.scores[source]["metrics"] for run in members]
        names = [name for name in by_run[0] if all(name in values for values in by_run)]
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
        delta1 = replicates[..., names.index("delta1")].copy()  # the rest is not needed any more
        scored[source] = Scored(source, members, units, scenes, names, bounds, delta1)
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
