"""The released scorer's conventions, kept by `import --as-released` and `evaluate --as-released`."""

import numpy as np
import pandas
from PIL import Image

from .metrics import is_right

CANONICAL_FOCAL_LENGTH = 1000  # px


def scored_points(
    columns: np.ndarray,
    rows: np.ndarray,
    metres: np.ndarray,
    depth: np.ndarray,
    size: tuple[int, int],
    canonical: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    A record's points as the released scorer has them: columns, rows and metres of those that it scores.

    Coordinates, which are the depth map's, are taken for px of the image of `size` (W, H), and the depth is read again
    at that place of the map (h, w), 0 = none, stretched to `canonical` (W, H); where that holds none, it is the
    record's. Points that fall outside by rounding are left out, as there.
    """
    u, v = np.rint(columns * (canonical[0] / size[0])), np.rint(rows * (canonical[1] / size[1]))
    inside = (u < canonical[0]) & (v < canonical[1])
    columns, rows, metres, u, v = (values[inside] for values in (columns, rows, metres, u, v))
    stretched = depth[nearest(v, depth.shape[0], canonical[1]), nearest(u, depth.shape[1], canonical[0])]
    return columns, rows, np.where(stretched > 0, stretched, metres)


def nearest(position: np.ndarray, size_from: int, size_to: int) -> np.ndarray:
    """Index of the pixel that OpenCV's `resize(..., INTER_NEAREST)` puts at `position`, along one axis.

    The step is the reciprocal of the scale, in double precision: `size_from / size_to` differs from it at some sizes.
    """
    return np.minimum(np.floor(position * (1 / (size_to / size_from))).astype(int), size_from - 1)


def focal_length(recorded: float, size: tuple[int, int], canonical: tuple[int, int]) -> float:
    """The focal length nearest to `recorded`, px with two decimals, that `size` (W, H) becomes `canonical` by.

    The scorer takes a record's canonical size; rows hold a focal length. Raises ValueError if rounding to two decimals
    does not explain the difference.
    """
    pairs = list(zip(size, canonical, strict=True))
    low = max(CANONICAL_FOCAL_LENGTH * side / (length + 0.5) for side, length in pairs) * (1 + 1e-9)
    high = min(CANONICAL_FOCAL_LENGTH * side / (length - 0.5) for side, length in pairs) * (1 - 1e-9)
    focal = min(max(recorded, low), high)
    if low > high or abs(focal - recorded) > 0.005 + 1e-6:
        raise ValueError(f"canonical_size {canonical} is not {size} at a focal length of {recorded} px made 1000 px")
    return focal


def grid(depth: np.ndarray, focal_length: float) -> np.ndarray:
    """A map as the released scorer holds it: sized to multiples of 28 and then of 32 px from the canonical size."""
    sides = [round(side * CANONICAL_FOCAL_LENGTH / focal_length) for side in depth.shape]
    height, width = (max(1, round(28 * round(side / 28) / 32)) * 32 for side in sides)
    return np.asarray(Image.fromarray(depth.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def at_points(depth: np.ndarray, points: np.ndarray, focal_length: float) -> np.ndarray:
    """Predictions where the released scorer looks: canonical coordinates on a grid of another size; NaN outside.

    depth: (H, W), of the image's size; points: (N, 2), px of the image.
    """
    u, v = (
        np.rint(coordinate * (round(side * CANONICAL_FOCAL_LENGTH / focal_length) / side)).astype(int)
        for coordinate, side in zip(points.T, depth.shape[::-1], strict=True)
    )
    resized = grid(depth, focal_length)
    inside = (u < resized.shape[1]) & (v < resized.shape[0])
    values = np.full(len(u), np.nan)
    values[inside] = resized[v[inside], u[inside]]
    return values


def delta1_by_image(table: pandas.DataFrame) -> pandas.Series:
    """Each image's share of right points: those without a prediction leave it, an image with none left counts 0."""
    answered = table.prediction.notna()
    right = is_right(table.prediction, table["gt"])  # NaN is not
    counts = (
        pandas.DataFrame({"right": right, "answered": answered}).groupby(table["id"], sort=False, observed=True).sum()
    )
    return (counts.right / counts.answered).fillna(0.0)


def delta1(table: pandas.DataFrame) -> float:
    """The mean over images."""
    return float(np.mean(delta1_by_image(table).to_numpy()))
