"""What every contestant of `python -m bench evaluate` shares: what it is given, and what it may answer.

Pixels: (u, v) of the stored image, the first pixel's centre at (0, 0), as everywhere here (see sources/_base.py).
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
from PIL import Image

Prepared = TypeVar("Prepared")  # what a contestant makes of a batch of queries before it runs


class NotRunnable(ValueError):
    """A contestant that cannot run here; the message says what is missing and how to get it."""


@contextmanager
def package(name: str, title: str, install: str) -> Iterator[None]:
    """Around the import of the package `name`, which one contestant alone needs.

    Raises NotRunnable, with the command that installs it, where it is missing and where it fails to import.
    """
    try:
        yield
    except Exception as error:  # an import runs the package's code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise NotRunnable(f"{title} is not installed: {install}") from error
        raise NotRunnable(
            f"{title} is installed, but its import fails with {type(error).__name__}: {error}; it takes {install}"
        ) from error


@dataclass(frozen=True, slots=True)
class Query:
    """An image and the points that are scored on it.

    image: RGB, as stored. intrinsics: fx, fy, cx, cy in px of the image. points: (N, 2), float64, (u, v).
    id: `source/split/id` of the row.
    """

    id: str
    image: Image.Image
    intrinsics: tuple[float, float, float, float]
    points: np.ndarray


@dataclass(frozen=True, slots=True)
class Answer:
    """A contestant's answer about one point.

    depth: metres, in the contestant's own `quantity`; NaN where it gave none. status: "ok", or why there is no depth:
    "invalid" (its own invalid marker, or not above 0), "refused", "unparsable", "unmarkable", "failed" (a request that
    never succeeded). text: the reply, or the error of a request that failed; "" where there was neither.
    """

    depth: float
    status: str = "ok"
    text: str = ""


class Contestant(Generic[Prepared]):
    """A model under test. A module `bench/contestants/NAME.py` holds one subclass and names it `CONTESTANT`.

    `--model NAME:CHECKPOINT` makes `CONTESTANT(CHECKPOINT, device=..., dtype=...)`, which loads the model: what is
    missing is reported before any data is read. Subclasses override `maps` if they are `dense`, else `answers`.
    """

    title: ClassVar[str]  # as tables name it
    group: ClassVar[str] = "Pure Vision Models"  # of tables, as the paper names its groups
    dense: ClassVar[bool]  # whether it gives maps; otherwise it is asked point by point
    quantity: ClassVar[str] = "z"  # or "ray": Euclidean distance to the camera; the scorer converts it
    uses_intrinsics: ClassVar[bool] = False  # whether it is given the camera, so that tables can say so
    batch_safe: ClassVar[bool] = True  # False: an image's result depends on its batch, so it is run alone
    paid: ClassVar[bool] = False  # whether each answer may cost money: `estimate` is shown, and --yes needed to go on
    estimates_camera: ClassVar[bool] = False  # whether `focal_length` can be asked, for predict.py's --camera-from
    served_at: str = ""  # the address that its answers come from, if it is not run here
    model_types: ClassVar[tuple[str, ...]] = ()  # of config.json, for `--model CHECKPOINT` without NAME

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        raise NotImplementedError

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of `evaluate` that this contestant alone has."""

    @classmethod
    def from_arguments(cls, checkpoint: str, args: argparse.Namespace, out: Path, device: str) -> "Contestant":
        """The contestant that the command line describes. out: folder of the run's results."""
        return cls(checkpoint, device=device, dtype=args.dtype)

    def estimate(self, images: int, points: int) -> str:
        """What asking about `points` points of `images` images costs, in words; for a contestant that is `paid`."""
        raise NotImplementedError

    def prepare(self, queries: list[Query]) -> Prepared:
        """What `maps` or `answers` is given: the queries, or what can be made of them while the batch before is run.

        It is called in another process, some batches ahead: it cannot use the device, and attributes it sets are lost.
        """
        return queries

    def maps(self, prepared: Prepared) -> list[np.ndarray]:
        """One (H, W) float32 per query, metres at the image's own size; not finite or <= 0 where it knows none."""
        raise NotImplementedError

    def answers(self, prepared: Prepared) -> list[list[Answer]]:
        """One `Answer` per point of each query."""
        raise NotImplementedError

    def focal_length(self, image: Image.Image) -> float:
        """Along x, in px of the image, as the model estimates it."""
        raise NotImplementedError
