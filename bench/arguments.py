"""What the commands' arguments have in common."""

import argparse
from pathlib import Path


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def shard_range(value: str) -> tuple[int, int]:
    """ "I/N" -> (I, N): of N jobs, number I takes the shards whose number leaves I when divided by N."""
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{value!r} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of every command that writes shards."""
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="shards go to DIR/SOURCE, card to DIR")
    parser.add_argument("--num-proc", type=positive, default=1, metavar="N", help="worker processes")
    parser.add_argument(
        "--strict", action="store_true", help="end at the first frame that cannot be used, instead of listing it"
    )
