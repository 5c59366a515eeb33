"""Depth asked of a vision-language model in words, one point at a time (the paper's appendix B, after DepthLM).

What the paper fixes: one image and one point per question; an image whose longest edge is above 1024 px is first
downscaled to it, a smaller one stays as it is; a red arrow of 20 px marks the point; depth is along the optical axis,
in metres. What it leaves open is decided here:
- filter: Pillow's bicubic, which averages when it shrinks; sizes are rounded.
- point: by pixel centres, to the pixel that holds it.
- arrow: DepthLM's shape with its length as the size: strokes of one pixel, (255, 0, 0), no antialiasing.
- border: an arrow that would leave the image comes from another side; where none fits, within half its size of a
  corner, the answer is "unmarkable" and counts as wrong.
- prompt: `PROMPT`; the paper does not print the one it used.
- reply: `parse_depth`, which never guesses.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from ._base import Answer, Query

LONGEST_EDGE = 1024  # px
ARROW = 20  # px
RED = (255, 0, 0)
PROMPT = (
    "A red arrow is drawn on this image and its tip points at one point of the scene. What is the metric depth of that "
    "point, that is, its distance from the camera along the camera's optical axis, in meters? "
    "Answer with one number in meters and nothing else."
)
Question = tuple[Image.Image | None, str]  # an image, None where the point cannot be marked, and the prompt


# Showing a point


def downscale(image: Image.Image, longest_edge: int = LONGEST_EDGE) -> Image.Image:
    """The image with its longest edge at most `longest_edge` px, never enlarged."""
    scale = longest_edge / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def map_points(points: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """
    The pixels that hold `points` once an image is resized, by pixel centres.

    points: (N, 2), (u, v) in px of an image of `size`, (W, H). Returns int (N, 2), inside an image of `new_size`.
    """
    scale = np.divide(new_size, size)
    pixels = np.floor((np.asarray(points, np.float64) + 0.5) * scale).astype(int)
    return np.clip(pixels, 0, np.subtract(new_size, 1))


def arrow_pixels(size: int) -> np.ndarray:
    """
    Offsets (du, dv) from the target, int (N, 2), of an arrow of `size` px that points right and ends one pixel before
    the target: a shaft of `size` pixels, and a head of `size // 2` pixels above and as many below it.
    """
    shaft = [(-k, 0) for k in range(1, size + 1)]
    head = [(-k - 1, side * k) for k in range(1, size // 2 + 1) for side in (-1, 1)]
    return np.array(shaft + head)


def mark(image: Image.Image, pixel: tuple[int, int], size: int = ARROW) -> Image.Image | None:
    """
    A copy of an RGB image with a red arrow whose tip is beside `pixel` (column, row), which itself stays unpainted.

    The arrow comes from the left, or from the first side where it lies inside the image: right, above, below. None
    where no side fits.
    """
    along, across = arrow_pixels(size).T
    for offsets in ((along, across), (-along, across), (across, along), (across, -along)):
        u, v = np.add(pixel, np.stack(offsets, axis=1)).T
        if u.min() >= 0 and v.min() >= 0 and u.max() < image.width and v.max() < image.height:
            pixels = np.array(image.convert("RGB"))
            pixels[v, u] = RED
            return Image.fromarray(pixels)
    return None


def questions(query: Query) -> Iterator[Question]:
    """Appendix B's question about each of the query's points."""
    image = downscale(query.image)
    for pixel in map_points(query.points, query.image.size, image.size):
        yield mark(image, pixel), PROMPT


def at_focal_length(query: Query, focal: float) -> tuple[Image.Image, np.ndarray]:
    """The image resized by `focal` / fx, sizes cut to whole px, and the pixels that hold the points, int (N, 2)."""
    size = [int(side * focal / query.intrinsics[0]) for side in query.image.size]
    image = query.image.resize(size, Image.Resampling.BICUBIC)
    return image, map_points(query.points, query.image.size, image.size)


def save_marked(queries: Iterable[Query], folder: str | Path, questions=questions) -> list[Path]:
    """Write what a model is shown for each point of `queries` to `folder`, as PNG files; returns those."""
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for query in queries:
        for index, (image, _) in enumerate(questions(query)):
            if image is not None:
                paths.append(folder / f"{re.sub(r'[^0-9A-Za-z.-]', '_', query.id)}_{index}.png")
                image.save(paths[-1])
    return paths


# Asking


def answers(
    queries: list[Query],
    ask: Callable[[list[tuple[Image.Image, str]]], list[Answer]],
    at_once: int,
    questions: Callable[[Query], Iterator[Question]] = questions,
) -> list[list[Answer]]:
    """
    `Contestant.answers` for a model that is asked in words.

    ask: at most `at_once` pairs of image and prompt -> as many answers; a point that cannot be marked is not asked.
    """
    pending, replies = (question for query in queries for question in questions(query)), []
    while batch := list(islice(pending, at_once)):
        shown = [question for question in batch if question[0] is not None]
        given = iter(ask(shown) if shown else [])
        replies += [Answer(math.nan, "unmarkable") if image is None else next(given) for image, _ in batch]
    replies = iter(replies)
    return [list(islice(replies, len(query.points))) for query in queries]


def read(text: str, finished: bool = True) -> Answer:
    """The answer in a reply; one cut off at the token limit is "unparsable": its last number may lack digits."""
    return Answer(*parse_depth(text), text) if finished else Answer(math.nan, "unparsable", text)


# Reading a reply

METRES = {"km": 1000.0, "m": 1.0, "cm": 0.01, "mm": 0.001, "ft": 0.3048, "in": 0.0254}
UNITS = {  # regular expressions
    "km": r"km|kilomet(?:er|re)s?",
    "cm": r"cm|centimet(?:er|re)s?",
    "mm": r"mm|millimet(?:er|re)s?",
    "m": r"m|met(?:er|re)s?",
    "ft": r"ft|feet|foot",
    "in": r"inch(?:es)?|in(?=[.,;)\]}]*\s*$)",  # "2 in front" and "2 in meters" are no inches
}
UNIT = re.compile(
    r"\s*[(\[]?(?:" + "|".join(f"(?P<{name}>{words})" for name, words in UNITS.items()) + r")(?![a-z0-9²³^/+_])"
)
OTHER_UNIT = re.compile(
    r"(?<![a-z])(?:" + "|".join(UNITS[name] for name in UNITS if name not in ("m", "in")) + r"|inch(?:es)?)(?![a-z])"
)
NUMBER = re.compile(r"(?<![\w.,])(?P<sign>[-−–+]?)(?P<digits>\d(?:[\d.,]*\d)?(?:e[-+]?\d+)?|\.\d+)")
BARE_END = re.compile(r"\s*(?:$|[.,;:!)\]}\n])")  # what may follow a number without a unit
JOINED = re.compile(r"\s*(?:[-−–—~/±×x*^&]|\+/-|\+-|to|and|or|until)\s*|:")  # between the two numbers of a range
SPACE = re.compile(r"[^\S\n]+")  # "1 200 mm": one number or two
BOUND = re.compile(
    r"(?:[<>≤≥]|\b(?:less|more|greater|fewer|lower|higher|farther|further|closer|shorter|longer) than|"
    r"\bat (?:least|most)|\b(?:under|over|below|above|beyond|within|exceed(?:s|ing)?|up to|minimum of|maximum of))"
    r"[\s~≈=]*(?:about|around|approximately|roughly)?\s*$"
)
BOUND_BEHIND = re.compile(
    r"\s*,?\s*(?:(?:or|and) (?:more|less|further|farther|closer|above|below|over|under)|"
    r"at (?:least|most)|max(?:imum)?|min(?:imum)?)\b"
)
REFUSAL = re.compile(
    r"(?:\bcan(?:not|['’]t| not)|\bcould(?: not|n['’]t)|\b(?:un|not )able to|\b(?:im|not )possible to|"
    r"\bdo(?: not|n['’]t))"
    r"\W+(?:\w+\W+){0,3}?(?:determin|estimat|measur|provid|tell|answer|identif|see|assist|help|find|comput|calculat|"
    r"judg|say|know|detect|locat|infer|assess|process|view|give|have)|\bno (?:visible )?(?:red )?arrow|\bsorry\b|"
    r"\b(?:not enough|insufficient) information|\bunknown\b|\bn/a\b|\b(?:un|in)determin"
)


def parse_depth(text: str) -> tuple[float, str]:
    """
    The depth that a reply states -> (metres, "ok"), or (NaN, status) where it states none or not one alone.

    - Thoughts, up to `</think>`, are ignored.
    - A marked final answer counts alone: the last `<answer>…</answer>`; else the last JSON object with "depth" (and
      its unit); else the last `\\boxed{…}`; else the line that follows the last "answer:".
    - Without a mark a refusal is "refused", numbers or not.
    - Numbers with a length unit (km, m, cm, mm, ft, in, and their names) count before those without. Without any, the
      text must hold one number alone, followed by no word; it is metres, unless the text names another unit.
    - Different numbers, ranges ("3-4 m", "2 to 3 m", "3 ± 1 m"), fractions and bounds ("over 3 m") are "unparsable".
    - 1,234.5 has a thousands comma, 2,5 a decimal one; "1,234" could be either and is "unparsable".
    - A number that is not above 0, or not finite, is "invalid".
    """
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", text, flags=re.S).rpartition("</think>")[2].lower()
    text = re.sub(r"\\(?:text|mathrm)\{\s*(\w+)\s*\}", r"\1", text)
    text = re.sub(r"\*\*|[`$]|\\[,; ]", "", text)
    marked = find_marked(text)
    statement = text if marked is None else marked
    depth = parse_statement(statement)
    if REFUSAL.search(statement) and (marked is None or depth is None):
        return math.nan, "refused"
    if depth is None:
        return math.nan, "unparsable"
    return (depth, "ok") if 0 < depth < math.inf else (math.nan, "invalid")


def find_marked(text: str) -> str | None:
    """The final answer that a reply (in small letters) marks as such, None where it marks none."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if opened and closed:
        return tagged
    for candidate in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            fields = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(fields, dict) and "depth" in fields:
            return " ".join(str(fields[key]) for key in ("depth", *(key for key in fields if "unit" in key)))
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return boxed[-1]
    if stated := re.findall(r"\banswer(?: is)?\s*[:=]\s*(.*)", text):
        return stated[-1]
    return None


def parse_statement(text: str) -> float | None:
    """The one number of a text in small letters, in metres; None where it has none, or several."""
    text = re.sub(r"""(["'])([^"']*)\1""", r"\2", re.sub(r"</?[a-z]+>", " ", text))
    lengths, bare = set(), set()  # numbers with a unit, and without
    numbers = list(NUMBER.finditer(text))
    for number, following in zip_longest(numbers, numbers[1:]):
        value = parse_number(number["digits"])
        unit = UNIT.match(text, number.end())
        end = unit.end() if unit else number.end()
        between = text[end : following.start("digits")] if following else "."
        if value is None or JOINED.fullmatch(between) or (not unit and SPACE.fullmatch(between)):
            return None
        value = -value if number["sign"] in ("-", "−", "–") else value
        bounded = BOUND.search(text[max(0, number.start() - 40) : number.start()]) or BOUND_BEHIND.match(text, end)
        if unit:
            lengths.add(None if bounded else round(value * METRES[unit.lastgroup], 9))  # 35 cm is 0.35 m
        else:
            bare.add(value if BARE_END.match(text, number.end()) and not bounded else None)
    if not lengths and not OTHER_UNIT.search(text):
        lengths = bare
    return lengths.pop() if len(lengths) == 1 else None


def parse_number(digits: str) -> float | None:
    """A number as people write it; None where its commas and points have no one meaning."""
    if re.fullmatch(r"(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)", digits):
        return float(digits)
    if re.fullmatch(r"[1-9]\d{0,2}(?:(?:,\d{3})+\.\d+|(?:,\d{3}){2,})", digits):
        return float(digits.replace(",", ""))
    if re.fullmatch(r"\d+,\d+", digits) and not re.fullmatch(r"[1-9]\d{0,2},\d{3}", digits):
        return float(digits.replace(",", "."))
    return None
