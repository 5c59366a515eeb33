"""The paper's tables, from paper_results.json, and lmms-eval's result files as rows of table 3."""

import json
from pathlib import Path

from .files import read_json
from .tables import Row, Score, Table

FILE = Path(__file__).with_name("paper_results.json")
MEASURED = "measured"
TASKS = {  # column of table 3 -> lmms-eval's task, its metric, and what makes the paper's unit of it
    "MMB-EN": ("mmbench_en_dev_static", "gpt_eval_score", 1),
    "MMB-CN": ("mmbench_cn_dev", "gpt_eval_score", 1),
    "MMStar": ("mmstar", "average", 100),
    "ScienceQA": ("scienceqa_img", "exact_match", 100),
    "BLINK": ("blink", "blink_acc", 100),
    "OCRBench": ("ocrbench", "ocrbench_accuracy", 1000),
    "CountBench": ("countbenchqa", "acc", 100),
    "POPE": ("pope", "pope_accuracy", 100),
}


def read_tables() -> dict[str, dict]:
    """Number of the table ("1" to "8", "2-full-map") -> title, columns, decimals, rows; see the file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def decimals_of(table: dict) -> list[int]:
    """Per column."""
    decimals = table["decimals"]
    return decimals if isinstance(decimals, list) else [decimals] * len(table["columns"])


def rows_of(table: dict) -> list[Row]:
    """The paper's own rows; where a row names its base, with the differences to it."""
    by_method = {row["method"]: row["values"] for row in table["rows"]}
    rows = []
    for row in table["rows"]:
        cells = [Score(value, decimals=digits) for value, digits in zip(row["values"], decimals_of(table), strict=True)]
        if base := row.get("base"):
            cells = [
                Score(cell.value, decimals=cell.decimals, note=f"{cell.value - other:+.{cell.decimals}f}")
                for cell, other in zip(cells, by_method[base], strict=True)
            ]
        rows.append(Row([table.get("from", "paper"), row["method"]], cells, row.get("group", ""), published=True))
    return rows


def title_of(number: str, table: dict) -> str:
    return table["title"] if number == "2-full-map" else f"Table {number} of the paper: {table['title']}"


def table_of(number: str, measured: list[Row] = (), notes: list[str] = ()) -> Table:
    """A table of the paper with measured rows below its own, of the same group where there are groups."""
    table = read_tables()[number]
    notes = [*([table["note"]] if "note" in table else []), *notes]
    spans = [tuple(span) for span in table.get("spans", [])]
    rows = [*rows_of(table), *measured]
    return Table(title_of(number, table), ["from", "method"], table["columns"], rows, notes, spans)


def vqa_rows(files: list[Path]) -> list[Row]:
    """Rows of table 3 from result files of lmms-eval 0.7, a row per model, whose tasks may lie in several files.

    Raises ValueError for files of something else, and for a task that two files of a model have.
    """
    models, remedy = {}, "pass DATE_results.json of `lmms_eval --output_path`"
    for file in files:
        content = read_json(file, remedy)
        try:
            name, results, samples = str(content["model_name"]), content["results"], content["n-samples"]
            for column, (task, metric, unit) in TASKS.items():
                if task not in results:
                    continue
                if column in models.setdefault(name, {}):
                    raise ValueError(f"{file} has {task} of {name} again; pass each result once")
                value = results[task][f"{metric},none"]
                if not isinstance(value, int | float):
                    raise ValueError(
                        f"{file} has {metric} {value!r} of {task}, which is no number; run lmms-eval again"
                    )
                parts = [samples[part] for part in (task, *content["group_subtasks"].get(task, ())) if part in samples]
                models[name][column] = score_of(value * unit, column, parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no result file of lmms-eval ({error!r}); {remedy}") from error
        if not models.get(name):
            raise ValueError(
                f"{file} has none of the tasks {', '.join(task for task, _, _ in TASKS.values())}; {remedy}"
            )
    return [
        Row([MEASURED, name], [scores.get(column, Score(None)) for column in TASKS], bold=True)
        for name, scores in models.items()
    ]


def score_of(value: float, column: str, parts: list[dict]) -> Score:
    """parts: of `n-samples`, how many questions were asked of how many."""
    asked, count = (sum(part[key] for part in parts) for key in ("effective", "original"))
    coverage = f"{asked}/{count} questions" if asked < count else ""
    return Score(value, decimals=0 if column == "OCRBench" else 1, coverage=coverage)
