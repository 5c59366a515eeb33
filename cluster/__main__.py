"""Command line: `python -m cluster COMMAND --help`."""

import argparse
import sys
from pathlib import Path

from bench.arguments import positive, shard_range
from bench.remote import connected, require_ray

from .inputs import FORMATS, Input
from .plan import DEPTH_SIZES, Settings, begin


def add_predict(commands) -> None:
    parser = commands.add_parser("predict", help="depth of millions of photos -> Parquet, on one machine or on Ray")
    parser.add_argument("input", metavar="INPUT", help="folder, file, s3://... or the like; a data set's name")
    parser.add_argument("--format", choices=FORMATS, default="images", help="of INPUT; default: images, in a folder")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    parser.add_argument("--id-column", metavar="NAME", help="default: file and row number")
    parser.add_argument(
        "--focal-length-column",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of px or [fx, fy], or two columns; of a WebDataset, fields of its JSON",
    )
    parser.add_argument("--config", metavar="NAME", help="of a data set")
    parser.add_argument("--split", default="train", help="of a data set; default: train")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="that all machines see")
    parser.add_argument("--focal-length", type=float, metavar="PX", help="of photos without one in a column")
    parser.add_argument("--ask", metavar="QUESTION", help="a question about each photo, answered by the same pass")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="of an answer; default: 128")
    parser.add_argument("--max-pixels", type=positive, metavar="N", help="budget for the processed photo")
    parser.add_argument("--depth-size", choices=DEPTH_SIZES, default="photo", help="of the maps; default: photo")
    parser.add_argument("--shard-size", type=positive, default=128, metavar="N", help="photos per file; default: 128")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="photos per pass; default: 4")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the models; default: cuda if it is here")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of a model on a CPU; default: 1")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="on Ray; default: one started here")
    where.add_argument(
        "--shard-range", type=shard_range, metavar="I/N", help="the shards with number % N == I, on this machine"
    )
    parser.add_argument("--actors", type=positive, default=1, metavar="N", help="models on Ray; default: 1")
    parser.add_argument("--readers", type=positive, default=1, metavar="N", help="readers on Ray; default: 1")
    parser.set_defaults(run=run_predict)


def run_predict(args) -> int:
    import torch

    from bench.evaluate import checkpoint_version

    from . import predict

    source = Input(
        path=args.input,
        format=args.format,
        image_column=args.image_column,
        id_column=args.id_column,
        focal_length_columns=tuple(args.focal_length_column),
        config=args.config,
        split=args.split,
    )
    settings = Settings(
        source=source,
        model=args.model,
        checkpoint=checkpoint_version(args.model),
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype,
        question=args.ask,
        max_new_tokens=args.max_new_tokens,
        focal_length=args.focal_length,
        max_pixels=args.max_pixels,
        depth_size=args.depth_size,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        threads=args.threads,
    )
    predict.check(settings)
    plan = begin(settings, args.out)
    shards = plan.unfinished()
    if args.shard_range:
        index, count = args.shard_range
        shards = [shard for shard in shards if shard % count == index]
    if shards and args.ray is None:
        predict.run(plan, shards, predict.in_this_process(plan, shards))
    elif shards:
        with connected(args.ray):
            predict.run(plan, shards, predict.on_ray(plan, shards, args.actors, args.readers))
    if missing := plan.unfinished():
        print(f"{plan.shards - len(missing)} of {plan.shards} shards are finished")
        return 0
    summary = predict.summarise(plan)
    print(f"{summary['photos']} photos in {summary['shards']} shards of {plan.out}, {summary['failed']} failed")
    for row in summary["first_failed"][:20]:
        print(f"  failed {row['id']}: {row['reason']}")
    return 0


def add_serve(commands) -> None:
    parser = commands.add_parser("serve", help="POST /v1/chat/completions and /v1/depth on Ray Serve")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=positive, default=8000, help="default: 8000")
    parser.add_argument("--metrics-port", type=positive, metavar="PORT", help="of Prometheus; default: a free one")
    parser.add_argument("--ray", default="local", metavar="ADDRESS", help="of a cluster; default: one started here")
    parser.set_defaults(run=run_serve)
    try:
        from .settings import Settings
    except ImportError:  # `run_serve` says so
        parser.add_argument("ignored", nargs=argparse.REMAINDER)
        return
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() else f"; default: {field.default}"
        option = f"--{name.replace('_', '-')}"
        description = f"{field.description}{default}"
        parser.add_argument(
            option, metavar="VALUE", required=field.is_required(), help=description, default=argparse.SUPPRESS
        )


def run_serve(args) -> int:
    require_ray()
    from pydantic import ValidationError
    from transformers import PretrainedConfig

    from .settings import Settings

    try:
        settings = Settings(**{name: value for name, value in vars(args).items() if name in Settings.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{first['loc'][0].replace('_', '-')} {first['input']}: {first['msg']}") from error
    PretrainedConfig.get_config_dict(settings.model)  # here, in a sentence
    with connected(args.ray, _metrics_export_port=args.metrics_port):
        from .serve import run

        run(settings, args.host, args.port, ends_serve=args.ray == "local")
    return 0


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cluster", description="DepthVLM past one machine; see docs/scale.md")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_predict, add_serve):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = command_line().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; finished shards are kept, the same command goes on from them", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
