"""Tables 4 to 7 of the paper in miniature, and whether depth helps answers: `python -m bench ablate --out DIR`.

Each row is a file of configs/ablations: what it changes of the tiny model and of its stages of training. All rows of a
seed start from one tiny "pretrained" model, train on `procedural` and are scored on frames held out from it.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas
import yaml
from scipy import stats
from tqdm import tqdm

from . import paper
from .arguments import positive
from .files import write_json
from .tables import Row, Score, Table, markdown

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "configs" / "ablations"
TABLES = (4, 5, 6, 7)  # of the paper
WORDS = "words"  # the table of configs/depth_for_words, which the paper has not
KINDS = ("point_distance", "nearer_point", "distance", "nearer")  # of questions, in that table
STAGES = ("stage1", "stage2", "words")  # each a file configs/tiny_STAGE.yaml
KEYS = {"tables", "config", "stages", *STAGES, "focal_normalization"}
MOST_HELD_OUT, MOST_ASKED = 500, 150  # frames to score depth and answers on; there are 40 questions about each
EASY_SHARE = 0.25  # easy frames per frame
# metrics of the trainer's JSON files -> their names here
METRICS = {"eval_delta1": "delta1", "eval_abs_rel": "abs_rel", "questions_all": "questions"}
METRICS |= {f"questions_{kind}": kind for kind in KINDS}


def add_ablate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("ablate", help="tables 4 to 7 of the paper in miniature, on `procedural`")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="data, runs and tables go here")
    parser.add_argument("--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a whole run of every row each")
    parser.add_argument("--steps", type=positive, metavar="N", help="of every stage; default: the rows' own")
    parser.add_argument(
        "--frames",
        type=positive,
        default=12000,
        metavar="N",
        help="trained on, at most 20000; a tenth, at most 500, is held out",
    )
    parser.add_argument("--num-proc", type=positive, default=1, metavar="N", help="processes that draw the frames")
    parser.add_argument(
        "--words", action="store_true", help="instead of the tables: answers with and without the depth loss"
    )
    parser.set_defaults(run=run_ablate)


def run_ablate(args: argparse.Namespace) -> int:
    changes = {"max_steps": args.steps} if args.steps else {}
    rows, tables = (read_rows(ROWS.parent / "depth_for_words"), [WORDS]) if args.words else (read_rows(), args.tables)
    results = ablate(args.out, rows, tables, args.seeds, args.frames, changes, args.num_proc)
    if args.words:
        print(write_words(args.out, rows, results))
    else:
        print(write_tables(args.out, rows, results, tables, args.frames, changes))
    write_json(args.out / f"{'words' if args.words else 'tables'}.json", provenance(args))
    return 0


def provenance(args: argparse.Namespace) -> dict:
    """What was run, on which machine, by which code, and for how long: all runs in the folder, over all calls."""
    from .efficiency import machine

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    seconds = [float(file.read_text()) for file in (args.out / "runs").glob("*/seconds")]
    return {
        "tables": WORDS if args.words else args.tables,
        "seeds": args.seeds,
        "frames": args.frames,
        "steps": args.steps or "the rows' own",
        "commit": commit.stdout.strip(),
        "hours": round(sum(seconds) / 3600, 2),
        "machine": machine("cpu") | {"cpus": os.cpu_count()},
    }


# Rows


def read_rows(folder: Path = ROWS) -> dict[str, dict]:
    """name -> row, each the difference to ours.yaml put over it; see there for the keys."""
    ours = yaml.safe_load((folder / "ours.yaml").read_text())
    rows = {}
    for file in sorted(folder.glob("*.yaml")):
        row = yaml.safe_load(file.read_text())
        if unknown := set(row) - KEYS:
            raise ValueError(f"{file.name} has {', '.join(sorted(unknown))}; a row has {', '.join(sorted(KEYS))}")
        if "tables" not in row:
            raise ValueError(f"{file.name} has no tables; add them, as in ours.yaml")
        merged = {key: ours.get(key, {}) | row.get(key, {}) for key in ("config", *STAGES)}
        merged |= {key: row.get(key, ours[key]) for key in ("tables", "stages")}
        merged["focal_normalization"] = row.get("focal_normalization", True)
        rows[file.stem] = merged
    return rows


def rows_of(rows: dict[str, dict], table: int | str) -> list[str]:
    """Names of a table's rows, in the paper's order."""
    return sorted(
        (name for name in rows if table in rows[name]["tables"]), key=lambda name: rows[name]["tables"][table]
    )


# Runs


def ablate(
    out: Path,
    rows: dict[str, dict],
    tables: list[int | str],
    seeds: list[int],
    frames: int,
    changes: dict,
    num_proc: int = 1,
) -> dict[str, dict[int, dict]]:
    """
    Train and score all rows of `tables`: name -> seed -> `delta1`, `abs_rel` and, of table 6 and "words", `questions`
    and the `KINDS`.

    changes: of the trainer's arguments, in every stage. Runs lie in out/runs, named by what decides them: one that is
    finished is not trained again, one that was cut short goes on, and rows that begin alike share their beginning.
    """
    out = Path(out).resolve()
    names = sorted({name for table in tables for name in rows_of(rows, table)})
    data = build_data(out / f"data-{frames}", frames, num_proc)
    results = {name: {} for name in names}
    with tqdm(total=len(names) * len(seeds), desc="rows", disable=None) as bar:
        for seed in seeds:
            pretrained = pretrain(out, data, seed, frames, changes)
            for name in names:
                row = rows[name]
                bar.set_postfix_str(f"{name}, seed {seed}")
                results[name][seed] = run_row(out, data, row, pretrained, seed, frames, changes)
                bar.update()
    return results


def build_data(folder: Path, frames: int, num_proc: int) -> Path:
    """
    `frames` procedural frames to train on and `held_out` ones to score on, and a quarter as many easy ones, built where
    they are missing.
    """
    from . import build, sources
    from .sources.procedural.source import COUNTS

    if frames > COUNTS["train"]:
        raise ValueError(f"--frames {frames} is more than procedural's {COUNTS['train']} to train on; ask for fewer")
    for source, share in ((sources.get("procedural"), 1), (sources.get("procedural_easy"), EASY_SHARE)):
        for split, count in (("train", frames), ("test", held_out(frames))):
            reader = build.SourceReader(source, None, split)
            build.write_split(folder, source, split, reader, *reader.plan(math.ceil(count * share)), num_proc)
    return folder


def held_out(frames: int) -> int:
    return min(MOST_HELD_OUT, math.ceil(frames / 10))


def without_focal_lengths(data: Path, focal_length: float) -> Path:
    """A copy of the data set in which every photo claims `focal_length` px: none is resized or scaled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy = data.with_name(f"{data.name}-raw-{focal_length:g}")
    if copy.exists():
        return copy
    begun = copy.with_suffix(".tmp")
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(data, begun)
    for shard in begun.rglob("*.parquet"):
        table = pq.read_table(shard)
        for axis in ("fx", "fy"):
            field = table.schema.field(axis)
            column = pa.array([focal_length] * len(table), field.type)
            table = table.set_column(table.schema.get_field_index(axis), field, column)
        pq.write_table(table, shard)
    begun.rename(copy)
    return copy


def pretrain(out: Path, data: Path, seed: int, frames: int, changes: dict) -> Path:
    """The tiny model that all rows of a seed start from, trained on questions alone as configs/tiny_pretrain.yaml."""
    from depthvlm import create_tiny

    start = out / "runs" / f"start-seed{seed}"
    if not (start / "finished.json").exists():
        create_tiny.create(start, seed)
        (start / "finished.json").write_text("{}")
    return train(out, "pretrain", stage_settings("pretrain", start, data, seed, frames, {}, changes))


def run_row(out: Path, data: Path, row: dict, pretrained: Path, seed: int, frames: int, changes: dict) -> dict:
    folder = start_with_head(out, pretrained, row["config"], seed)
    if not row["focal_normalization"]:
        data = without_focal_lengths(data, json.loads((folder / "config.json").read_text())["canonical_focal_length"])
    for stage in row["stages"]:
        last = stage == row["stages"][-1]
        asked = min(MOST_ASKED, held_out(frames)) if last and {6, WORDS} & set(row["tables"]) else 0
        own = row[stage] | {"eval_questions": asked}
        folder = train(out, stage, stage_settings(stage, folder, data, seed, frames, own, changes))
    return json.loads((folder / "finished.json").read_text())


def start_with_head(out: Path, pretrained: Path, config: dict, seed: int) -> Path:
    """A pretrained tiny model with the configuration's fields `config` and an untrained head that they ask for."""
    import torch

    from depthvlm.configuration_depthvlm import DepthVLMConfig
    from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
    from depthvlm.processing_depthvlm import DepthVLMProcessor

    folder = out / "runs" / f"head-{digest([pretrained.name, config, seed])}"
    if (folder / "finished.json").exists():
        return folder
    base = DepthVLMForConditionalGeneration.from_pretrained(pretrained, dtype="float32", use_safetensors=True)
    torch.manual_seed(seed)
    model = DepthVLMForConditionalGeneration(DepthVLMConfig(**base.config.to_dict() | config))
    model.generation_config = base.generation_config
    weights = {name: value for name, value in base.state_dict().items() if not name.startswith("depth_head.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("depth_head.") for name in missing):
        raise ValueError(f"configuration {config} changes more than the depth head; leave other fields out of the row")
    model.save_pretrained(folder)
    processor = DepthVLMProcessor.from_pretrained(pretrained, trust_remote_code=False)
    processor.canonical_focal_length = model.config.canonical_focal_length
    processor.save_pretrained(folder)
    (folder / "finished.json").write_text("{}")
    return folder


def stage_settings(stage: str, start: Path, data: Path, seed: int, frames: int, own: dict, changes: dict) -> dict:
    """Arguments of train_sft.py: the tiny stage's file, the row's own and `changes` over it."""
    settings = yaml.safe_load((ROOT / "configs" / f"tiny_{stage}.yaml").read_text()) | own | changes
    for mix in ("datasets", "eval_datasets"):
        settings[mix] = [source | {"path": str(data)} for source in settings[mix]]
    limits = {"max_eval_samples": held_out(frames), "save_total_limit": 2, "disable_tqdm": True}
    return settings | limits | {"model_name_or_path": str(start), "seed": seed}


def train(out: Path, stage: str, settings: dict) -> Path:
    """The folder of a finished run of train_sft.py; finished.json in it holds its scores. Raises ChildProcessError."""
    named = settings | {"model_name_or_path": Path(settings["model_name_or_path"]).name}
    for mix in ("datasets", "eval_datasets"):  # a folder that was moved stays the same run
        named[mix] = [source | {"path": Path(source["path"]).name} for source in named[mix]]
    folder = out / "runs" / f"{stage}-{digest(named)}"
    if (folder / "finished.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "arguments.yaml"
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(folder)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["train_sft.py", "--config", str(config)]
    if list(folder.glob("checkpoint-*/data_position_0.json")):
        command += ["--resume_from_checkpoint", "last"]
    begun, spent = time.monotonic(), folder / "seconds"
    with open(folder / "train.log", "a") as log:
        # OpenMP's threads otherwise burn what data workers need
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    earlier = float(spent.read_text()) if spent.exists() else 0.0
    spent.write_text(str(earlier + time.monotonic() - begun))
    if status:
        raise ChildProcessError(f"{' '.join(command)} ended with status {status}; read {folder / 'train.log'}")
    scores = {}
    for file in ("eval_results.json", "questions_results.json"):
        if (folder / file).exists():
            metrics = json.loads((folder / file).read_text())
            scores |= {METRICS[name]: value for name, value in metrics.items() if name in METRICS}
    if settings.get("depth_weight") != 0 and not {"delta1", "abs_rel"} <= scores.keys():
        raise ValueError(f"{folder / 'eval_results.json'} has no delta1 and abs_rel; delete the folder and run again")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / "finished.json").write_text(json.dumps(scores))
    return folder


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


# Tables

DEPTH_SETS = 4  # columns of each table; table 6 has four general benchmarks after them
MEASURED = {"delta1": "δ1", "abs_rel": "AbsRel", "questions": "questions right"}
NOTES = {
    7: [
        "The tiny model's canonical focal length is a fifth of the paper's: 100, 200 and 300 px. The common start was "
        "trained at 200 px. Raw: photos at their own size."
    ]
}


def write_tables(out: Path, rows: dict, results: dict, tables: list[int], frames: int, changes: dict) -> str:
    """Write out/ablations.md and out/tableN.csv; returns the Markdown. results: as `ablate` returns them."""
    seeds = sorted(next(iter(results.values())))
    steps = f"{changes['max_steps']} steps per stage" if "max_steps" in changes else "the rows' own steps"
    text = [
        "# Tables 4 to 7 of the paper, in miniature\n",
        f"{frames} frames, {steps}, seeds {', '.join(map(str, seeds))}. δ1 and AbsRel are the trainer's: over the "
        f"labelled pixels of each of {held_out(frames)} held-out frames, on the predicted grid, then over "
        "the frames. The paper's columns are its 4B model's on other data: only the order of rows can be compared. All "
        "rows of a seed start from one tiny model that was trained on questions alone; after that its vision tower is "
        "frozen, unless the row says otherwise.\n",
    ]
    published = paper.read_tables()
    for table in tables:
        metrics = ("delta1", "abs_rel", "questions") if table == 6 else ("delta1", "abs_rel")
        records = []
        for name in rows_of(rows, table):
            row = published[str(table)]["rows"][rows[name]["tables"][table] - 1]
            records.append(record(row, published[str(table)]["columns"], results[name], metrics))
        pandas.DataFrame(records).to_csv(out / f"table{table}.csv", index=False)
        text += [markdown(comparison(table, records)), order(records) + "\n"]
    text = "\n".join(text)
    (out / "ablations.md").write_text(text)
    return text


def write_words(out: Path, rows: dict, results: dict) -> str:
    """Write out/words.csv, a line per row of configs/depth_for_words, and out/words.md; returns the Markdown.

    The difference to the first row is taken seed by seed; its 95 % interval is Student's t over seeds.
    """
    names = rows_of(rows, WORDS)
    seeds = sorted(results[names[0]])
    records, lines = [], []
    for name in names:
        line = {"row": name}
        cells = [name]
        for metric in KINDS:
            values = [results[name][seed].get(metric, math.nan) for seed in seeds]
            gains = [value - results[names[0]][seed][metric] for value, seed in zip(values, seeds, strict=True)]
            line[metric], half = statistics.mean(values), half_interval(gains)
            line |= {f"{metric} gain": statistics.mean(gains), f"{metric} half interval": half}
            line |= {f"{metric} seed {seed}": value for seed, value in zip(seeds, values, strict=True)}
            gain = "" if name == names[0] else f" ({line[f'{metric} gain']:+.1%} ± {half:.1%})"
            cells.append(f"{line[metric]:.1%}{gain}")
        records.append(line)
        lines.append(f"| {' | '.join(cells)} |")
    pandas.DataFrame(records).to_csv(out / "words.csv", index=False)
    text = f"| row | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}\n" + "\n".join(lines)
    text += f"\n\nShares of right answers, means over seeds {', '.join(map(str, seeds))}; in brackets the gain over "
    text += f"`{names[0]}`, seed by seed, with its 95 % interval (Student's t).\n"
    (out / "words.md").write_text(text)
    return text


def half_interval(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half the width of Student's t interval of the mean; NaN of one value."""
    if len(values) < 2:
        return math.nan
    t = stats.t.ppf(0.5 + confidence / 2, len(values) - 1)
    return float(t * statistics.stdev(values) / math.sqrt(len(values)))


def record(row: dict, columns: list[str], by_seed: dict[int, dict], metrics: Sequence[str]) -> dict:
    """A line of tableN.csv: the paper's numbers, means and sample standard deviations over seeds, and each seed's."""
    line = published_part(row, columns)
    for metric in metrics:
        values = [by_seed[seed][metric] for seed in sorted(by_seed)]
        line[metric] = statistics.mean(values)
        line[f"{metric} spread"] = statistics.stdev(values) if len(values) > 1 else None
        line |= {f"{metric} seed {seed}": by_seed[seed][metric] for seed in sorted(by_seed)}
    return line


def published_part(row: dict, columns: list[str]) -> dict:
    numbers = {f"paper {name}": value for name, value in zip(columns, row["values"], strict=True)}
    return {"row": row["method"]} | numbers | {"paper mean": round(statistics.mean(row["values"][:DEPTH_SETS]), 4)}


def read_records(folder: Path) -> dict[int, list[dict]]:
    """Number of the table -> its lines, of the tables that `bench ablate --out folder` wrote; ValueError without any.

    The paper's numbers are not taken from there.
    """
    remedy = "pass the --out of `python -m bench ablate`"
    records = {}
    for number in TABLES:
        file, published = folder / f"table{number}.csv", paper.read_tables()[str(number)]
        if not file.exists():
            continue
        rows = {row["method"]: row for row in published["rows"]}
        try:
            table = pandas.read_csv(file)
            measured = table[[name for name in table if name.split(" ")[0] in MEASURED]].astype(float)
            measured = measured.astype(object).where(measured.notna(), None).to_dict("records")
            lines = zip(table["row"], measured, strict=True)
            records[number] = [published_part(rows[row], published["columns"]) | line for row, line in lines]
            comparison(number, records[number])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no table of an ablation ({error!r}); {remedy}") from error
    if not records:
        raise ValueError(f"{folder} has none of the files {', '.join(f'table{n}.csv' for n in TABLES)}; {remedy}")
    return records


def comparison(number: int, records: list[dict]) -> Table:
    """A table of the paper with its own columns first, then the measured ones."""
    published = paper.read_tables()[str(number)]
    digits = dict(zip(published["columns"], paper.decimals_of(published), strict=True)) | {"mean": 3}
    columns = [key for key in records[0] if key.startswith("paper ")]
    metrics = [key for key in MEASURED if key in records[0]]
    rows = []
    for line in records:
        cells = [Score(line[key], decimals=digits[key.removeprefix("paper ")]) for key in columns]
        for metric in metrics:
            spread = line[f"{metric} spread"]
            cells.append(f"{line[metric]:.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        rows.append(Row([line["row"]], cells))
    return Table(
        paper.title_of(str(number), published),
        ["row"],
        [*columns, *(f"measured {MEASURED[metric]}" for metric in metrics)],
        rows,
        [
            "Measured: a tiny model on the set procedural, means and sample standard deviations over seeds.",
            *NOTES.get(number, []),
        ],
    )


def order(records: list[dict]) -> str:
    """Whether the rows stand in the paper's order by δ1, and what of that the spread over seeds leaves open."""

    def ranked(key):
        return "; ".join(row["row"] for row in sorted(records, key=lambda row: -row[key]))

    pairs = list(combinations(records, 2))
    alike = sum((a["delta1"] - b["delta1"]) * (a["paper mean"] - b["paper mean"]) > 0 for a, b in pairs)
    came_out = f"The paper's order of rows {'came' if alike == len(pairs) else 'did not come'} out: "
    text = (
        f"Best δ1 first, here: {ranked('delta1')}. In the paper, by the mean of its four sets: {ranked('paper mean')}. "
        f"{came_out}{alike} of {len(pairs)} pairs of rows stand as in the paper."
    )
    if any(row["delta1 spread"] is None for row in records):
        return f"{text} One seed says nothing about spread."
    close = sum(abs(a["delta1"] - b["delta1"]) <= max(a["delta1 spread"], b["delta1 spread"]) for a, b in pairs)
    return f"{text} {close} pairs differ by no more than the spread over seeds."
