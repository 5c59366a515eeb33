"""Which images of a split are kept, and which of their pixels are scored.

Every choice comes from a hash of names and a seed, so it is the same on every machine, whatever the order of files
on the disk, the number of processes, or the other frames of the set.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from .geometry import change_grid
from .sources._base import Frame

IMAGES = {"train": 800_000, "test": 1000}  # the paper's number of images per set; all where there are fewer
POINTS = 10_000  # scored points per set, divided over its images


def digest(*parts) -> bytes:
    """SHA-256 of strings and numbers, told apart by position."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def count_groups(frames: Iterable[Frame]) -> Counter:
    """Number of frames of each (scene, camera): the first of two passes, so that no list of frames is held."""
    return Counter((frame.scene, frame.camera) for frame in frames)


def allot(sizes: dict[tuple[str, str], int], total: int, seed: int) -> dict[tuple[str, str], int]:
    """Divide `total` images over groups of the given sizes as evenly as the sizes allow (water-filling).

    A group smaller than its share gives all it has and passes the rest on. What does not divide evenly goes, one
    image each, to groups in the order of a seeded hash, so that no group is favoured by its name.
    """
    quota, left = {}, total
    waiting = sorted(sizes, key=lambda group: sizes[group])
    for i, group in enumerate(waiting):
        share = left // (len(waiting) - i)
        if sizes[group] > share:
            larger = sorted(waiting[i:], key=lambda group: digest(seed, *group))
            extra = left - share * len(larger)
            return quota | {group: share + (j < extra) for j, group in enumerate(larger)}
        quota[group] = sizes[group]
        left -= sizes[group]
    return quota


def choose(frames: Iterable[Frame], sizes: dict, quota: dict) -> Iterator[Frame]:
    """The second pass: of each group's `sizes[group]` frames, `quota[group]` evenly spaced ones, in listing order."""
    seen = Counter()
    for frame in frames:
        group = (frame.scene, frame.camera)
        index, size, n = seen[group], sizes.get(group, 0), quota.get(group, 0)
        seen[group] += 1
        if n and -(-index * n // size) * size // n == index:  # index = floor(j * size / n) for some whole j
            yield frame
    if seen != sizes:
        raise ValueError("the listing of frames changed between two readings; do not write to the raw folder meanwhile")


def points_of_image(index: int, images: int, total: int = POINTS) -> int:
    """Points of image `index` of `images`: `total` divided evenly, the first `total mod images` get one more."""
    return total // images + (index < total % images)


def draw_points(
    stored: np.ndarray, depth_scale: float, image_size: tuple[int, int], n: int, *seed: str | int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n pixels of a depth map drawn without replacement among those that hold a depth; all where there are fewer.

    stored: uint16 (h, w), 0 = no depth. image_size: (W, H) of the image. seed: strings and numbers that name the frame.
    Returns u, v (float32 px of the *image*, pixel-centre convention) and the depth as stored (float64 metres), each
    (n,), in raster order.
    """
    valid = np.flatnonzero(stored)
    n = min(n, len(valid))
    # Floyd's algorithm: n draws, whatever the size of the map. RandomState, because its stream is frozen by NumPy.
    random = np.random.RandomState(np.frombuffer(digest(*seed), dtype="<u4")).random_sample(n)
    places = set()
    for last, draw in zip(range(len(valid) - n, len(valid)), random, strict=True):
        place = int(draw * (last + 1))
        places.add(last if place in places else place)
    picked = valid[sorted(places)]
    rows, columns = np.divmod(picked, stored.shape[1])
    u, v = change_grid(columns, rows, stored.shape[::-1], image_size)
    return u.astype(np.float32), v.astype(np.float32), stored.flat[picked] / depth_scale
