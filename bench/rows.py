"""Rows of a built benchmark, as `evaluate` and `report` read them."""

import json
import math
from pathlib import Path

import datasets
import numpy as np

from .contestants._base import Query
from .depthvlm_bench import GROUPS

CHUNK = 16  # rows of a source that are read, and finished, together


def open_sources(data: str, names: list[str] | None) -> dict[str, datasets.Dataset]:
    """Test rows of each source of a built benchmark, images left encoded; in the order of the paper, others after."""
    try:
        configs = datasets.get_dataset_config_names(data)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"{data} is no built benchmark ({error}); make one with `python -m bench build`") from error
    order = GROUPS["paper_eval"][1]
    present = [name for name in (*order, *sorted(set(configs) - set(order))) if name in configs and name not in GROUPS]
    if unknown := sorted(set(names or ()) - set(present)):
        raise ValueError(f"{data} has no source {', '.join(unknown)}; it has {', '.join(present)}")
    opened = {}
    for name in [name for name in present if name in (names or present)]:
        rows = open_test_rows(data, name)
        if rows is None and names:
            raise ValueError(f"{name} in {data} has no test rows; build them, or leave it out of --sources")
        if rows is not None:
            opened[name] = rows
    if not opened:
        raise ValueError(f"{data} has no test rows at all; build a test split first")
    return opened


def open_test_rows(data: str, name: str) -> datasets.Dataset | None:
    """A source's test rows; None without any.

    Its files are named one by one, because `load_dataset(data, name)` takes what it has cached for any older folder of
    the same name for this one's.
    """
    files = datasets.load_dataset_builder(data, name).config.data_files.get("test")
    if not files:
        return None
    return datasets.load_dataset("parquet", data_files={"test": list(files)}, split="test").with_format(None)


def check_annotations(data: str, sources: tuple[str, ...], as_released: bool) -> None:
    """Refuse rows of `import --as-released` for the ordinary protocol, and the other way round, where a build says."""
    for name in sources:
        file = Path(data) / name / "test.json"
        made = json.loads(file.read_text())["parameters"].get("as_released", False) if file.is_file() else None
        if made is not None and made != as_released:
            with_or_without = "leave --as-released out" if as_released else "add --as-released"
            kind = "as released" if made else "corrected"
            raise ValueError(f"the points of {name} in {data} are {kind}; {with_or_without}, or pass other data")


def read_query(row: dict) -> Query:
    points = np.column_stack([row["points_u"], row["points_v"]]).astype(np.float64).reshape(-1, 2)
    intrinsics = tuple(row[name] for name in ("fx", "fy", "cx", "cy"))
    return Query(f"{row['source']}/{row['split']}/{row['id']}", row["image"].convert("RGB"), intrinsics, points)


def points_of(opened: dict[str, datasets.Dataset], mode: str, max_points: int | None) -> dict[str, list[np.ndarray]]:
    """Which points of each row of each source are scored: with `max_points`, evenly spread over all of them."""
    if mode == "dense":
        return {name: [np.zeros(0, int)] * len(rows) for name, rows in opened.items()}
    counts = {name: [len(u) for u in rows.select_columns(["points_u"])["points_u"]] for name, rows in opened.items()}
    for name, own in counts.items():
        if not sum(own):
            raise ValueError(f"{name} has no points; its test rows were not built by this benchmark: build them again")
    step = max(1.0, sum(map(sum, counts.values())) / (max_points or math.inf))
    kept, start = {}, 0
    for name, own in counts.items():
        kept[name] = []
        for count in own:
            numbers = np.arange(start, start + count)
            kept[name].append(np.flatnonzero(np.floor((numbers + 1) / step) > np.floor(numbers / step)))
            start += count
        if not sum(map(len, kept[name])):
            raise ValueError(f"--max-points {max_points} leaves no point of {name}; raise it or leave {name} out")
    return kept


def read_chunk(dataset: datasets.Dataset, start: int, kept: list[np.ndarray], mode: str):
    """Rows and queries of a chunk; of points, only images with one, without their depth maps."""
    rows, queries = [], []
    dataset = dataset.remove_columns("depth") if mode == "points" else dataset
    for index in range(start, min(start + CHUNK, len(dataset))):
        if mode == "points" and not len(kept[index]):
            continue
        row = dataset[index]
        for name in ("points_u", "points_v", "points_depth"):
            row[name] = np.asarray(row[name])[kept[index]]
        queries.append(read_query(row))
        del row["image"]  # the query has it
        rows.append(row)
    return rows, queries
