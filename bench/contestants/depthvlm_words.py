"""A DepthVLM asked in words, one point at a time, beside its own map: `depthvlm_words:CHECKPOINT`.

As appendix B asks a VLM that was trained on metric depth: in the form that it was trained with. A point is stated in
whole per cents of width and height, as in the questions of `procedural`, without an arrow in the image; the camera is
known from the focal length, as for the map.
"""

import math

from training.questions import generate_answers

from . import _prompt
from ._base import Answer, Query
from .depthvlm import DepthVLM

PROMPT = "How far is the point at {} % from the left and {} % from the top?"


class DepthVLMWords(DepthVLM):
    title = "DepthVLM in words"
    dense = False
    model_types = ()
    batch_size = 16  # points

    def prepare(self, queries: list[Query]) -> list[Query]:
        return queries

    def answers(self, prepared: list[Query]) -> list[list[Answer]]:
        rows = [
            {
                "image": query.image,
                "focal_length": query.intrinsics[0],
                "question": PROMPT.format(*per_cents(point, query.image.size)),
            }
            for query in prepared
            for point in query.points
        ]
        replies = iter(generate_answers(self.model, self.processor, rows, batch_size=self.batch_size))
        return [[_prompt.read(next(replies)) for _ in query.points] for query in prepared]


def per_cents(point: tuple[float, float], size: tuple[int, int]) -> list[int]:
    """The whole per cents of width and height nearest to a point (u, v) in px of an image of `size`, (W, H)."""
    return [math.floor(100 * (coordinate + 0.5) / side + 0.5) for coordinate, side in zip(point, size, strict=True)]


CONTESTANT = DepthVLMWords
