"""VLM3, as its model card asks it: `vlm3:facebook/VLM3-depth` (CC BY-NC).

The image at fx = 1000 px, by which it knows the camera, and unmarked: the prompt names the pixel, each coordinate as a
share of the side in [0, 2000]. It answers the distance to the camera.
"""

from collections.abc import Iterator

import numpy as np

from . import _prompt
from ._base import Query
from .vlm import VisionLanguageModel

FOCAL_LENGTH = 1000.0  # px
PROMPT = (
    "Given this image, how far is the point at coordinates ({}, {}) from the camera? The coordinates are in normalised "
    "[0, 2000] format relative to image width and height. Output the thinking process in <think> </think> and final "
    "answer (the meter number only, without the unit) in <answer> </answer> tags."
)


def questions(query: Query) -> Iterator[_prompt.Question]:
    image, pixels = _prompt.at_focal_length(query, FOCAL_LENGTH)
    for u, v in np.rint(pixels * 2000 / image.size).astype(int):
        yield image, PROMPT.format(u, v)


class VLM3(VisionLanguageModel):
    title = "VLM3"
    group = "VLMs Trained on Metric Depth Estimation"
    quantity = "ray"
    uses_intrinsics = True
    model_types = ()  # its own is "qwen3_vl", as that of many
    questions = staticmethod(questions)
    max_new_tokens = 4096


CONTESTANT = VLM3
