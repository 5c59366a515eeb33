"""A small ray caster for scenes of boxes, cylinders and ellipsoids: image, exact z-depth and part index per pixel.

World frame: x right, y ahead, z up, metres. Camera frame and pixels: see _base.py. A ray, x right + y down + forward,
has camera z = 1, so that the parameter t of a hit is its z-depth.

The same picture on every machine: each value that is rounded, compared or stored comes from + - * / sqrt floor and
integer operations, which IEEE 754 fixes to the last bit, one NumPy call each, so that no compiler can fuse two of them.
Not used: BLAS, sums over arrays (their order differs), sin, cos, exp, pow (their last bit differs) and NumPy's
distributions (their streams may change). An angle is its cosine and sine, drawn as (1 - t^2, 2 t) / (1 + t^2).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray
Number = float | Array
Vector = tuple[float, float, float]
Angle = tuple[float, float]  # its cosine and sine
INF = float("inf")
NEAR = 0.05  # metres of z; corners nearer are clipped before projection
SHADOWS = 45.0  # metres; what stands further casts none
PIECE = 8_000  # pixels worked on at a time: their arrays stay in the cache
GRAIN = 0.02  # least footprint of a pixel, in periods of a pattern; keeps float32 differences of `pulse` meaningful


# Camera


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: size and focal length in px, position and axes (x, y, z) in the world frame."""

    width: int
    height: int
    focal: float
    cx: float
    cy: float
    position: Vector
    right: Vector
    down: Vector
    forward: Vector

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        return self.focal, self.focal, self.cx, self.cy

    @cached_property
    def rays(self) -> list[np.ndarray]:
        """World direction of each pixel's ray, three (H, W) float64; its camera z is 1."""
        x = ((np.arange(self.width) - self.cx) / self.focal)[None, :]
        y = ((np.arange(self.height) - self.cy) / self.focal)[:, None]
        return [r * x + (d * y + f) for r, d, f in zip(self.right, self.down, self.forward, strict=True)]

    def to_camera(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[np.ndarray]:
        """World points as camera x, y, z."""
        x, y, z = (p - o for p, o in zip((x, y, z), self.position, strict=True))
        return [x * a[0] + y * a[1] + z * a[2] for a in (self.right, self.down, self.forward)]


def look(
    position: Vector, yaw: Angle, pitch: Angle, roll: Angle, size: tuple[int, int], focal: float, cx: float, cy: float
) -> Camera:
    """A camera at `position`; each angle is (cosine, sine): yaw turns right from +y, pitch up, roll clockwise."""
    (cp, sp), (ct, st), (cr, sr) = yaw, pitch, roll
    right, forward, down = (cp, -sp, 0.0), (sp * ct, cp * ct, st), (sp * st, cp * st, -ct)
    rolled = [tuple(p * a + q * b for a, b in zip(right, down, strict=True)) for p, q in ((cr, sr), (-sr, cr))]
    return Camera(*size, focal, cx, cy, position, rolled[0], rolled[1], forward)


# Shapes


@dataclass(slots=True)
class Part:
    """A solid. half: half sizes along its local x, y, z; turn: (cosine, sine) of its yaw, local x to world x.

    shape: "box", whose x and y half sizes may shrink by `taper` per metre of height; "ellipsoid"; "cylinder" along its
    local axis `axis`, the other two half sizes being its radii; "room", a box seen from inside; "ground", the top of a
    box that has no end.
    paint: a linear RGB colour, or a function of a `Face`. thing: what it belongs to, for the question-answer pairs.
    """

    shape: str
    center: Vector
    half: Vector
    paint: "Vector | Callable"
    turn: tuple[float, float] = (1.0, 0.0)
    taper: tuple[float, float] = (0.0, 0.0)
    axis: int = 2
    thing: int = 0
    shadow: bool = True

    def to_local(self, x: Number, y: Number, z: Number) -> tuple[Number, Number, Number]:
        """World direction in the part's frame."""
        c, s = self.turn
        if c == 0.0:
            return s * y, -s * x, z
        if s:
            x, y = c * x + s * y, c * y - s * x
        return (x, y, z) if s or c == 1.0 else (-x, -y, z)


def intersect(part: Part, origin: Sequence[Number], direction: Sequence[Number]) -> np.ndarray:
    """t where rays origin + t direction (arrays or numbers, broadcast) enter the part; inf where they miss it."""
    o = part.to_local(*(p - c for p, c in zip(origin, part.center, strict=True)))
    d = part.to_local(*direction)
    h = part.half
    if part.shape == "room":
        x, y, z = ((np.copysign(h[j], d[j]) - o[j]) / d[j] for j in range(3))
        return np.minimum(np.minimum(x, y), z)
    if part.shape == "ground":
        t = (h[2] - o[2]) / d[2]
        return np.where(t > 0, t, INF)
    if part.shape == "box":
        near, far = slab(o[2], d[2], h[2])
        for i, k in enumerate(part.taper):
            if k == 0.0:
                lo, hi = slab(o[i], d[i], h[i])
                near, far = np.maximum(near, lo), np.minimum(far, hi)
                continue
            for side in (1.0, -1.0):  # the plane side * x + k z = half - k half_z
                slope = side * d[i] + k * d[2]
                t = ((h[i] - k * h[2]) - (side * o[i] + k * o[2])) / slope
                near = np.maximum(near, np.where(slope < 0, t, -INF))
                far = np.minimum(far, np.where(slope > 0, t, INF))
    else:
        round_axes = [i for i in range(3) if part.shape == "ellipsoid" or i != part.axis]
        a = b = c = 0.0
        for i in round_axes:
            oi, di = o[i] / h[i], d[i] / h[i]
            a, b, c = a + di * di, b + oi * di, c + oi * oi
        root = np.sqrt(b * b - a * (c - 1.0))  # nan where the ray passes by: every comparison is then false
        near, far = (-b - root) / a, (root - b) / a
        if part.shape == "cylinder":
            lo, hi = slab(o[part.axis], d[part.axis], h[part.axis])
            near, far = np.maximum(near, lo), np.minimum(far, hi)
    return np.where((near < far) & (near > 0), near, INF)


def slab(o: Number, d: Number, h: Number) -> tuple[Number, Number]:
    """t where a ray enters and leaves -h <= x <= h."""
    inverse = 1.0 / d
    a, b = (-h - o) * inverse, (h - o) * inverse
    return np.minimum(a, b), np.maximum(a, b)


# Visibility

CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
EDGES = [(i, j) for i in range(8) for j in range(i + 1, 8) if np.sum(CORNERS[i] != CORNERS[j]) == 1]


def corners(parts: list[Part]) -> list[np.ndarray]:
    """World x, y, z of the corners of each part's bounding box, each (P, 8)."""
    half, center, turn = (np.array([getattr(p, name) for p in parts]) for name in ("half", "center", "turn"))
    x, y, z = (half[:, i, None] * CORNERS[:, i] for i in range(3))
    c, s = turn[:, :1], turn[:, 1:]
    return [center[:, :1] + (c * x - s * y), center[:, 1:2] + (s * x + c * y), center[:, 2:] + z]


def screen_boxes(camera: Camera, points: list[np.ndarray]) -> list[tuple[slice, slice] | None]:
    """Rows and columns that may show each box; corners: world x, y, z, each (P, 8). None for one out of view."""
    x, y, z = camera.to_camera(*points)
    front = z > NEAR
    bounds = []  # first column, column past the last, first row, row past the last
    for coordinate, center, size in ((x, camera.cx, camera.width), (y, camera.cy, camera.height)):
        q = coordinate / np.where(front, z, 1.0)
        least, most = np.where(front, q, INF).min(1), np.where(front, q, -INF).max(1)
        for i in np.flatnonzero(front.any(1) & ~front.all(1)):  # where its edges cross z = NEAR
            for a, b in EDGES:
                if front[i, a] != front[i, b]:
                    w = (NEAR - z[i, a]) / (z[i, b] - z[i, a])
                    p = (coordinate[i, a] + (coordinate[i, b] - coordinate[i, a]) * w) / NEAR
                    least[i], most[i] = min(least[i], p), max(most[i], p)
        bounds += [
            np.clip(least * camera.focal + center - 1, 0, size),
            np.clip(most * camera.focal + center + 2, 0, size),
        ]
    return [
        (slice(v0, v1), slice(u0, u1)) if u0 < u1 and v0 < v1 else None
        for u0, u1, v0, v1 in zip(*(q.astype(int).tolist() for q in bounds), strict=True)
    ]


def pieces(box: tuple[slice, slice] | None) -> Iterator[tuple[slice, slice]]:
    """The box in strips of rows of about PIECE pixels."""
    if box is not None:
        rows, columns = box
        step = max(1, PIECE // (columns.stop - columns.start))
        for v in range(rows.start, rows.stop, step):
            yield slice(v, min(v + step, rows.stop)), columns


def trace(camera: Camera, parts: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z-depth (H, W) float64, inf in the sky; part index (H, W) int16, there -1; pixels that each part covers alone."""
    depth = np.full((camera.height, camera.width), INF)
    index = np.full(depth.shape, -1, np.int16)
    covered = np.zeros(len(parts), np.int64)
    with np.errstate(all="ignore"):
        for i, (part, box) in enumerate(zip(parts, screen_boxes(camera, corners(parts)), strict=True)):
            if part.shape in ("room", "ground"):
                box = slice(0, camera.height), slice(0, camera.width)
            for piece in pieces(box):
                t = intersect(part, camera.position, [r[piece] for r in camera.rays])
                nearer = t < depth[piece]
                covered[i] += np.count_nonzero(t < INF)
                np.copyto(depth[piece], t, where=nearer)
                np.copyto(index[piece], i, where=nearer)
    return depth, index, covered


# Surfaces


@dataclass(slots=True)
class Face:
    """Points of a part that look one way, float32 (N,) each, in the part's frame and metres.

    axis, positive: the local axis that is its normal, and whether it looks along it; axis -1 on a curved side.
    a, b: the two coordinates in the face, the second one upright on a wall; wa, wb: a pixel's extent along them.
    """

    axis: int
    positive: bool
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    a: np.ndarray
    b: np.ndarray
    wa: np.ndarray
    wb: np.ndarray


def surfaces(camera: Camera, parts: list[Part], depth: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Albedo and world normal of each pixel, each float32 (3, H * W), 0 in the sky."""
    albedo, normal = (np.zeros((3, index.size), np.float32) for _ in range(2))
    order = np.argsort(index.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(index.ravel() + 1, minlength=len(parts) + 1))
    with np.errstate(all="ignore"):
        for i, part in enumerate(parts):
            for k in range(ends[i], ends[i + 1], PIECE):
                pixels = order[k : min(k + PIECE, ends[i + 1])]
                t, *d = (q.ravel()[pixels].astype(np.float32) for q in (depth, *camera.rays))
                shade(camera, part, pixels, t, d, albedo, normal)
    return albedo, normal


def shade(
    camera: Camera, part: Part, pixels: Array, t: Array, d: Sequence[Array], albedo: Array, normal: Array
) -> None:
    """Write albedo and normal of the pixels that show `part`, at z-depth t along rays d."""
    o = part.to_local(*(p - c for p, c in zip(camera.position, part.center, strict=True)))
    d = part.to_local(*d)
    p = [o[j] + t * d[j] for j in range(3)]
    code = face_codes(part, p)
    right, down = part.to_local(*camera.right), part.to_local(*camera.down)
    counts = np.bincount(code + 1, minlength=1)
    for present in np.flatnonzero(counts) - 1:
        k, positive = (int(present) // 2, bool(present & 1)) if present >= 0 else (-1, False)
        here = slice(None) if counts[present + 1] == len(t) else np.flatnonzero(code == present)
        at, xyz = pixels[here], [q[here] for q in p]
        for j, n in enumerate(normal_of(part, k, positive, xyz)):
            normal[j, at] = n
        if not callable(part.paint):
            for j in range(3):
                albedo[j, at] = part.paint[j]
            continue
        extent = t[here] / camera.focal
        if k < 0:
            i, j = 0, 2
            extents = [extent, extent]
        else:  # a pixel further the point in the plane moves by t (right - d right_k / d_k) / focal; and so down
            i, j = [q for q in range(3) if q != k]
            inverse = 1.0 / d[k][here]
            r, q = right[k] * inverse, down[k] * inverse
            across = ((m, d[m][here]) for m in (i, j))
            extents = [extent * (np.abs(right[m] - e * r) + np.abs(down[m] - e * q)) for m, e in across]
        albedo[:, at] = part.paint(Face(k, positive, *xyz, xyz[i], xyz[j], *extents))


def face_codes(part: Part, p: list[np.ndarray]) -> np.ndarray:
    """The face that points p (local x, y, z) are on: 2 axis + (coordinate > 0), or -1 for a curved one."""
    if part.shape == "ellipsoid":
        return np.full(len(p[0]), -1)
    if part.shape == "cylinder":
        along = p[part.axis] / part.half[part.axis]
        return np.where(np.abs(along) >= 1.0 - 1e-4, 2 * part.axis + (along > 0), -1)
    if part.shape == "ground":
        return np.full(len(p[0]), 5)
    share = [
        np.abs(q) / (h - k * (p[2] + part.half[2]) if k else h)
        for q, h, k in zip(p, part.half, (*part.taper, 0), strict=True)
    ]
    axis = np.where(share[2] >= np.maximum(share[0], share[1]), 2, np.where(share[1] >= share[0], 1, 0))
    return 2 * axis + (np.choose(axis, p) > 0)


def normal_of(part: Part, axis: int, positive: bool, p: list[np.ndarray]) -> list[Number]:
    """World normal x, y, z at points p (local) of one face: numbers on a flat face, arrays on a curved one."""
    if axis >= 0:
        n = [0.0, 0.0, 0.0]
        n[axis] = 1.0 if positive != (part.shape == "room") else -1.0
        n[2] += part.taper[axis] if axis < 2 else 0.0
    else:
        flat = part.axis if part.shape == "cylinder" else -1
        n = [0.0 if j == flat else p[j] / (part.half[j] * part.half[j]) for j in range(3)]
    length = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2])
    c, s = part.turn
    return [q / length for q in (c * n[0] - s * n[1], s * n[0] + c * n[1], n[2])]


# Patterns, averaged over the pixel's extent so that they fade into their mean instead of flickering


def srgb(code: str) -> Vector:
    """The linear colour of "rrggbb"; the picture is encoded with gamma 2, whose root is exact."""
    r, g, b = (int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return r * r, g * g, b * b


def column(color: Vector) -> np.ndarray:
    return np.array(color, np.float32).reshape(3, -1)


def mix(a: Vector | np.ndarray, b: Vector | np.ndarray, share: Number) -> np.ndarray:
    """(3, N) colours from a to b."""
    a, b = column(a), column(b)
    return a + (b - a) * share


def pulse(x: np.ndarray, width: np.ndarray, duty: float) -> np.ndarray:
    """Share of [x - width/2, x + width/2] that lies in [n, n + duty) for whole n."""
    width = np.maximum(width, np.float32(GRAIN))
    half = width * np.float32(0.5)

    def area(q):
        n = np.floor(q)
        return n * np.float32(duty) + np.minimum(q - n, np.float32(duty))

    return (area(x + half) - area(x - half)) / width


def band(x: np.ndarray, width: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Share of [x - width/2, x + width/2] that lies in [lo, hi]."""
    width = np.maximum(width, np.float32(1e-4))
    half = width * np.float32(0.5)
    share = (np.minimum(x + half, np.float32(hi)) - np.maximum(x - half, np.float32(lo))) / width
    return np.maximum(share, np.float32(0))


def scramble(i: np.ndarray, j: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each cell (i, j), floats that hold whole numbers, by an integer hash.

    Past 2**31 the cell, so the number, depends on the machine; patterns have faded out long before that.
    """
    h = i.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    h ^= j.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)
    h ^= np.uint32(seed * 0x27D4EB2F & 0xFFFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Smooth noise in [0, 1) of period about 2."""
    i, j = np.floor(x), np.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = scramble(i, j, seed) * (1 - u) + scramble(i + 1, j, seed) * u
    bottom = scramble(i, j + 1, seed) * (1 - u) + scramble(i + 1, j + 1, seed) * u
    return top * (1 - v) + bottom * v


def fade(width: Number) -> np.ndarray:
    """1 where a pixel is far smaller than a pattern's cell, 0 where it is larger; width in cells."""
    return np.clip(np.float32(1.5) - width, np.float32(0), np.float32(1))


# Light


def shadows(
    camera: Camera, parts: list[Part], depth: np.ndarray, receives: np.ndarray, light: Vector, sun: bool
) -> np.ndarray:
    """(H, W) bool: does a part stand between the pixel and the light, a direction for the sun, or else a point.

    receives (H, W): the pixels that are asked about, near the ground.
    """
    dark = np.zeros(depth.shape, bool)
    here = camera.position
    casters = [
        p
        for p in parts
        if p.shadow
        and max(abs(p.center[0] - here[0]), abs(p.center[1] - here[1])) < SHADOWS
        and (sun or p.center[2] + p.half[2] < 0.8 * light[2])
    ]
    if not casters or not receives.any():
        return dark
    # The corners moved away from the light down to the ground; those near the ground stay, for what lies on a kerb.
    x, y, z = corners(casters)
    reach = np.where(z < 0.2, 0.0, z / (light[2] if sun else light[2] - z))
    ahead = light[:2] if sun else (light[0] - x, light[1] - y)
    on_ground = [x - ahead[0] * reach, y - ahead[1] * reach, np.where(z < 0.2, z, 0.0)]
    with np.errstate(all="ignore"):
        for part, box in zip(casters, screen_boxes(camera, on_ground), strict=True):
            for piece in pieces(box):
                if not receives[piece].any():
                    continue
                origin = [p + depth[piece] * r[piece] for p, r in zip(here, camera.rays, strict=True)]
                if sun:
                    hit = intersect(part, origin, [np.full((1, 1), q) for q in light]) < INF
                else:
                    hit = intersect(part, origin, [q - g for q, g in zip(light, origin, strict=True)]) < 1.0
                dark[piece] |= hit & receives[piece]
    return dark


def develop(picture: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] (3, H * W), changed, to an image uint8 (H, W, 3); outlines are mixed with their neighbours."""
    height, width = index.shape
    edge = np.zeros((height, width), bool)
    across, along = index[:, 1:] != index[:, :-1], index[1:] != index[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    edge[[0, -1]] = False
    edge[:, [0, -1]] = False
    at = np.flatnonzero(edge)
    around = picture[:, at - 1] + picture[:, at + 1] + (picture[:, at - width] + picture[:, at + width])
    picture[:, at] = picture[:, at] * np.float32(0.5) + around * np.float32(0.125)
    image = np.empty((height, width, 3), np.uint8)
    for j in range(3):
        image[..., j] = (picture[j] * np.float32(255) + np.float32(0.5)).reshape(height, width)
    return image
