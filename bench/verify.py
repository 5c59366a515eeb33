"""Whether a built benchmark, or results of `evaluate`, are still what was written: `python -m bench verify DIR...`."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import DatasetCard

from . import card, manifest, scoring


def verify(folder: Path) -> Iterator[str]:
    """A line per split or run, and one that begins with "problem: " for each thing that is not as it was written."""
    if (folder / "run.json").exists() or (folder / "summary.json").exists():
        yield from verify_results(folder)
    else:
        yield from verify_build(folder)


def verify_results(folder: Path) -> Iterator[str]:
    problems = []
    try:
        summary = scoring.read_summary(folder)
        yield f"{summary['contestant']['title']}, {', '.join(summary['hashes'])}: as they were written"
    except ValueError as error:
        problems.append(error)
    try:
        manifest.read_record(folder / "run.json")
    except (OSError, ValueError) as error:
        problems.append(error)
    for part in sorted([*folder.glob("parts/*.parquet"), *folder.glob("maps/*.parquet")]):
        try:
            if reason := manifest.difference(part, manifest.read_record(part.with_suffix(".json"))["file"]):
                problems.append(reason)
        except (OSError, ValueError) as error:
            problems.append(error)
    yield from (f"problem: {problem}" for problem in problems)


def verify_build(folder: Path) -> Iterator[str]:
    paths = sorted([*folder.glob("*/train.json"), *folder.glob("*/test.json")])
    if not paths:
        raise ValueError(f"{folder} holds neither a built benchmark nor results; pass what `build` or `evaluate` wrote")
    records = []
    for path in paths:
        try:
            record = manifest.read_record(path)
        except ValueError as error:
            yield f"problem: {error}; build it again"
            continue
        if not record["finished"]:
            yield f"problem: {path} is of a build that has not finished; run it again"
            continue
        records.append(record)
        problems = list(shard_problems(path, record))
        yield from (f"problem: {problem}; run the same build again" for problem in problems)
        name = f"{record['source']}/{record['split']} {record['content'][:12]}"
        of = f"{record['written']} of {record['images_of']} images in {record['shards']} shards"
        yield f"{name}: {of}{'' if problems else ', as they were written'}"
    try:
        configs = DatasetCard.load(folder / "README.md").data.configs
    except (OSError, ValueError, AttributeError) as error:
        yield f"problem: {folder / 'README.md'} cannot be read ({error}); run a build again"
    else:
        if records and configs != card.configs_of(records):
            yield f"problem: {folder / 'README.md'} lists other files than the records; run a build again"


def shard_problems(path: Path, record: dict) -> Iterator[str]:
    """What is wrong with the shards of a split and their records."""
    hashes = {}
    for file in record["files"]:
        shard = path.with_name(file["name"])
        if reason := manifest.difference(shard, file):
            yield reason
        try:
            part = manifest.read_record(shard.with_suffix(".json"))
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        hashes |= part["rows"]
        if part["file"] | {"rows": part["written"]} != file or part["parameters"] != record["parameters"]:
            yield f"{shard.with_suffix('.json')} is of another build than {path}"
    if len(hashes) == record["written"] and manifest.content_hash(hashes.values()) != record["content"]:
        yield f"{path} is of other rows than its shards"
    listed = {file["name"] for file in record["files"]}
    for shard in sorted(path.parent.glob(f"{path.stem}-*.parquet")):
        if shard.name not in listed:
            yield f"{shard} is in no record, and `load_dataset` would read it; remove it"
