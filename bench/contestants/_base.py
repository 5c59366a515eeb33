"""What every contestant of `python -m bench evaluate` shares: what it is shown, and what it may answer.

Pixels: (u, v) of the stored image, the first pixel's centre at (0, 0), as everywhere here (see sources/_base.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor


class NotRunnable(ValueError):
    """A contestant that cannot run here; the message says what is missing and how to get it."""


@contextmanager
def package(title: str, install: str) -> Iterator[None]:
    """Around the import of a package that only one contestant needs: its absence becomes NotRunnable."""
    try:
        yield
    except ImportError as error:
        raise NotRunnable(f"{title} is missing ({error}): {install}") from error


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
    """A contestant's word on one point.

    depth: metres, in the contestant's own `quantity`; NaN where it gave none. status: "ok", or why there is no depth:
    "invalid" (its own invalid marker, or not above 0), "refused", "unparsable", "unmarkable", "failed" (a request that
    never succeeded). text: the reply in words, "" where there was none.
    """

    depth: float
    status: str = "ok"
    text: str = ""


class Contestant:
    """A model under test. A module `bench/contestants/NAME.py` holds one subclass and names it `CONTESTANT`.

    `--model NAME:CHECKPOINT` makes `CONTESTANT(CHECKPOINT, device=..., dtype=...)`, which loads it at once: what is
    missing is said before the data is read. Subclasses override `maps` if they are `dense`, else `answers`.
    """

    title: ClassVar[str]  # as tables name it
    dense: ClassVar[bool]  # whether it gives maps; otherwise it is asked point by point
    quantity: ClassVar[str] = "z"  # or "ray": Euclidean distance to the camera; the scorer converts it
    uses_intrinsics: ClassVar[bool] = False  # whether it is told the camera, so that tables can say so
    batch_safe: ClassVar[bool] = True  # False: an image's result depends on its batch, so it is run alone
    estimates_camera: ClassVar[bool] = False  # whether `focal_length` can be asked, for predict.py's --camera-from
    deterministic: ClassVar[bool] = True
    served_at: str = ""  # the address that its answers come from, if it is not run here
    model_types: ClassVar[tuple[str, ...]] = ()  # of config.json, for `--model CHECKPOINT` without NAME

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        raise NotImplementedError

    def prepare(self, queries: list[Query]):
        """What `maps` or `answers` is given: the queries, or what can be made of them while the batch before is run.

        It is called in another thread, one batch ahead.
        """
        return queries

    def maps(self, queries: list[Query]) -> list[np.ndarray]:
        """One (H, W) float32 a query, metres at the image's own size; not finite or <= 0 where it knows none."""
        raise NotImplementedError

    def focal_length(self, image: Image.Image) -> float:
        """Along x, in px of the image, as the model estimates it."""
        raise NotImplementedError

    def answers(self, queries: list[Query]) -> list[list[Answer]]:
        """One `Answer` for each of each query's points."""
        raise NotImplementedError


class DepthModel(Contestant):
    """A metric depth model of transformers: `model_class`, whose config is checked before its weights are read."""

    dense = True
    model_class: ClassVar[type]

    def __init__(self, checkpoint, device="cpu", dtype="float32"):
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{checkpoint} is a {config.model_type!r} model, not {self.title}; try pipeline:{checkpoint}"
            )
        self.check(checkpoint, config)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.model = self.model_class.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        self.model.to(device).eval()

    def check(self, checkpoint: str, config) -> None:
        """Raise ValueError for a checkpoint without metres, NotRunnable for what is not installed."""
