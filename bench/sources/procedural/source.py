"""Procedural: rooms and streets drawn from a seed, with exact depth and question-answer pairs. Nothing to download."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .._base import Frame, Sample, Source
from . import places
from . import render as caster
from .places import NEARER, lower_median
from .render import Array
from .scenes import Draw, Scene, Thing, room, simple_room, street, tilt

SIZES = ((320, 240), (320, 240), (240, 320), (368, 208), (336, 224), (272, 272))  # (W, H), all of about 77 000 pixels
# Focal length in image widths: fields of view of 100..70, 70..50 and 50..35 degrees across.
LENSES = {"wide": (0.42, 0.714), "normal": (0.714, 1.072), "tele": (1.072, 1.586)}
COUNTS = {"train": 20_000, "test": 1_000, "easy_train": 5_000, "easy_test": 1_000}
# of the generator: no frame of one split can be drawn in another
KEYS = {"train": 1, "test": 2, "easy_train": 3, "easy_test": 4}
BUILDERS = {"room": room, "street": street, "simple-room": simple_room}

# Shares of the picture's pixels. A thing that fills less than SEEN is taken for unseen. It is clear, and may be asked
# about, from CLEAR up, if that is at least UNHIDDEN of what it would fill alone. A name must fit one seen thing only.
SEEN, CLEAR, UNHIDDEN = 0.0002, 0.003, 0.3
TRIES = 10  # scenes drawn for a frame until three questions can be asked about it; one in a hundred needs a second
GAP = 0.02  # of the picture's width, between two things of which one is left of the other
# Places drawn to ask what they show, and how many questions become of them, of one thing and in all.
SPOTS, PER_THING, MOST_SPOTS = 300, 4, 12
PLURALS = {"box": "boxes", "person": "people", "shelf": "shelves"}


def render(split: str, index: int, size: tuple[int, int] | None = None) -> Sample:
    """Frame `index` of "train" or "test" as a Sample, drawn at `size` (W, H) in px; None: the frame's size."""
    return picture(split, index, size)[0]


def picture(
    split: str, index: int, size: tuple[int, int] | None = None
) -> tuple[Sample, np.ndarray, Scene, caster.Camera]:
    """The sample, the index into `scene.things` of what each pixel shows (H, W), the scene and the camera."""
    if size and min(size) < 8:
        raise ValueError(f"size {tuple(size)} px has an edge under 8; pass (W, H) of a picture that shows something")
    draw, kind, lens = begin(split, index)
    shares, frame_size = [draw.uniform() for _ in range(5)], draw.choice(SIZES)
    for _ in range(TRIES):
        scene = BUILDERS[kind](draw, 1 / sum(LENSES[lens]))
        camera = aim(scene, kind, lens, size or frame_size, shares)
        z, part, covered = caster.trace(camera, scene.parts)
        lo, hi = Procedural.depth_range
        depth = np.where((z >= lo) & (z <= hi), z, 0.0).astype(np.float32)
        things = np.array([0] + [p.thing for p in scene.parts], np.int16)[part + 1]
        alone = np.bincount([p.thing for p in scene.parts], covered, len(scene.things))
        qa = ask(draw, scene, things, depth, alone)
        if len(qa) >= 3:
            break
    step = 1 if scene.kinds else 10
    qa += places.ask(draw, depth, scene.eye[2] if scene.walls else None, step) + shown(draw, scene, things, step)
    return Sample(develop(scene, camera, z, part), depth, camera.intrinsics, qa), things, scene, camera


def begin(split: str, index: int) -> tuple[Draw, str, str]:
    """The frame's generator after its first two draws: the kind of scene and the lens."""
    if split not in KEYS:
        raise ValueError(f"procedural has no split {split!r}; it has {', '.join(KEYS)}")
    if not 0 <= index < COUNTS[split]:
        raise ValueError(f"procedural {split} has no frame {index}; its frames are 0 to {COUNTS[split] - 1}")
    draw = Draw(KEYS[split], index)
    kinds = ("simple-room",) if split.startswith("easy_") else ("room", "street")
    return draw, draw.choice(kinds), draw.choice(tuple(LENSES))


def aim(scene: Scene, kind: str, lens: str, size: tuple[int, int], shares: list[float]) -> caster.Camera:
    """The camera at the scene's eye; `shares` are five numbers in [0, 1)."""
    width, height = size
    lo, hi = LENSES[lens]
    focal = max((lo + (hi - lo) * shares[0]) * width, LENSES["wide"][0] * height)
    # tangents of half angles: pitch -21..6 degrees in rooms and -11..7 in streets, roll +-4
    down, up = (-0.1, 0.06) if kind == "street" else (-0.18, 0.05)
    pitch, roll = tilt(down + (up - down) * shares[1]), tilt(0.07 * shares[2] - 0.035)
    cx, cy = ((n - 1) / 2 + 0.06 * (share - 0.5) * n for n, share in ((width, shares[3]), (height, shares[4])))
    return caster.look(scene.eye, scene.gaze, pitch, roll, size, focal, cx, cy)


def develop(scene: Scene, camera: caster.Camera, depth: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The lit picture, uint8 (H, W, 3)."""
    colors, normal = caster.surfaces(camera, scene.parts, depth, part)
    upward = (normal[2] > 0.9).reshape(depth.shape)
    upward[upward] = scene.eye[2] + depth[upward] * camera.rays[2][upward] < 0.2
    dark = caster.shadows(camera, scene.parts, depth, upward, scene.light, scene.sun).ravel()
    light = in_street if scene.sun else in_room
    for k in range(0, part.size, caster.PIECE):
        piece = slice(k, k + caster.PIECE)
        index, rays = part.ravel()[piece], [q.ravel()[piece].astype(np.float32) for q in camera.rays]
        far = np.where(index >= 0, depth.ravel()[piece], 0).astype(np.float32)
        point = [p + far * q for p, q in zip(scene.eye, rays, strict=True)]
        lit = light(scene, colors[:, piece], normal[:, piece], point, dark[piece], far, index)
        if scene.sun:
            sky = np.flatnonzero(index < 0)
            lit[:, sky] = sky_colors(scene, [q[sky] for q in rays])
        colors[:, piece] = np.sqrt(np.clip(lit, np.float32(0), np.float32(1)))
    return caster.develop(colors, part)


def in_street(
    scene: Scene, albedo: Array, normal: Array, point: list[Array], dark: Array, depth: Array, index: Array
) -> Array:
    """Linear colours (3, N) under sun, sky and haze."""
    facing = sum(n * np.float32(q) for n, q in zip(normal, scene.light, strict=True))
    glow = scene.strength * np.maximum(facing, 0) * np.where(dark, np.float32(0.15), np.float32(1))
    linear = albedo * (scene.ambient * (0.8 + 0.2 * normal[2]) + glow)
    return linear + (caster.column(scene.horizon) - linear) * (depth / (depth + 350))


def in_room(
    scene: Scene, albedo: Array, normal: Array, point: list[Array], dark: Array, depth: Array, index: Array
) -> Array:
    """Linear colours (3, N) under a lamp, darker towards the corners."""
    to = [np.float32(q) - p for q, p in zip(scene.light, point, strict=True)]
    square = to[0] * to[0] + to[1] * to[1] + to[2] * to[2]
    facing = normal[0] * to[0] + normal[1] * to[1] + normal[2] * to[2]
    glow = scene.strength * np.maximum(facing, 0) / np.sqrt(square + 0.01) / (1 + square * 0.06)
    half_x, half_y, height = scene.walls
    corner = np.where(index == 0, np.float32(1 / 0.7), np.float32(1.05))  # a wall is next to itself
    for distance in (half_x - np.abs(point[0]), half_y - np.abs(point[1]), np.minimum(point[2], height - point[2])):
        near = distance * 5
        corner = corner * (1 - np.float32(0.3) / (1 + near * near))
    glow = np.where(dark, glow * np.float32(0.3), glow)
    return albedo * ((scene.ambient + glow) * corner * np.where(dark, np.float32(0.85), np.float32(1)))


def sky_colors(scene: Scene, rays: list[np.ndarray]) -> np.ndarray:
    """Colours (3, N) of the sky along rays."""
    x, y, z = rays
    up = np.clip(z / np.sqrt(x * x + y * y + z * z), 0, 1)
    out = caster.mix(scene.horizon, scene.zenith, np.minimum(up * 2, 1))
    if scene.clouds:
        u, v = x / (z + 0.15) * 2, y / (z + 0.15) * 2
        cloud = caster.noise(u, v, scene.clouds) * 0.65 + caster.noise(u * 3, v * 3, scene.clouds + 1) * 0.35
        out = caster.mix(out, caster.srgb("f8f8fa"), np.clip(cloud * 4 - 2, 0, 1) * np.minimum(up * 8, 1) * 0.85)
    return out


# Questions


@dataclass(slots=True)
class View:
    """How a thing is seen: z-depth in metres (lower median of its visible pixels), columns, and whether it is clear."""

    thing: Thing
    depth: float
    left: int
    right: int
    clear: bool


def ask(
    draw: Draw, scene: Scene, things: np.ndarray, depth: np.ndarray, alone: np.ndarray
) -> list[tuple[str, str, str]]:
    """Three to six (kind, question, answer) about what is clear and cannot be mistaken for something else; in a simple
    scene all that there are about distances.

    things (H, W): what each pixel shows; depth (H, W): z in metres; alone: pixels that each thing would fill by itself.
    """
    views = view(scene, things, depth, alone)
    names = [v.thing.name for v in views]
    named = [v for v in views if v.clear and v.thing.color and names.count(v.thing.name) == 1]
    gap = GAP * things.shape[1]

    places = [(v.thing.name, v.depth) for v in named]
    middle = depth[tuple(slice(n * 9 // 20, n * 11 // 20 + 1) for n in depth.shape)].ravel()
    if middle.min() > 0 and middle.max() < 1.1 * middle.min():
        places.append(("the middle of the picture", lower_median(middle)))
    distances = [("distance", f"How far is {name} from the camera, in meters?", f"{d:.1f}") for name, d in places]

    nearer = []
    for a, b in combinations(draw.shuffle(named), 2):
        if max(a.depth, b.depth) >= NEARER * min(a.depth, b.depth):
            answer = a if a.depth < b.depth else b
            nearer.append(("nearer", f"Which is nearer, {a.thing.name} or {b.thing.name}?", answer.thing.name))

    if not scene.kinds:
        return distances + nearer + nearest_thing(views, named)
    some, none, left = [], [], []
    for kind in scene.kinds:
        same = [v for v in views if v.thing.kind == kind]
        if all(v.clear for v in same):
            question = f"How many {PLURALS.get(kind, kind + 's')} are there?"
            (some if same else none).append(("count", question, str(len(same))))
        for v in named:
            others = [o for o in same if o is not v]
            before = [o for o in others if o.right < v.left - gap]
            after = [o for o in others if o.left > v.right + gap]
            if len(before) == 1 and len(after) == len(others) - 1 and before[0].clear and before[0].thing.color:
                left.append(("left", f"Which color is the {kind} left of {v.thing.name}?", before[0].thing.color))

    some, none = draw.shuffle(some), draw.shuffle(none)
    counts = none[:1] + some if draw.chance(0.2) else some + none[:1]
    if len(distances) + len(nearer) + len(left) + len(counts) < 3:
        counts = some + none
    piles = [draw.shuffle(distances), draw.shuffle(nearer), counts, draw.shuffle(left)]
    wanted = draw.integer(3, 6)
    by_turns = [pile[i] for i in range(wanted) for pile in draw.shuffle(piles) if i < len(pile)]
    return by_turns[:wanted]


def nearest_thing(views: list[View], named: list[View]) -> list[tuple[str, str, str]]:
    """The question which thing is nearest, where all that is seen has a name and one is nearer than the others."""
    if len(named) < max(2, len(views)):
        return []
    first, second = sorted(named, key=lambda v: v.depth)[:2]
    if second.depth < NEARER * first.depth:
        return []
    return [("nearest", "Which thing is nearest?", first.thing.name)]


def shown(draw: Draw, scene: Scene, things: np.ndarray, step: int) -> list[tuple[str, str, str]]:
    """Up to MOST_SPOTS questions which thing is at a place, whose surroundings show that thing alone."""
    questions, asked = {}, Counter()
    for _ in range(SPOTS):
        where, at, around = places.choose_place(draw, things.shape, step)
        name = scene.things[things[at]].name if scene.things[things[at]].color else ""
        question = f"Which thing is {where}?"
        if name and asked[name] < PER_THING and question not in questions and (things[around] == things[at]).all():
            questions[question] = ("thing", question, name)
            asked[name] += 1
        if len(questions) == MOST_SPOTS:
            break
    return list(questions.values())


def view(scene: Scene, things: np.ndarray, depth: np.ndarray, alone: np.ndarray) -> list[View]:
    """All things that are seen, in the scene's order."""
    order = np.argsort(things.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(things.ravel(), minlength=len(scene.things)))
    views = []
    for i in range(1, len(scene.things)):
        pixels = order[ends[i - 1] : ends[i]]
        if len(pixels) > SEEN * things.size:
            z, u = depth.ravel()[pixels], pixels % things.shape[1]
            clear = len(pixels) >= max(CLEAR * things.size, UNHIDDEN * alone[i]) and bool(z.min() > 0)
            views.append(View(scene.things[i], lower_median(z), int(u.min()), int(u.max()), clear))
    return views


class Procedural(Source):
    name = "procedural"
    title = "Procedural rooms and streets"
    page = "none: made by this code"
    licence = "Apache-2.0, with this project"
    citation = "DepthVLM-Bench, procedural rooms and streets"
    layout = "no raw folder: frames are drawn from their numbers"
    splits = {"train": ("train",), "test": ("test",)}
    depth_range = (0.3, 80.0)
    depth_scale = 512.0

    def __init__(self, raw: str | None = None, size: tuple[int, int] | None = None):
        """`raw` is not used; `size` (W, H) in px replaces the frames' sizes."""
        self.raw, self.size = raw, size

    def frames(self, split: str) -> Iterator[Frame]:
        (drawn,) = self.official_splits(split)
        for index in range(COUNTS[drawn]):
            _, kind, lens = begin(drawn, index)
            yield Frame(f"{split}/{index:09d}", f"{kind}-{index:09d}", lens, (drawn, index))

    def load(self, frame: Frame) -> Sample:
        return render(*frame.data, self.size)


SOURCE = Procedural
