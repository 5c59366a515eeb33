"""The dataset card of a build: OUT/README.md, whose `configs:` tell `load_dataset` which shards are what."""

import json
from pathlib import Path

from huggingface_hub import DatasetCardData

from .depthvlm_bench import GROUPS
from .files import write_text

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
    """(Re)write OUT/README.md from the finished splits found in OUT."""
    paths = sorted([*Path(out).glob("*/train.json"), *Path(out).glob("*/test.json")])
    records = [json.loads(path.read_text()) for path in paths]
    records = [record for record in records if record.get("finished")]
    splits = {}
    for record in records:
        splits.setdefault(record["source"], []).append(record["split"])
    groups = {
        name: (split, [member for member in members if split in splits.get(member, ())])
        for name, (split, members) in GROUPS.items()
    }
    configs = {name: [(split, [name]) for split in found] for name, found in splits.items()}
    configs |= {name: [(split, members)] for name, (split, members) in groups.items() if members}
    default = "paper_eval" if "paper_eval" in configs else next(iter(configs))
    example = next(iter(splits))
    text = HEAD.format(
        metadata=DatasetCardData(
            pretty_name="DepthVLM-Bench",
            license="other",
            task_categories=["depth-estimation", "visual-question-answering"],
            configs=[_config(name, parts, name == default) for name, parts in configs.items()],
        ),
        n=len(splits),
        example=example,
        example_split=splits[example][0],
    )
    for name, (split, members) in groups.items():
        if members:
            missing = sorted({*GROUPS[name][1]} - {*members})
            text += f"\n`{name}` holds the {split} rows of {', '.join(members)}"
            text += f"; **not in this folder: {', '.join(missing)}**.\n" if missing else ", all of the paper's.\n"
    text += "\n" + section("Columns") + "\n## Contents\n\n"
    text += "| source | split | images | of listed | skipped | points | seed | valid depth pixels | range m | scale |\n"
    text += "|---|---|---|---|---|---|---|---|---|---|\n"
    for record in records:
        text += _row(record)
    text += "\nEach `SOURCE/SPLIT.json` holds all parameters of the build and each skipped frame with its reason.\n"
    for name in splits:
        facts = next(record for record in records if record["source"] == name)
        text += f"\n### {facts['title']} (`{name}`)\n\n"
        text += f"Licence: {facts['licence']}  \nPage: {facts['page']}  \nCite: {facts['citation']}\n"
    write_text(Path(out) / "README.md", text)


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
        f"| {low}–{high} | {parameters['depth_scale']:g} |\n"
    )
