"""The dataset card of a build: OUT/README.md, whose `configs:` tell `load_dataset` which shards are what."""

import logging
from pathlib import Path

from huggingface_hub import DatasetCardData

from training.answers import TOLERANCES

from . import manifest
from .depthvlm_bench import GROUPS
from .files import write_text

logger = logging.getLogger(__name__)
HEAD = """---
{metadata}
---

# DepthVLM-Bench, built from the owner's own copies of {n} data sets

    from datasets import load_dataset
    rows = load_dataset(DIR, "{example}", split="{example_split}")  # DIR: this folder; streaming=True works too

**The images and depths belong to the data sets' authors, under the licences below. Most do not allow that they are
passed on: read them before you publish this folder.**
"""


def write(out: Path) -> None:
    """(Re)write OUT/README.md from the records of the finished splits in OUT."""
    path = Path(out) / "README.md"
    # again while it differs: a build that ends at the same time may have put an older card in place meanwhile
    while not path.exists() or path.read_text(encoding="utf-8") != render(out):
        write_text(path, render(out))


def records_of(out: Path) -> list[dict]:
    """The records of the finished splits in OUT; broken ones are left out, with a warning."""
    records = []
    for path in sorted([*Path(out).glob("*/train.json"), *Path(out).glob("*/test.json")]):
        try:
            records.append(manifest.read_record(path, older=True))
        except ValueError as error:
            logger.warning("%s; the card leaves its split out: build it again", error)
    return [record for record in records if record.get("finished")]


def configs_of(records: list[dict]) -> list[dict]:
    """The card's `configs`: each source of some records, and the groups that have a source there."""
    splits = splits_of(records)
    configs = {name: [(split, [name]) for split in of_source] for name, of_source in splits.items()}
    groups = {name: [(split, members)] for name, (split, members) in groups_of(splits).items() if members}
    default = "paper_eval" if "paper_eval" in groups else next(iter(configs))
    return [_config(name, parts, name == default) for name, parts in (configs | groups).items()]


def splits_of(records: list[dict]) -> dict[str, list[str]]:
    splits = {}
    for record in records:
        splits.setdefault(record["source"], []).append(record["split"])
    return splits


def groups_of(splits: dict[str, list[str]]) -> dict[str, tuple[str, list[str]]]:
    """Of each group its split, and those of its sources that have it."""
    return {
        name: (split, [member for member in members if split in splits.get(member, ())])
        for name, (split, members) in GROUPS.items()
    }


def render(out: Path) -> str:
    records = records_of(out)
    splits = splits_of(records)
    example = next(iter(splits))
    text = HEAD.format(
        metadata=DatasetCardData(
            pretty_name="DepthVLM-Bench",
            license="other",
            task_categories=["depth-estimation", "visual-question-answering"],
            configs=configs_of(records),
        ),
        n=len(splits),
        example=example,
        example_split=splits[example][0],
    )
    for name, (split, members) in groups_of(splits).items():
        if members:
            missing = sorted({*GROUPS[name][1]} - {*members})
            text += f"\n`{name}` holds the {split} rows of {', '.join(members)}"
            text += f"; **not in this folder: {', '.join(missing)}**.\n" if missing else ", all of the paper's.\n"
    text += "\n" + section("Columns") + "\n## Contents\n\n"
    text += "| source | split | images | of listed | skipped | points | seed | valid depth pixels | range m | scale "
    text += "| hash of the rows |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    for record in records:
        text += _row(record)
    text += questions(records)
    text += "\nEach `SOURCE/SPLIT.json` holds all parameters of the build, each skipped frame with its reason, "
    text += "and the hashes that `python -m bench verify` checks.\n"
    for name in splits:
        facts = next(record for record in records if record["source"] == name)
        text += f"\n### {facts['title']} (`{name}`)\n\n"
        text += f"Licence: {facts['licence']}  \nPage: {facts['page']}  \nCite: {facts['citation']}\n"
    return text


def questions(records: list[dict]) -> str:
    """A table of the kinds of questions, with what one answer to all of a kind would score; "" where none is asked."""
    rows = "".join(
        f"| {record['source']} | {record['split']} | {kind} | {facts['number']} | {facts['constant']} "
        f"| {facts['right']:.1%} | {tolerance(kind)} |\n"
        for record in records
        for kind, facts in record.get("questions", {}).items()
    )
    head = "| source | split | kind of question | number | best constant answer | right | right within |\n"
    return f"\n{head}|---|---|---|---|---|---|---|\n{rows}" if rows else ""


def tolerance(kind: str) -> str:
    return f"{TOLERANCES[kind]:.0%}" if kind in TOLERANCES else "to the letter"


def section(title: str) -> str:
    """A second-level section of bench/README.md, so that the columns are described in one place."""
    manual = (Path(__file__).parent / "README.md").read_text()
    return f"## {title}\n" + manual.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0].rstrip() + "\n"


def _config(name: str, parts: list[tuple[str, list[str]]], default: bool) -> dict:
    files = [
        {"split": split, "path": [f"{member}/{split}-*.parquet" for member in members]} for split, members in parts
    ]
    return {"config_name": name} | ({"default": True} if default else {}) | {"data_files": files}


def _row(record: dict) -> str:
    parameters = record["parameters"]
    low, high = parameters["depth_range"]
    annotated = "as released" if parameters.get("as_released") else "as annotated"
    share = f"{record['valid_pixels'] / record['pixels']:.1%}" if record["pixels"] else "-"
    return (
        f"| {record['source']} | {record['split']} | {record['written']} | {parameters['images_listed']} "
        f"| {len(record['skipped'])} | {record['points']} | {parameters.get('seed', annotated)} | {share} "
        f"| {low}–{high} | {parameters['depth_scale']:g} | {record.get('content', '-')[:12]} |\n"
    )
