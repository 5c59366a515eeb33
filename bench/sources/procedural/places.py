"""Questions that name no thing: about points, halves and the whole of a picture, answered from its depth map.

A point is given in whole per cents of the picture's width and height, from its left and its top edge (in the easier
pictures in tens of them): the pixel that holds it. Distances are z-depths, stated to 0.1 m below 10 m and to 1 m from
there on.
"""

import numpy as np

from .scenes import Draw

POINTS, PAIRS = 24, 8  # questions about a point and about two of a picture
MARGIN = 2  # per cent between a point and the picture's border
AROUND = 0.015  # of the picture's width: a point is asked about where its surroundings, this far, have its depth ...
SMOOTH = 1.15  # ... up to this ratio, so that rounding to a per cent does not decide the answer
NEARER = 1.15  # ratio of two depths that may be compared
TRIES = 50  # points drawn until one can be asked about

Point = tuple[str, float]  # where it is, in words, and its depth in metres


def ask(draw: Draw, depth: np.ndarray, camera_height: float | None, step: int = 1) -> list[tuple[str, str, str]]:
    """(kind, question, answer) about depth (H, W), z in metres, 0 = none. camera_height: metres; None without a floor.
    step: per cents of which a point's place is a multiple.

    About 36: "A" and "B" are equally often right, and no question is left out for what its answer is.
    """
    questions = []
    for _ in range(POINTS):
        if point := choose_point(draw, depth, step):
            questions.append(("point_distance", f"How far is the point {point[0]}?", metres(point[1])))
    for _ in range(PAIRS):
        a, b = choose_point(draw, depth, step), choose_point(draw, depth, step)
        if a and b and max(a[1], b[1]) >= NEARER * min(a[1], b[1]):
            question = f"Which is nearer, point A {a[0]}, or point B {b[0]}?"
            questions.append(("nearer_point", question, "A" if a[1] < b[1] else "B"))
    middle = depth.shape[1] // 2
    left, right = (lower_median(half[half > 0]) for half in (depth[:, :middle], depth[:, middle:]))
    if max(left, right) >= NEARER * min(left, right) > 0:
        answer = "left" if left < right else "right"
        questions.append(("nearer_half", "Which is nearer, the left or the right half?", answer))
    nearest = f"{metres(depth[depth > 0].min())}"
    questions.append(("nearest_distance", "What is the nearest distance in the picture?", nearest))
    if depth.min() > 0:  # else something may be farther than what has a depth
        questions.append(("farthest_distance", "What is the farthest distance in the picture?", metres(depth.max())))
    if camera_height is not None:
        questions.append(("camera_height", "How high is the camera above the floor?", metres(camera_height)))
    return list(dict.fromkeys(questions))  # one point may have been drawn twice


def choose_point(draw: Draw, depth: np.ndarray, step: int) -> Point | None:
    """A point with a depth, away from edges of the depth map; None where TRIES of them are not."""
    for _ in range(TRIES):
        where, at, around = choose_place(draw, depth.shape, step)
        if depth[around].min() > 0 and depth[around].max() < SMOOTH * depth[around].min():
            return where, float(depth[at])
    return None


def choose_place(draw: Draw, shape: tuple[int, int], step: int) -> tuple[str, tuple[int, int], tuple[slice, slice]]:
    """A place of a picture (height, width) in words, its pixel, and the pixels around it."""
    height, width = shape
    reach = 1 + int(AROUND * width)
    lowest, highest = -(-MARGIN // step), (100 - MARGIN) // step
    x, y = draw.integer(lowest, highest) * step, draw.integer(lowest, highest) * step
    u, v = x * width // 100, y * height // 100
    around = slice(max(v - reach, 0), v + reach + 1), slice(max(u - reach, 0), u + reach + 1)
    return f"at {x} % from the left and {y} % from the top", (v, u), around


def metres(depth: float) -> str:
    return f"{depth:.1f}" if depth < 9.95 else f"{depth:.0f}"


def lower_median(values: np.ndarray) -> float:
    """0 without values."""
    return float(np.sort(values)[(len(values) - 1) // 2]) if len(values) else 0.0
