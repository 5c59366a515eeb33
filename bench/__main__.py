"""Command line of the benchmark: `python -m bench COMMAND --help`."""

import argparse
import re
import sys
import textwrap
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from . import sources
from .ablate import add_ablate
from .arguments import add_output, positive, shard_range
from .report import add_report
from .retention import add_retention
from .sources._base import AbsentSplit, BadFrame, Source


def add_build(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("build", help="raw folder -> Parquet shards and dataset card for load_dataset")
    parser.add_argument("source", metavar="SOURCE", help="see `python -m bench sources`")
    parser.add_argument("--raw", metavar="DIR", help="the data set's folder; `procedural` needs none")
    parser.add_argument("--split", choices=("train", "test"), help="one split; default: all that the source has")
    parser.add_argument("--max-frames", type=positive, metavar="N", help="images per split, 1000 for test by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images and points")
    parser.add_argument("--keep-hidden", action="store_true", help="lidar: keep points behind a nearer surface")
    add_output(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="on Ray; default: one started here")
    where.add_argument("--shard-range", type=shard_range, metavar="I/N", help="only the shards with number %% N == I")
    where.add_argument(
        "--finish", action="store_true", help="after all of --shard-range: write the record and the card"
    )
    parser.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    from . import build

    source = sources.get(args.source)
    for split in [args.split] if args.split else source.splits:
        reader = build.SourceReader(source, args.raw, split, args.seed, args.keep_hidden)
        parameters, items = reader.plan(args.max_frames)
        how = {"ray": args.ray, "shard_range": args.shard_range, "finish": args.finish}
        record = build.write_split(
            args.out, source, split, reader, parameters, items, args.num_proc, args.strict, **how
        )
        if record:
            summarise(record)
    return 0


def add_import(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("import", help="the released annotation JSONL (or DepthLM's of iBims-1) -> shards")
    parser.add_argument("annotations", metavar="ANNOTATIONS.jsonl", type=Path)
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="folder of the records' `image`")
    parser.add_argument("--depths", metavar="DIR", type=Path, help="folder of `depth_path` and of the masks")
    parser.add_argument("--source", metavar="NAME", required=True, help="data set of the records")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="train rows hold no points")
    parser.add_argument("--as-released", action="store_true", help="keep the released grid and ray distances")
    add_output(parser)
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    from .annotations import AnnotationReader, import_annotations

    reader = AnnotationReader(sources.get(args.source), args.split, args.images, args.depths, args.as_released)
    summarise(import_annotations(args.annotations, reader, args.out, args.num_proc, args.strict))
    return 0


def add_sources(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sources", help="list the sources: licence, page, splits, range, folder layout")
    parser.set_defaults(run=run_sources)


def run_sources(args: argparse.Namespace) -> int:
    for name in sources.names():
        source = sources.get(name)
        splits = ", ".join(f"{split} = {' + '.join(parts)}" for split, parts in source.splits.items())
        low, high = source.depth_range
        print(f"{name}: {source.title}\n  licence: {source.licence}\n  page: {source.page}")
        print(f"  splits: {splits}\n  depth: {low}–{high} m, stored x {source.depth_scale:g}")
        print("  layout:\n" + textwrap.indent(textwrap.dedent(source.layout).strip(), "    ") + "\n")
    return 0


def add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("check", help="check a raw folder: one frame per split is read")
    parser.add_argument("source", metavar="SOURCE", help="see `python -m bench sources`")
    parser.add_argument("--raw", metavar="DIR", help="the data set's folder; `procedural` needs none")
    parser.add_argument("--split", choices=("train", "test"), help="one split; default: those that the folder has")
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    from . import build

    source = build.open_source(sources.get(args.source), args.raw)
    missing = [f"{what} ({glob})" for glob, what in source.needs if not next(source.raw.glob(glob), None)]
    for what in missing:
        print(f"missing: {what}")
    splits, absent, failures = [args.split] if args.split else list(source.splits), 0, len(missing)
    for split in splits:
        try:
            print(f"{split}: {describe_frame(source, split)}")
        except AbsentSplit as error:
            absent += 1
            print(f"{split}: not in this folder ({error})")
        except (ValueError, OSError) as error:
            failures += 1
            print(f"{split}: {error}")
    failures += absent == len(splits)
    print(f"{failures} problems; expected: {source.layout}" if failures else f"{source.name} looks right")
    return 1 if failures else 0


def describe_frame(source: Source, split: str) -> str:
    """A line about the first frame of a split whose files are present. Raises BadFrame or what the listing raises.

    A scene or camera with a problem or a missing file is passed over, as in a partial download, and counted.
    """
    from . import build

    incomplete = {}
    for frame in source.frames(split):
        place = frame.scene or frame.id, frame.camera
        if place in incomplete or frame.problem:
            incomplete.setdefault(place, frame.problem)
            continue
        try:
            row, stored = build.load_row(source, split, frame)
            break
        except FileNotFoundError as error:
            incomplete[place] = str(error)
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            raise BadFrame(f"frame {frame.id}: {build.reason(error)}") from error
    else:
        raise BadFrame(next(iter(incomplete.values()), "no frames"))
    width, height = build.image_size(row)
    return (
        f"{frame.id}: image {width}x{height}, depth {stored.shape[1]}x{stored.shape[0]} "
        f"with {(stored > 0).mean():.1%} valid, {stored[stored > 0].min() / source.depth_scale:.2f}–"
        f"{stored.max() / source.depth_scale:.2f} m, fx {row['fx']:.1f} fy {row['fy']:.1f} cx {row['cx']:.1f} "
        f"cy {row['cy']:.1f} px"
        + (f"; before it, {len(incomplete)} not complete: {next(iter(incomplete.values()))}" if incomplete else "")
    )


def add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("verify", help="check built shards and results against their hashes")
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", type=Path, help="what `build`, `import` or `evaluate` wrote"
    )
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    from . import verify

    problems = 0
    for folder in args.folders:
        for line in verify.verify(folder):
            problems += line.startswith("problem: ")
            print(line)
    print(f"{problems} problems" if problems else "all as it was written")
    return 1 if problems else 0


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model on built test rows; under accelerate launch too",
        epilog="With --model NAME:CHECKPOINT, --help lists the options of that contestant too.",
    )
    parser.add_argument("--model", required=True, metavar="NAME:CHECKPOINT", help="constant:2.0, or a checkpoint alone")
    parser.add_argument("--data", required=True, metavar="DIR_OR_ID", help="what `build` or `import` wrote")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="default: all that have test rows")
    parser.add_argument("--mode", choices=("points", "dense"), default="points", help="default: points")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: results/MODEL")
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="images per forward pass; default: 4"
    )
    parser.add_argument(
        "--max-points", type=positive, metavar="N", help="score N points in all, evenly spread; default: every point"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the model"
    )
    parser.add_argument("--as-released", action="store_true", help="the released scorer's conventions, see the card")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count rows that cannot be scored")
    parser.add_argument(
        "--num-proc",
        type=positive,
        default=1,
        metavar="N",
        help="processes that prepare images; in dense mode, N more that score maps",
    )
    parser.add_argument("--save-marked", type=positive, metavar="N", help="save N images as a VLM is shown them")
    parser.add_argument("--yes", action="store_true", help="paid contestants: ask; default: print the estimate alone")
    parser.set_defaults(run=run_evaluate)


def add_contestant(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Add the options of the contestant that --model names; importing all contestants would take seconds."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", nargs="?")
    if model := first.parse_known_args(argv)[0].model:
        from . import contestants, evaluate

        name, checkpoint = evaluate.find_contestant(model)
        contestants.get(name).add_arguments(parser)
        parser.set_defaults(contestant=(name, checkpoint))


def run_evaluate(args: argparse.Namespace) -> int:
    from . import contestants, evaluate, rows

    name, checkpoint = args.contestant
    sources = tuple(rows.open_sources(args.data, args.sources))
    protocol = args.mode, args.as_released, args.max_points, args.dtype, args.skip_bad
    asked = evaluate.Run(args.model, args.data, sources, *protocol)
    title = re.sub(r"[^A-Za-z0-9._-]+", "_", args.model).strip("_.") or Path(args.model).resolve().name  # of "." too
    out = args.out or Path("results") / title
    state = evaluate.processes()
    with state.local_main_process_first():  # it downloads, the others find what it has left
        contestant = contestants.get(name).from_arguments(checkpoint, args, out, str(state.device))
    if contestant.paid and state.is_main_process:
        print(contestant.estimate(*evaluate.size(asked)))
    if contestant.paid and not args.yes:
        print("nothing was asked; add --yes to ask, --max-points N to ask less")
        return 0
    if args.save_marked and state.is_main_process:
        evaluate.save_marked(asked, contestant, out / "marked", args.save_marked)
    summary = evaluate.evaluate(asked, contestant, out, args.batch_size, args.num_proc)
    if summary:
        print_summary(summary, out)
        if failed := sum(scored["counts"].get("failed", 0) for scored in summary["sources"].values()):
            print(f"{failed} requests failed, and the same command makes them again; the first: {first_failure(out)}")
    return 0


def print_summary(summary: dict, out: Path) -> None:
    for source, scored in summary["sources"].items():
        data = summary["data"][source]
        images = f"{data['hash'][:8]}, {scored['images']} of {data['images_of']} images, {scored['points']} points"
        print_scores(source, scored["metrics"], f"{images}, {scored['counts']}")
        for row in data["bad_rows"][:20]:
            print(f"  left out, row {row['row']}, {row['id']}: {row['reason']}")
        if len(data["bad_rows"]) > 20:
            print(f"  and {len(data['bad_rows']) - 20} more, all listed in summary.json")
    print_scores("mean", summary["mean"], f"of {len(summary['sources'])} sources; all in {out}")


def add_rescore(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("rescore", help="compute the scores of `evaluate` again, from its saved predictions")
    parser.add_argument("folder", metavar="RESULTS", type=Path)
    parser.add_argument("--data", metavar="DIR_OR_ID", help="the benchmark that was evaluated, if it has moved")
    parser.add_argument("--num-proc", type=positive, default=1, metavar="N", help="processes that score maps")
    parser.set_defaults(run=run_rescore)


def run_rescore(args: argparse.Namespace) -> int:
    from . import evaluate

    print_summary(evaluate.rescore(args.folder, args.data, args.num_proc), args.folder)
    return 0


def first_failure(out: Path) -> str:
    """What the first request that failed ended with."""
    import pandas

    failed = pandas.read_parquet(out / "predictions.parquet", columns=["text"], filters=[("status", "==", "failed")])
    return failed["text"].iloc[0]


def print_scores(name: str, scores: dict, note: str) -> None:
    values = "  ".join(f"{key} {'-' if value is None else format(value, '.4f')}" for key, value in scores.items())
    print(f"{name}: {values}  ({note})")


def summarise(record: dict) -> None:
    """Print what a build wrote and what it skipped."""
    skipped, name = record["skipped"], f"{record['source']}/{record['split']}"
    share = record["valid_pixels"] / max(record["pixels"], 1)
    print(
        f"{name}: {record['written']} images and {record['points']} points in {record['shards']} shards, "
        f"{share:.1%} of depth pixels valid, {len(skipped)} frames skipped"
    )
    for frame in skipped[:20]:
        print(f"  skipped {frame['id']}: {frame['reason']}")
    if len(skipped) > 20:
        print(f"  and {len(skipped) - 20} more, all listed in {name}.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench", description="DepthVLM-Bench: 13 depth data sets, one schema")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_sources,
        add_check,
        add_build,
        add_import,
        add_verify,
        add_evaluate,
        add_rescore,
        add_report,
        add_ablate,
        add_retention,
    ):
        add(commands)
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["evaluate"]:
            add_contestant(commands.choices["evaluate"], argv[1:])
        args = parser.parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; finished shards are kept, the same command goes on from them", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("a worker process was killed, by lack of memory perhaps; finished shards are kept: "
              "run the same command again, with a smaller --num-proc", file=sys.stderr)  # fmt: skip
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if type(error).__name__ == "Skipped" else 2


if __name__ == "__main__":
    sys.exit(main())
