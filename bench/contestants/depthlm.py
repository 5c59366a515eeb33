"""DepthLM-12B, as its own evaluation asks it: `depthlm:facebook/DepthLM` (CC BY-NC).

The image at fx = 750 px, by which it knows the camera; an arrow of 5 px; its own prompt; the distance to the camera.
Its evaluation skips points near the border; here the arrow comes from another side, as for every VLM (_prompt.py).
"""

from collections.abc import Iterator

from . import _prompt
from ._base import Query
from .vlm import VisionLanguageModel

FOCAL_LENGTH = 750.0  # px
ARROW = 5  # px
PROMPT = (
    "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process in "
    "<think> </think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
)


def questions(query: Query) -> Iterator[_prompt.Question]:
    image, pixels = _prompt.at_focal_length(query, FOCAL_LENGTH)
    for pixel in pixels:
        yield _prompt.mark(image, pixel, ARROW), PROMPT


class DepthLM(VisionLanguageModel):
    title = "DepthLM"
    group = "VLMs Trained on Metric Depth Estimation"
    quantity = "ray"
    uses_intrinsics = True
    model_types = ()  # its own is "llava", as that of many
    questions = staticmethod(questions)
    text_key = "content"  # Pixtral's template
    max_new_tokens = 4096


CONTESTANT = DepthLM
