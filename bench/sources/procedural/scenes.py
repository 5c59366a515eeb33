"""Rooms and streets for the `procedural` source, laid out from a seed out of things of their real sizes.

World frame and determinism: see render.py. Lengths are metres; colours are linear RGB.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import numpy as np

from .render import Face, Part, Vector, band, column, fade, mix, noise, pulse, scramble, srgb

Paint = Callable[[Face], np.ndarray]  # linear RGB (3, N) of the points of a face
COLORS = {
    "red": srgb("ce1e22"),
    "orange": srgb("f88414"),
    "yellow": srgb("fcde28"),
    "green": srgb("229838"),
    "blue": srgb("2250d6"),
    "purple": srgb("8c34b0"),
    "white": srgb("f6f6f6"),
    "black": srgb("1a1a1c"),
}
WOODS = [srgb(c) for c in ("b08054", "96643e", "704830", "c8a476")]
WALLS = [srgb(c) for c in ("e2ded4 ece4cc ced8e0 ccdac8 e4cec8 bebec0 a6b6c4 d6c4a6 b0968c").split()]
SKINS = [srgb(c) for c in ("e8bea0", "c6926e", "865a40", "5a3c2e")]
CLOTHES = [srgb(c) for c in ("30364c", "28282a", "787064", "545c6e")]
LEAVES = [srgb(c) for c in ("40682c", "587834", "305834", "7a7c38")]
PLASTERS = [srgb(c) for c in ("ded0b2 ccc6be d6b28c be9682 b0babe e4dece a87864 969e8c cebe78").split()]
BRICKS = [srgb(c) for c in ("965240", "a8684e", "7c4a3e", "ba9674")]
ROOFS = [srgb(c) for c in ("8e4838", "545256", "6e584c")]
PALE, STEEL, DARK, GLASS, STONE = (srgb(c) for c in ("e4e2dc", "707478", "262426", "3a4858", "bebcb6"))


class Draw:
    """Random numbers of one frame, made from Philox's raw words, whose stream NumPy fixes for all versions."""

    def __init__(self, key: int, index: int):
        self.word = np.random.Philox(key=(key << 64) + index).random_raw

    def uniform(self, lo: float = 0.0, hi: float = 1.0) -> float:
        return lo + (hi - lo) * ((self.word() >> 11) * 2.0**-53)

    def integer(self, lo: int, hi: int) -> int:
        """A whole number in lo..hi, both included."""
        return lo + (self.word() * (hi - lo + 1) >> 64)

    def chance(self, share: float) -> bool:
        return self.uniform() < share

    def choice(self, values: Sequence) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def shuffle(self, values: Iterable) -> list:
        values = list(values)
        for i in range(len(values) - 1, 0, -1):
            j = self.integer(0, i)
            values[i], values[j] = values[j], values[i]
        return values

    def seed(self) -> int:
        return self.integer(0, 2**31)

    def turn(self) -> tuple[float, float]:
        """(cosine, sine) of any angle."""
        while True:
            x, y = self.uniform(-1, 1), self.uniform(-1, 1)
            if 0.01 < x * x + y * y < 1:
                return unit(x, y)


def tilt(t: float) -> tuple[float, float]:
    """(cosine, sine) of the angle whose half has the tangent t; 0.1 stands for 11 degrees."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def unit(x: float, y: float) -> tuple[float, float]:
    length = sqrt(x * x + y * y)
    return x / length, y / length


# Scene


@dataclass(frozen=True, slots=True)
class Thing:
    """What a question may name. color: a name from COLORS, or "" for what has none."""

    kind: str
    color: str = ""

    @property
    def name(self) -> str:
        return f"the person in {self.color}" if self.kind == "person" else f"the {self.color} {self.kind}"


@dataclass(slots=True)
class Scene:
    """Solids, the things that they make up (0 is the surroundings), the light, and the eye.

    kinds: what "how many" may ask for. light: the direction to the sun, or the place of a room's lamp.
    eye: the camera's position; gaze: (cosine, sine) of its yaw from +y to +x.
    """

    kinds: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    things: list[Thing] = field(default_factory=lambda: [Thing("")])
    taken: list[tuple[float, float, float]] = field(default_factory=list)  # ground in use: x, y, radius
    sun: bool = False
    light: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ambient: float = 0.5
    strength: float = 0.6
    horizon: tuple[float, float, float] = PALE
    zenith: tuple[float, float, float] = PALE
    clouds: int = 0  # seed, 0 for none
    walls: tuple[float, float, float] | None = None  # of a room: half width, half length, height
    eye: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gaze: tuple[float, float] = (1.0, 0.0)
    # Where `add` puts solids: origin, (cosine, sine) of the turn, thing
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[float, float] = (1.0, 0.0)
    thing: int = 0

    def begin(
        self, x: float, y: float, z: float = 0.0, turn: tuple[float, float] = (1.0, 0.0), thing: Thing | None = None
    ) -> None:
        """Solids added next stand at (x, y, z), front towards their local -y; without a thing they are scenery."""
        self.origin, self.turn, self.thing = (x, y, z), turn, 0
        if thing:
            self.things.append(thing)
            self.thing = len(self.things) - 1

    def add(self, shape: str, center: Vector, size: Vector, paint: Vector | Paint, **more) -> None:
        """A solid by its centre and full sizes in the frame set by `begin`."""
        (x, y, z), (c, s) = self.origin, self.turn
        world = (x + c * center[0] - s * center[1], y + s * center[0] + c * center[1], z + center[2])
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        self.parts.append(Part(shape, world, half, paint, self.turn, thing=self.thing, **more))

    def box(self, center: Vector, size: Vector, paint: Vector | Paint, **more) -> None:
        self.add("box", center, size, paint, **more)

    def take(self, x: float, y: float, radius: float) -> bool:
        """Claim a circle of ground; False when some of it is in use."""
        for a, b, c in self.taken:
            if (x - a) * (x - a) + (y - b) * (y - b) < (radius + c) * (radius + c):
                return False
        self.taken.append((x, y, radius))
        return True


# Paints: functions of a Face that return colours (3, N)


def mottled(color: Vector, seed: int, size: float = 0.5, amount: float = 0.12) -> Paint:
    """One colour with soft cloudy marks."""

    def paint(f: Face):
        cloud = (noise(f.a / size, f.b / size, seed) - 0.5) * fade(np.maximum(f.wa, f.wb) / size)
        return column(color) * (1 + amount * cloud)

    return paint


def rough(color: Vector, seed: int, size: float, amount: float) -> Paint:
    """Grain at two scales: asphalt, grass, carpet."""

    def paint(f: Face):
        width = np.maximum(f.wa, f.wb) / size
        fine = (scramble(np.floor(f.a / size), np.floor(f.b / size), seed) - 0.5) * fade(width)
        coarse = noise(f.a / (20 * size), f.b / (20 * size), seed + 1) - 0.5
        return column(color) * (1 + amount * (fine + coarse * fade(width / 20)))

    return paint


def tiles(color: Vector, joint: Vector, seed: int, size: float, gap: float = 0.012, vary: float = 0.15) -> Paint:
    """Square tiles of `size`, each with its own shade."""

    def paint(f: Face):
        a, b, wa, wb = f.a / size, f.b / size, f.wa / size, f.wb / size
        shade = 1 + vary * (scramble(np.floor(a), np.floor(b), seed) - 0.5) * fade(np.maximum(wa, wb))
        lines = 1 - (1 - pulse(a, wa, gap / size)) * (1 - pulse(b, wb, gap / size))
        return mix(column(color) * shade, joint, lines)

    return paint


def checker(first: Vector, second: Vector, size: float) -> Paint:
    def paint(f: Face):
        period = 2 * size
        a, b = (2 * pulse(q / period, w / period, 0.5) - 1 for q, w in ((f.a, f.wa), (f.b, f.wb)))
        return mix(first, second, 0.5 + 0.5 * a * b)

    return paint


def rows(
    color: Vector,
    joint: Vector,
    seed: int,
    length: float,
    height: float,
    gap: float,
    vary: float,
    upright: bool = False,
) -> Paint:
    """Bricks or boards: cells `length` along, `height` across, shifted from row to row; `upright` lays rows along b."""

    def paint(f: Face):
        a, b, wa, wb = (f.b, f.a, f.wb, f.wa) if upright else (f.a, f.b, f.wa, f.wb)
        b, wb = b / height, wb / height
        row = np.floor(b)
        a, wa = a / length + (scramble(row, row, seed) if upright else 0.5 * (row - 2 * np.floor(row / 2))), wa / length
        shade = 1 + vary * (scramble(np.floor(a), row, seed + 1) - 0.5) * fade(np.maximum(wa, wb))
        lines = 1 - (1 - pulse(a, wa, gap / length)) * (1 - pulse(b, wb, gap / height))
        return mix(column(color) * shade, joint, lines)

    return paint


def bricks(color: Vector, seed: int) -> Paint:
    """Courses of 1/12 m, bricks of 1/4 m."""
    return rows(color, srgb("c4beb4"), seed, 0.25, 1 / 12, 0.012, 0.35)


def planks(color: Vector, seed: int) -> Paint:
    """Boards of 0.15 by 1.8 m along b."""
    return rows(color, darker(color, 0.35), seed, 1.8, 0.15, 0.006, 0.4, upright=True)


def stripes(first: Vector, second: Vector, width: float) -> Paint:
    """Upright stripes."""
    return lambda f: mix(first, second, pulse(f.a / (2 * width), f.wa / (2 * width), 0.5))


def darker(color: Vector, share: float) -> Vector:
    return tuple(share * q for q in color)


def rectangle(f: Face, a0: float, a1: float, b0: float, b1: float) -> np.ndarray:
    """Share of each pixel that lies in a0..a1 by b0..b1 of the face."""
    return band(f.a, f.wa, a0, a1) * band(f.b, f.wb, b0, b1)


# Things, each by its real size


def ball(scene: Scene, draw: Draw, color: Vector) -> None:
    size = draw.uniform(0.5, 0.7)
    scene.add("ellipsoid", (0, 0, size / 2), (size, size, size), color)


def crate(scene: Scene, draw: Draw, color: Vector) -> None:
    w, h = draw.uniform(0.45, 0.8), draw.uniform(0.4, 0.8)

    def paint(f: Face):
        rim = rectangle(f, -w / 2 + 0.04, w / 2 - 0.04, -w / 2, w / 2)
        if f.axis != 2:
            rim = band(f.a, f.wa, -w / 2 + 0.04, w / 2 - 0.04) * band(f.b, f.wb, -h / 2 + 0.04, h / 2 - 0.04)
        return mix(darker(color, 0.6), color, rim)

    scene.box((0, 0, h / 2), (w, w, h), paint)


def post(scene: Scene, draw: Draw, color: Vector) -> None:
    """A bollard, 1 m high, with a pale ring."""
    scene.add("cylinder", (0, 0, 0.5), (0.18, 0.18, 1.0), lambda f: mix(color, PALE, band(f.z, f.wb, 0.25, 0.37)))
    scene.add("ellipsoid", (0, 0, 1.0), (0.18, 0.18, 0.12), color)


def table(scene: Scene, draw: Draw, color: Vector) -> None:
    w, d, h = draw.uniform(1.2, 1.8), draw.uniform(0.7, 0.9), 0.74
    scene.box((0, 0, h - 0.03), (w, d, 0.05), color)
    for x in (-1, 1):
        for y in (-1, 1):
            leg = x * (w / 2 - 0.06), y * (d / 2 - 0.06), h / 2 - 0.03
            scene.box(leg, (0.06, 0.06, h - 0.06), darker(color, 0.8))


def chair(scene: Scene, draw: Draw, color: Vector) -> None:
    scene.box((0, 0, 0.45), (0.44, 0.44, 0.05), color)
    scene.box((0, 0.2, 0.72), (0.44, 0.04, 0.36), color)
    for x in (-0.19, 0.19):
        scene.box((x, -0.19, 0.215), (0.045, 0.045, 0.43), darker(color, 0.75))
        scene.box((x, 0.2, 0.27), (0.045, 0.045, 0.54), darker(color, 0.75))


def sofa(scene: Scene, draw: Draw, color: Vector) -> None:
    w = draw.uniform(1.7, 2.2)

    def seam(f: Face):
        return mix(color, darker(color, 0.5), band(f.a, f.wa, -0.012, 0.012))

    scene.box((0, 0, 0.24), (w, 0.85, 0.36), seam)
    scene.box((0, 0.33, 0.62), (w, 0.2, 0.42), seam)
    for x in (-1, 1):
        scene.box((x * (w / 2 + 0.08), 0, 0.32), (0.17, 0.85, 0.6), darker(color, 0.85))


def shelf(scene: Scene, draw: Draw, color: Vector) -> None:
    """A bookcase 0.32 m deep, its shelves 0.35 m apart."""
    w, d, n = draw.uniform(0.8, 1.2), 0.32, 5
    h = n * 0.35 + 0.1
    scene.box((0, d / 2 - 0.01, h / 2), (w, 0.02, h), darker(color, 0.6))
    for x in (-1, 1):
        scene.box((x * (w / 2 - 0.015), 0, h / 2), (0.03, d, h), color)
    for i in range(n + 1):
        scene.box((0, 0, 0.08 + 0.35 * i), (w - 0.06, d, 0.03), color)
    for i in range(n):
        if draw.chance(0.8):
            length, height, seed = draw.uniform(0.4, 0.95) * (w - 0.06), draw.uniform(0.2, 0.27), draw.seed()

            def books(f: Face, seed=seed):
                a, spread = f.a / 0.04, fade(f.wa / 0.04)
                i = np.floor(a)
                hue = [0.35 + (scramble(i, i, seed + k) - 0.5) * 0.6 * spread for k in range(3)]
                return np.array(hue) * (1 - 0.7 * pulse(a, f.wa / 0.04, 0.12))

            left = (length - (w - 0.06)) / 2 if draw.chance(0.5) else ((w - 0.06) - length) / 2
            scene.box((left, 0.04, 0.095 + 0.35 * i + height / 2), (length, 0.2, height), books)


def person(scene: Scene, draw: Draw, color: Vector) -> None:
    """1.55 to 1.9 m tall; the colour is that of the shirt."""
    k = draw.uniform(1.55, 1.9) / 1.75
    skin, trousers, hair = draw.choice(SKINS), draw.choice(CLOTHES), draw.choice((DARK, WOODS[2], WOODS[1], STEEL))
    stride = draw.uniform(0.0, 0.12)
    for x in (-1, 1):
        scene.add("cylinder", (x * 0.09 * k, x * stride, 0.44 * k), (0.15 * k, 0.17 * k, 0.88 * k), trousers)
        scene.box((x * 0.09 * k, x * stride - 0.05, 0.04), (0.11 * k, 0.26 * k, 0.08), DARK)
        scene.add("cylinder", (x * 0.25 * k, -x * stride, 1.14 * k), (0.11 * k, 0.13 * k, 0.6 * k), color)
        scene.add("ellipsoid", (x * 0.25 * k, -x * stride, 0.8 * k), (0.1 * k, 0.1 * k, 0.16 * k), skin)
    scene.add("cylinder", (0, 0, 1.14 * k), (0.42 * k, 0.25 * k, 0.58 * k), color)
    scene.add("ellipsoid", (0, 0, 1.43 * k), (0.42 * k, 0.25 * k, 0.14 * k), color)
    scene.add("cylinder", (0, 0, 1.5 * k), (0.11 * k, 0.11 * k, 0.12 * k), skin)
    scene.add("ellipsoid", (0, 0, 1.62 * k), (0.17 * k, 0.2 * k, 0.25 * k), skin)
    scene.add("ellipsoid", (0, 0.025 * k, 1.655 * k), (0.185 * k, 0.19 * k, 0.2 * k), hair)


def plant(scene: Scene, draw: Draw, color: Vector | None = None) -> None:
    leaf, seed, h = draw.choice(LEAVES), draw.seed(), draw.uniform(0.5, 1.0)
    scene.add("cylinder", (0, 0, 0.17), (0.34, 0.34, 0.34), srgb("a45c42"))
    for i in range(3):
        x, y = draw.uniform(-0.12, 0.12), draw.uniform(-0.12, 0.12)
        z = 0.34 + h * (0.35 + 0.2 * i)
        scene.add("ellipsoid", (x, y, z), (0.5, 0.5, 0.7 * h), rough(leaf, seed + i, 0.07, 0.9))


def door(scene: Scene, draw: Draw, color: Vector) -> None:
    """0.9 by 2.05 m with its frame, panels and handle, against the wall."""
    frame, style = draw.choice((PALE, darker(color, 0.7), WOODS[1])), draw.integer(0, 2)

    def paint(f: Face):
        inner = 0.0
        for b0, b1 in (((-0.9, -0.1), (0.05, 0.9)), ((-0.9, 0.9),), ((0.1, 0.85),))[style]:
            for a0, a1 in ((-0.34, -0.04), (0.04, 0.34)) if style == 0 else ((-0.33, 0.33),):
                grown = rectangle(f, a0, a1, b0, b1)
                inner = inner + grown - rectangle(f, a0 + 0.03, a1 - 0.03, b0 + 0.03, b1 - 0.03)
        return mix(color, darker(color, 0.45), np.clip(inner, 0, 1))

    scene.box((0, 0.02, 1.06), (1.08, 0.04, 2.12), frame)
    scene.box((0, 0, 1.025), (0.9, 0.04, 2.05), paint)
    side = draw.choice((-0.38, 0.38))
    scene.box((side * 0.9, -0.04, 1.02), (0.13, 0.03, 0.025), STEEL)
    scene.box((side, -0.03, 1.0), (0.04, 0.02, 0.2), STEEL)


def window(scene: Scene, draw: Draw, color: Vector | None = None) -> None:
    """A window of 1.2 by 1.3 m, its sill 0.9 m above the floor; what is behind it is painted on."""
    sky, land = srgb("cee2f6"), srgb("769660")

    def paint(f: Face):
        bars = 1 - (1 - band(f.a, f.wa, -0.025, 0.025)) * (1 - band(f.b, f.wb, 0.1, 0.14))
        return mix(mix(sky, land, band(f.b, f.wb, -1.0, -0.25)), srgb("f0f0ee"), bars)

    scene.box((0, 0.02, 1.55), (1.36, 0.04, 1.46), srgb("f0f0ee"))
    scene.box((0, 0, 1.55), (1.2, 0.03, 1.3), paint)
    scene.box((0, -0.03, 0.8), (1.5, 0.16, 0.04), srgb("e8e6e2"))


def picture(scene: Scene, draw: Draw, color: Vector | None = None) -> None:
    w, h, seed = draw.uniform(0.4, 1.0), draw.uniform(0.4, 0.7), draw.seed()
    low, high = (darker(q, 0.8) for q in (draw.choice(WALLS), draw.choice(BRICKS + LEAVES + PLASTERS)))

    def paint(f: Face):
        hills = np.clip((noise(f.a / 0.25, f.b / 0.9, seed) - 0.45 + f.b) * 9, 0, 1)
        inside = rectangle(f, -w / 2 + 0.03, w / 2 - 0.03, -h / 2 + 0.03, h / 2 - 0.03)
        return mix(DARK, mix(high, low, hills), inside)

    scene.box((0, 0, 1.6), (w, 0.03, h), paint)


# Rooms

# Builder, width and thickness in m, whether it stands on the floor
WALL_THINGS = {
    "door": (door, 1.1, 0.06, False),
    "window": (window, 1.6, 0.05, False),
    "picture": (picture, 1.1, 0.04, False),
    "shelf": (shelf, 1.3, 0.34, True),
    "sofa": (sofa, 2.6, 0.88, True),
    "plant": (plant, 0.7, 0.6, True),
}
FACING = ((1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # turn of what stands at the wall +y, -y, +x, -x


def room(draw: Draw, spread: float) -> Scene:
    """A room, corridor or hall; spread: metres seen to each side per metre ahead, about."""
    kind = draw.choice(("room", "room", "room", "corridor", "hall"))
    scene = Scene(("ball", "box", "table", "chair", "sofa", "shelf", "person", "door", "post"))
    if kind == "corridor":
        width, length, height = draw.uniform(1.6, 2.4), draw.uniform(7.0, 12.5), draw.uniform(2.3, 2.8)
    elif kind == "hall":
        width, length, height = draw.uniform(6.5, 10.0), draw.uniform(9.0, 13.0), draw.uniform(3.2, 4.2)
        scene.kinds = ("ball", "box", "table", "chair", "sofa", "shelf", "person", "door", "column")
    else:
        width, length, height = draw.uniform(2.8, 6.0), draw.uniform(3.2, 8.0), draw.uniform(2.35, 2.9)
    hx, hy = enclose(scene, draw, width, length, height)

    # The eye stands near an end and looks along the room, sometimes across it.
    margin = min(0.6, 0.3 * hx)
    x, y = draw.uniform(-hx + margin, hx - margin), draw.uniform(-hy + 0.35, -0.35 * hy)
    tx, ty = draw.uniform(-0.6 * hx, 0.6 * hx), draw.uniform(0.3 * hy, hy)
    if kind != "corridor" and draw.chance(0.25):
        ty = draw.uniform(-0.3 * hy, 0.6 * hy)
        tx = -hx if x > 0 else hx
    scene.eye = x, y, draw.uniform(1.0, 1.8)
    sine, cosine = unit(tx - x, ty - y)
    scene.gaze = cosine, sine
    scene.taken.append((x, y, 0.75))
    scene.taken.append((x + sine * 0.9, y + cosine * 0.9, 0.5))

    scene.begin(scene.light[0], scene.light[1], height)
    glow = (1.6, 1.55, 1.45)
    if draw.chance(0.5):
        scene.box((0, 0, -0.03), (0.6, 0.6, 0.06), glow, shadow=False)
    else:
        scene.add("ellipsoid", (0, 0, -0.1), (0.45, 0.45, 0.25), glow, shadow=False)
    furnish_walls(scene, draw, wall_things(draw, kind), kind == "corridor")
    if kind == "hall" and draw.chance(0.7):
        columns(scene, draw)
    if kind != "corridor" and draw.chance(0.45):
        rug(scene, draw)
    kinds = ["ball", "box", "chair", "person", "table", "post"]
    if kind == "corridor":
        kinds = kinds[:4]
    elif kind == "hall":
        kinds.remove("post")  # a column would be taken for one
    count = draw.choice((1, 2, 3, 4) if kind == "corridor" else (1, 3, 4, 5, 6, 7, 8, 10))
    scatter(scene, draw, kinds, count, spread)
    return scene


def enclose(scene: Scene, draw: Draw, width: float, length: float, height: float) -> tuple[float, float]:
    """Floor, walls, ceiling and the light of a room in m; returns half its width and half its length."""
    hx, hy = width / 2, length / 2
    scene.walls = hx, hy, height
    scene.light = draw.uniform(-0.3, 0.3) * hx, draw.uniform(-0.3, 0.5) * hy, height - 0.25
    scene.ambient, scene.strength = draw.uniform(0.42, 0.6), draw.uniform(0.5, 0.85)
    scene.add("room", (0, 0, height / 2), (width, length, height), room_paint(draw, height), shadow=False)
    return hx, hy


def simple_room(draw: Draw, spread: float) -> Scene:
    """A room with two to four things before the camera, no two of one colour, and pictures on its walls."""
    scene = Scene(())
    width, length, height = draw.uniform(3.4, 6.0), draw.uniform(5.0, 8.0), draw.uniform(2.35, 2.9)
    hx, hy = enclose(scene, draw, width, length, height)
    x, y = draw.uniform(-0.5, 0.5) * hx, 0.35 - hy
    scene.eye = x, y, draw.uniform(1.0, 1.8)
    sine, cosine = unit(draw.uniform(-0.5, 0.5) * hx - x, hy - y)
    scene.gaze = cosine, sine
    scene.taken.append((x, y, 0.75))
    furnish_walls(scene, draw, ["picture"] * draw.integer(0, 3) + ["window"] * draw.integer(0, 2))
    colors = draw.shuffle(COLORS)
    for color in colors[: draw.integer(2, 4)]:
        kind = draw.choice(("ball", "box", "chair", "person", "post", "table"))
        build, radius = THINGS[kind]
        for _ in range(20):
            ahead = draw.uniform(1.6, 5.5)
            aside = draw.uniform(-0.7, 0.7) * spread * ahead
            at = x + sine * ahead + cosine * aside, y + cosine * ahead - sine * aside
            if all(abs(q) < h - radius - 0.05 for q, h in zip(at, (hx, hy), strict=True)) and scene.take(*at, radius):
                scene.begin(*at, turn=draw.turn(), thing=Thing(kind, color))
                build(scene, draw, COLORS[color])
                break
    return scene


def room_paint(draw: Draw, height: float) -> Paint:
    seed = draw.seed()
    floor = draw.integer(0, 6)
    wood, grey = draw.choice(WOODS), draw.uniform(0.2, 0.6)
    floors = (
        lambda: planks(wood, seed),
        lambda: planks(wood, seed),
        lambda: tiles(srgb("d6d0c6"), srgb("78746e"), seed, 0.6, 0.014),
        lambda: tiles(srgb("b06244"), srgb("cec2b0"), seed, 0.3, 0.014, 0.3),
        lambda: checker(srgb("e4e0d6"), draw.choice((DARK, srgb("782824"), srgb("344c68"))), 0.4),
        lambda: rough(draw.choice((srgb("787a84"), srgb("947e68"), srgb("5c6c80"))), seed, 0.03, 0.35),
        lambda: mottled((grey, grey, grey * 0.96), seed, 0.7, 0.3),
    )
    ground = floors[floor]()
    color = draw.choice(WALLS)
    wall = draw.choice(
        (
            lambda: mottled(color, seed),
            lambda: mottled(color, seed),
            lambda: stripes(color, darker(color, 0.86), 0.1),
            lambda: bricks(draw.choice(BRICKS), seed),
            lambda: tiles(srgb("e8eae8"), srgb("aaacac"), seed, 0.2, 0.01, 0.06),
            lambda: rows(srgb("c8c8c4"), srgb("969694"), seed, 0.4, 0.2, 0.014, 0.15),
        )
    )()
    above = tiles(srgb("eeeeea"), srgb("b0b0b0"), seed, 0.6, 0.03, 0.04) if draw.chance(0.35) else srgb("f0eeea")
    board = draw.choice((PALE, wood, darker(color, 0.5)))

    def paint(f: Face):
        if f.axis == 2:
            if f.positive:
                return above(f) if callable(above) else column(above)
            return ground(f)
        f = replace(f, b=f.b + height / 2)
        return mix(wall(f), board, band(f.b, f.wb, -1.0, 0.1))

    return paint


def wall_things(draw: Draw, kind: str) -> list[str]:
    """What stands and hangs along the walls of a room, corridor or hall."""
    if kind == "corridor":
        return ["door"] * draw.integer(3, 7) + ["picture"] * draw.integer(0, 3)
    wanted = ["door"] * draw.integer(1, 2) + ["window"] * draw.integer(0, 3) + ["picture"] * draw.integer(0, 3)
    for item, counts in (("shelf", (0, 0, 1, 1, 2)), ("sofa", (0, 0, 1)), ("plant", (0, 0, 1, 2))):
        wanted += [item] * draw.choice(counts)
    return wanted


def furnish_walls(scene: Scene, draw: Draw, wanted: list[str], corridor: bool = False) -> None:
    """Things of WALL_THINGS along the walls, none over another; of a corridor mostly along its sides."""
    hx, hy, _ = scene.walls
    spans = [[] for _ in FACING]  # of each wall, what hangs there: middle and width

    def hang(wall: int, width: float, depth: float, on_floor: bool) -> tuple[float, float] | None:
        """The place of something `depth` m thick at a free stretch of wall; None if none is found."""
        half = hx if wall < 2 else hy
        if 2 * half < width + 0.2:
            return None
        for _ in range(6):
            s = draw.uniform(-half + width / 2 + 0.1, half - width / 2 - 0.1)
            if all(abs(s - q) > (width + w) / 2 + 0.08 for q, w in spans[wall]):
                d = depth / 2 + 0.01
                x, y = ((s, hy - d), (s, -hy + d), (hx - d, s), (-hx + d, s))[wall]
                if on_floor and not scene.take(x, y, width / 2):
                    continue
                spans[wall].append((s, width))
                return x, y
        return None

    for i, item in enumerate(wanted):
        wall = draw.choice((0, 0, 2, 3)) if not corridor else (0 if i == 0 else draw.choice((2, 3)))
        color = draw.choice([*COLORS, "", "", "", ""])
        paint = COLORS.get(color) or draw.choice(WOODS)
        build, width, depth, on_floor = WALL_THINGS[item]
        at = hang(wall, width, depth, on_floor)
        if at:
            thing = None if build in (window, picture) else Thing(item, "" if build is plant else color)
            scene.begin(*at, turn=FACING[wall], thing=thing)
            build(scene, draw, paint)


def columns(scene: Scene, draw: Draw) -> None:
    """Two rows of columns."""
    hx, hy, height = scene.walls
    side, color, step = draw.choice((0.34, 0.42)), draw.choice((PALE, WALLS[5], BRICKS[3])), draw.uniform(2.6, 3.6)
    for i in range(int(2 * hy / step)):
        for x in (-hx / 2, hx / 2):
            y = -hy + step * (i + 0.7)
            if y < hy - 0.5 and scene.take(x, y, side * 0.75):
                scene.begin(x, y, thing=Thing("column"))
                scene.add("cylinder", (0, 0, height / 2), (side, side, height), color)
                scene.box((0, 0, 0.1), (side + 0.1, side + 0.1, 0.2), darker(color, 0.8))
                scene.box((0, 0, height - 0.1), (side + 0.1, side + 0.1, 0.2), darker(color, 0.9))


def rug(scene: Scene, draw: Draw) -> None:
    hx, hy, _ = scene.walls
    size = min(draw.uniform(1.4, 2.4), 2 * hx - 1), min(draw.uniform(1.8, 3.0), 2 * hy - 1), 0.012
    first, second = draw.choice(BRICKS + WALLS), draw.choice(CLOTHES + WALLS)
    paint = stripes(first, second, 0.15) if draw.chance(0.5) else rough(first, draw.seed(), 0.03, 0.5)
    scene.begin(draw.uniform(-0.3, 0.3), draw.uniform(0, 0.4 * hy))
    scene.box((0, 0, 0.006), size, paint, shadow=False)


def scatter(scene: Scene, draw: Draw, kinds: list[str], count: int, spread: float) -> None:
    """Things on the floor of a room, most of them in view and within reach of a question."""
    hx, hy, _ = scene.walls
    x0, y0, _ = scene.eye
    cosine, sine = scene.gaze
    favourite = draw.choice(kinds)
    colors = draw.shuffle(COLORS)
    for i in range(count):
        kind = favourite if draw.chance(0.35) else draw.choice(kinds)
        build, radius = THINGS[kind]
        if min(hx, hy) < radius + 0.25:
            continue
        color = colors[i % len(colors)]
        for _ in range(10):
            ahead = draw.uniform(1.4, 8.0)
            aside = draw.uniform(-0.85, 0.85) * spread * ahead
            x, y = x0 + sine * ahead + cosine * aside, y0 + cosine * ahead - sine * aside
            if abs(x) < hx - radius - 0.05 and abs(y) < hy - radius - 0.05 and scene.take(x, y, radius):
                turn = draw.choice(FACING) if kind in ("table", "chair") and draw.chance(0.7) else draw.turn()
                scene.begin(x, y, turn=turn, thing=Thing(kind, color))
                build(scene, draw, COLORS[color])
                break


# Streets


def car(scene: Scene, draw: Draw, color: Vector) -> None:
    """4.3 by 1.8 by 1.45 m, wheels of 0.64 m."""

    def body(f: Face):
        sill = band(f.b, f.wb, -1.0, -0.2)
        if f.axis == 1:
            lamp = band(np.abs(f.a), f.wa, 0.55, 0.84) * band(f.b, f.wb, 0.02, 0.18)
            plate = rectangle(f, -0.26, 0.26, -0.14, -0.03)
            out = mix(color, srgb("be1414") if f.positive else (1.0, 1.0, 0.85), lamp)
            if not f.positive:
                out = mix(out, DARK, rectangle(f, -0.5, 0.5, 0.03, 0.16))
            return mix(mix(out, srgb("f0f0e8"), plate), DARK, sill)
        if f.axis == 0:
            seams = sum(band(f.a, f.wa, q, q + 0.015) for q in (-0.75, 0.28, 1.2)) * band(f.b, f.wb, -0.2, 0.3)
            handle = (rectangle(f, 0.05, 0.22, 0.14, 0.18) + rectangle(f, 0.95, 1.12, 0.14, 0.18)) * 0.6
            return mix(mix(color, darker(color, 0.3), np.minimum(seams + handle, 1)), DARK, sill)
        return column(color)

    def cabin(f: Face):
        up = band(f.b, f.wb, -0.24, 0.2)
        if f.axis == 1:
            glass = up * band(f.a, f.wa, -0.66, 0.66)
        elif f.axis == 0:
            glass = up * (band(f.a, f.wa, -0.92, -0.02) + band(f.a, f.wa, 0.06, 0.86))
        else:
            return column(color)
        return mix(color, GLASS, glass)

    scene.box((0, 0, 0.55), (1.78, 4.3, 0.6), body, taper=(0.06, 0.1))
    scene.box((0, 0.25, 1.13), (1.62, 2.75, 0.58), cabin, taper=(0.24, 1.1))
    for x in (-0.81, 0.81):
        for y in (-1.33, 1.33):
            scene.add("cylinder", (x, y, 0.32), (0.22, 0.64, 0.64), wheel, axis=0)


def wheel(f: Face) -> np.ndarray:
    hub = np.clip((0.2 - np.sqrt(f.y * f.y + f.z * f.z)) / np.maximum(f.wa, np.float32(0.01)) + 0.5, 0, 1)
    return mix(srgb("1e1e20"), STEEL, hub if f.axis == 0 else 0 * hub)


def tree(scene: Scene, draw: Draw, color: Vector | None = None) -> None:
    h, leaf, seed = draw.uniform(4.5, 8.0), draw.choice(LEAVES), draw.seed()
    scene.add("cylinder", (0, 0, 0.25 * h), (0.28, 0.28, 0.5 * h), srgb("5c4836"))
    for i in range(draw.integer(2, 4)):
        w = draw.uniform(0.35, 0.5) * h
        x, y = draw.uniform(-0.15, 0.15) * h, draw.uniform(-0.15, 0.15) * h
        scene.add("ellipsoid", (x, y, (0.58 + 0.1 * i) * h), (w, w, 0.85 * w), rough(leaf, seed + i, 0.16, 0.8))


def lamp(scene: Scene, draw: Draw, color: Vector | None = None) -> None:
    """A street lamp 6 m high; its arm reaches along its local -y."""
    scene.add("cylinder", (0, 0, 3.0), (0.14, 0.14, 6.0), STEEL)
    scene.add("cylinder", (0, 0, 0.4), (0.24, 0.24, 0.8), darker(STEEL, 0.7))
    scene.add("cylinder", (0, -0.6, 5.95), (0.08, 1.3, 0.08), STEEL, axis=1)
    scene.box((0, -1.3, 5.92), (0.28, 0.6, 0.12), PALE)


def house(scene: Scene, draw: Draw, width: float, depth: float, storeys: int, suburb: bool) -> None:
    """Storeys of 3 m, windows of 1.1 by 1.4 m, doors of 2.05 m; its front looks along its local -y."""
    height = 3.0 * storeys + 0.4
    seed, bays = draw.seed(), max(2, int(width / 2.7))
    bay, side_bay = width / bays, depth / max(2, int(depth / 3.2))
    color = draw.choice(PLASTERS)
    wall = draw.choice((mottled(color, seed, 1.5), mottled(color, seed, 1.5), bricks(draw.choice(BRICKS), seed)))
    trim = draw.choice((PALE, darker(color, 0.6), srgb("f5f5f0")))
    front_door = draw.choice((*COLORS.values(), *WOODS))
    shop = not suburb and draw.chance(0.35)

    def paint(f: Face):
        if f.axis == 2:
            return column(srgb("605e5c"))
        f = replace(f, a=f.a + (width if f.axis == 1 else depth) / 2, b=f.b + height / 2)
        size = bay if f.axis == 1 else side_bay
        a, wa, b, wb = f.a / size, f.wa / size, f.b / 3, f.wb / 3
        cell, level = np.floor(a), np.floor(b)
        half = 1.1 / size
        middle = a - 0.5 + half / 2  # the window's left edge is where this is whole
        upper = (level >= 1) & (level < storeys) if shop else (level < storeys)
        entry = (level == 0) & (cell == bays // 2) & (f.axis == 1)
        pane = pulse(middle, wa, half) * pulse(b - 0.32, wb, 1.4 / 3) * upper * ~entry
        rim = pulse(middle + 0.1 / size, wa, half + 0.2 / size) * pulse(b - 0.28, wb, 1.64 / 3) * upper * ~entry
        bright = scramble(cell, level, seed)
        glass = mix(GLASS, srgb("96a4b0"), bright * fade(wa) * 0.8)
        bars = pulse(middle - half / 2 + 0.03 / size, wa, 0.06 / size)
        out = mix(mix(wall(f), trim, rim), mix(glass, trim, bars), pane)
        out = mix(out, trim, band(f.b, f.wb, height - 0.3, height))
        if shop:
            out = mix(out, glass, band(f.b, f.wb, 0.5, 2.4) * (1 - pulse(a + 0.04, wa, 0.08)) * ~entry)
            out = mix(out, front_door, band(f.b, f.wb, 2.5, 3.0))
        leaf = band((a - cell) * size, f.wa, size / 2 - 0.48, size / 2 + 0.48) * band(f.b, f.wb, 0.0, 2.05) * entry
        return mix(out, front_door, leaf)

    scene.box((0, 0, height / 2), (width, depth, height), paint)
    if not suburb:
        scene.box((0, 0, height + 0.15), (width + 0.3, depth + 0.3, 0.3), darker(color, 0.7))
        return
    rise, eaves = draw.uniform(1.8, 3.2), 0.4
    roof = rows(draw.choice(ROOFS), DARK, seed, 0.3, 0.3, 0.03, 0.25)
    run = (depth if draw.chance(0.6) else width) / 2 + eaves
    size = (width + 2 * eaves, depth + 2 * eaves, rise)
    slope = (run - 0.1) / rise
    scene.box((0, 0, height + rise / 2), size, roof, taper=(0.0, slope) if run == size[1] / 2 else (slope, 0.0))
    if draw.chance(0.6):
        scene.box((0.25 * width, 0.1 * depth, height + rise * 0.75), (0.6, 0.6, rise + 0.5), BRICKS[0])


THINGS = {
    "ball": (ball, 0.35),
    "box": (crate, 0.55),
    "post": (post, 0.15),
    "table": (table, 0.95),
    "chair": (chair, 0.38),
    "person": (person, 0.4),
    "car": (car, 2.3),
    "tree": (tree, 0.6),
    "lamp": (lamp, 0.3),
}  # builder and radius of the ground that it needs, in m
KERB = 0.12


@dataclass(frozen=True, slots=True)
class Road:
    """A road along y with its middle at x = 0, in m.

    half: half its width, parking lane included; pavement: width beside it; front: x of the houses; end: y of the last.
    cross: y and half width of the road that crosses it; zebra: y where a zebra crossing begins; or None.
    """

    suburb: bool
    half: float
    parking: float
    pavement: float
    front: float
    end: float
    cross: tuple[float, float] | None
    zebra: float | None


def street(draw: Draw, spread: float) -> Scene:
    """A road between pavements and houses, often with a crossing; spread: as in `room`."""
    scene = Scene(("car", "person", "tree", "lamp", "post", "box", "ball"), sun=True)
    suburb = draw.chance(0.33)
    parking = 2.2 if draw.chance(0.6) else 0.0
    half = 3.25 + parking + (3.25 if draw.chance(0.2) else 0.0)
    pavement = draw.uniform(2.2, 4.0)
    front = half + pavement + (draw.uniform(2.5, 5.0) if suburb else draw.uniform(0.0, 0.5))
    cross = (draw.uniform(14.0, 45.0), draw.uniform(3.3, 4.5)) if draw.chance(0.45) else None
    zebra = cross[0] - cross[1] - 4.5 if cross else (draw.uniform(8.0, 30.0) if draw.chance(0.35) else None)
    road = Road(suburb, half, parking, pavement, front, draw.uniform(60.0, 120.0), cross, zebra)
    sky_and_sun(scene, draw)
    ground(scene, draw, road)
    rows_of_houses(scene, draw, road)

    # The eye: a driver's, a walker's, or one that looks at the houses across the road.
    view, side = draw.choice(("drive", "drive", "walk", "walk", "across")), draw.choice((-1.0, 1.0))
    if view == "drive":
        x, z = draw.uniform(-1.8, 2.8), draw.uniform(1.2, 2.4)
        cosine, sine = tilt(draw.uniform(-0.12, 0.12))
    else:
        x, z = side * (half + draw.uniform(0.1, 0.8) * pavement), draw.uniform(1.4, 1.9) + KERB
        cosine, sine = tilt(draw.uniform(0.4, 0.95) if view == "across" else draw.uniform(-0.05, 0.25))
        sine = -side * sine
    scene.eye, scene.gaze = (x, 0.0, z), (cosine, sine)
    scene.taken = [(x, 0.0, 1.2), (x + 1.5 * sine, 1.5 * cosine, 1.0)]
    populate(scene, draw, road, spread)
    return scene


def sky_and_sun(scene: Scene, draw: Draw) -> None:
    x, y = draw.turn()
    up = draw.uniform(0.45, 0.85)
    flat = sqrt(1 - up * up)
    scene.light = x * flat, y * flat, up
    weather = draw.choice(("clear", "clear", "cloudy", "grey", "evening"))
    scene.zenith, scene.horizon = {
        "clear": (srgb("548cd6"), srgb("c8def0")),
        "cloudy": (srgb("6e9ace"), srgb("d6dee6")),
        "grey": (srgb("b0b6be"), srgb("d8dadc")),
        "evening": (srgb("6e7eaa"), srgb("face96")),
    }[weather]
    scene.clouds = draw.seed() if weather == "cloudy" or draw.chance(0.3) else 0
    scene.ambient, scene.strength = draw.uniform(0.4, 0.5), draw.uniform(0.65, 0.8)
    if weather == "grey":
        scene.ambient, scene.strength = 0.72, 0.2


def ground(scene: Scene, draw: Draw, road: Road) -> None:
    """The road, with lane marks 3 m long every 9 m, and pavements of 0.5 m slabs behind a kerb 0.12 m high."""
    seed, grey = draw.seed(), draw.uniform(0.1, 0.2)
    asphalt = rough((grey, grey, grey * 1.04), seed, 0.05, 0.35)
    white, half, lane, zebra = srgb("ecece6"), road.half, road.half - road.parking, road.zebra
    lanes = (0.0, 3.25) if lane > 5 else (0.0,)
    lo, hi = (road.cross[0] - road.cross[1], road.cross[0] + road.cross[1]) if road.cross else (None, None)

    def roadway(f: Face):
        x = np.abs(f.a)
        marks = sum(band(x, f.wa, q - 0.07, q + 0.07) for q in lanes) * pulse(f.b / 9, f.wb / 9, 1 / 3)
        marks = marks + band(x, f.wa, lane - 0.2, lane - 0.08)
        if road.parking:
            marks = marks + band(x, f.wa, lane, half) * pulse(f.b / 6, f.wb / 6, 0.02)
        keep = band(x, f.wa, -1.0, half)
        if road.cross:
            keep = keep * (1 - band(f.b, f.wb, lo - 5.0, hi + 1.0))
        if zebra:
            keep = keep * (1 - band(f.b, f.wb, zebra - 1.2, zebra + 3.5))
        marks = np.minimum(marks, 1) * keep
        if zebra:
            bars = band(f.b, f.wb, zebra, zebra + 3.0) * pulse(f.a, f.wa, 0.5) * band(x, f.wa, -1.0, half - 0.2)
            stop = band(f.b, f.wb, zebra - 1.0, zebra - 0.6) * band(f.a, f.wa, 0.1, lane)
            marks = np.minimum(marks + bars + stop, 1)
        return mix(asphalt(f), white, marks * 0.9)

    scene.begin(0, 0)
    scene.add("ground", (0, 0, -0.5), (4000, 4000, 1.0), roadway, shadow=False)
    slabs = tiles(srgb("aca8a0"), srgb("74726e"), seed, 0.5, 0.02, 0.2)
    lawn = rough(srgb("5c7a3a"), seed + 3, 0.06, 0.7)
    wide, lawn_from = 300.0, road.pavement + (0.0 if road.suburb else 12.0)
    for side in (-1.0, 1.0):

        def paint(f: Face, side=side):
            if f.axis != 2:
                return column(srgb("bab8b2"))
            x = f.x * side + wide / 2  # from the kerb
            return mix(mix(slabs(f), lawn(f), band(x, f.wa, lawn_from, wide)), STONE, band(x, f.wa, -1.0, 0.15))

        for y0, y1 in ((-300.0, lo), (hi, 1000.0)) if road.cross else ((-300.0, 1000.0),):
            middle = side * (half + wide / 2), (y0 + y1) / 2, KERB / 2
            scene.box(middle, (wide, y1 - y0, KERB), paint, shadow=False)


def rows_of_houses(scene: Scene, draw: Draw, road: Road) -> None:
    lo, hi = (road.cross[0] - road.cross[1], road.cross[0] + road.cross[1]) if road.cross else (0.0, -1000.0)
    for side in (-1.0, 1.0):
        y = -40.0 + draw.uniform(0, 8)
        while y < road.end:
            if road.suburb:
                width, depth, storeys = draw.uniform(8, 12), draw.uniform(7, 9), draw.integer(1, 2)
                gap = draw.uniform(2.5, 7.0)
            else:
                width, depth, storeys = draw.uniform(8, 16), 10.0, draw.integer(2, 6)
                gap = draw.choice((0.0, 0.0, 0.0, 2.5))
            if y < hi + 2 and y + width > lo - 2:
                y = hi + 2.5
                continue
            scene.begin(side * (road.front + depth / 2), y + width / 2, KERB - 0.02, (0.0, -side))
            house(scene, draw, width, depth, storeys, road.suburb)
            y += width + gap
    if draw.chance(0.5):  # the road ends at a house across it
        scene.begin(0, road.end + 9.0)
        house(scene, draw, 2 * road.front + 14.0, 10.0, draw.integer(2, 5), False)


def populate(scene: Scene, draw: Draw, road: Road, spread: float) -> None:
    """Cars, people, trees, lamps, bollards and a few loose things."""
    half, pavement, zebra, end = road.half, road.pavement, road.zebra, road.end
    cross, cross_half = road.cross or (-1000.0, 0.0)

    def put(kind: str, x: float, y: float, turn: tuple[float, float], color: str = "") -> None:
        build, radius = THINGS[kind]
        z = KERB if abs(x) > half and abs(y - cross) > cross_half else 0.0
        in_the_way = kind != "car" and abs(x) > half and abs(y - cross) < cross_half + radius
        if not in_the_way and scene.take(x, y, radius):
            scene.begin(x, y, z, turn, Thing(kind, color))
            build(scene, draw, COLORS.get(color))

    def may_park(y: float) -> bool:
        return abs(y - cross) > cross_half + 6 and not (zebra and abs(y - zebra - 1.5) < 4.5)

    # First some things near by in the middle of the view, in colours of their own, then what fills a street.
    (x0, _, _), (cosine, sine) = scene.eye, scene.gaze
    colors = draw.shuffle(COLORS)
    near_colors, colors = colors[:5], colors[5:]
    for i in range(draw.choice((2, 4, 5, 6, 7, 8))):
        ahead = draw.uniform(2.5, 9.0) if draw.chance(0.5) else draw.uniform(6.0, 22.0)
        aside = draw.uniform(-0.8, 0.8) * spread * ahead
        x, y = x0 + sine * ahead + cosine * aside, cosine * ahead - sine * aside
        color, side = near_colors[i % 5], 1.0 if x > 0 else -1.0
        if half - 0.4 < abs(x) < half + pavement - 0.3:
            put(
                draw.choice(("person", "person", "box", "ball", "post")),
                max(abs(x), half + 0.4) * side,
                y,
                draw.turn(),
                color,
            )
        elif abs(x) < half and ahead > 5.5 and draw.chance(0.8):
            parked = abs(x) > half - road.parking and may_park(y)
            put("car", side * (half - 1.05 if parked else draw.uniform(1.4, 1.9)), y, (-side, 0.0), color)
        elif abs(x) < half and draw.chance(0.5):
            put(draw.choice(("person", "ball", "box")), x, y, draw.turn(), color)

    side, step, y = draw.choice((-1.0, 1.0)), draw.uniform(18, 26), draw.uniform(-5, 8)
    while y < end:
        put("lamp", side * (half + 0.45), y, (0.0, -side))
        y += step
    step = draw.uniform(7, 13)
    for side in draw.choice(((), (-1.0,), (1.0,), (-1.0, 1.0), (-1.0, 1.0))):
        y = draw.uniform(-4, 8)
        while y < end:
            put("tree", side * (half + draw.uniform(0.8, 1.1)), y, draw.turn())
            y += step
    crowd = draw.uniform(0.1, 0.8) if road.parking else 0.0
    for side in (-1.0, 1.0):
        y = draw.uniform(-8, -2)
        while y < end:
            if draw.chance(crowd) and may_park(y):
                put("car", side * (half - 1.05), y, (-side, 0.0), draw.choice(colors))
            y += draw.uniform(5.2, 6.5)
    for _ in range(draw.integer(0, 4)):
        side = draw.choice((-1.0, 1.0))
        put("car", side * draw.uniform(1.4, 1.9), draw.uniform(5, 45), (-side, 0.0), draw.choice(colors))
    if road.cross and draw.chance(0.5):
        side = draw.choice((-1.0, 1.0))
        put("car", draw.uniform(-8, 8), cross + 1.7 * side, (0.0, side), draw.choice(colors))
    for _ in range(draw.choice((0, 1, 2, 4))):
        x = draw.choice((-1.0, 1.0)) * (half + draw.uniform(0.5, pavement - 0.3))
        put("person", x, draw.uniform(2.5, 22), draw.turn(), draw.choice(colors))
    if zebra and draw.chance(0.5):
        put("person", draw.uniform(-half, half), zebra + draw.uniform(0.5, 2.5), (0.0, 1.0), draw.choice(colors))
    if draw.chance(0.4):
        y, color, side = draw.uniform(3, 12), draw.choice(colors), draw.choice((-1.0, 1.0))
        for i in range(draw.integer(2, 5)):
            put("post", side * (half + 0.35), y + 1.5 * i, (1.0, 0.0), color)
