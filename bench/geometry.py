"""Cameras and grids: conversions that sources, points and scores share. Conventions: see sources/_base.py."""

import numpy as np
from numpy.typing import ArrayLike

Intrinsics = tuple[float, float, float, float]  # fx, fy, cx, cy in px


def change_grid(
    u: ArrayLike, v: ArrayLike, size_from: tuple[int, int], size_to: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Points (u, v) px of a grid of size_from (W, H) on one of size_to (W, H) for the same view, by pixel centres."""
    return tuple(
        (np.asarray(coordinate, dtype=np.float64) + 0.5) * (side_to / side_from) - 0.5
        for coordinate, side_from, side_to in zip((u, v), size_from, size_to, strict=True)
    )


def read_map(values: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """
    Values of a depth map (H, W) at points (u, v) px of its grid, which may lie between pixel centres; float64.

    Bilinear where the four pixels around a point are finite and above 0, else the value of the pixel that the point
    lies in. Between the outermost centres and the border, the outermost pixels go on.
    """
    height, width = values.shape
    u, v = np.clip(u, 0, width - 1), np.clip(v, 0, height - 1)
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    pixels = np.stack([values[top, left], values[top, right], values[bottom, left], values[bottom, right]])
    pixels = pixels.astype(np.float64)
    in_pixel = values[np.floor(v + 0.5).astype(int), np.floor(u + 0.5).astype(int)].astype(np.float64)
    valid = (np.isfinite(pixels) & (pixels > 0)).all(0)
    a, b, c, d = np.where(valid, pixels, 0)
    # a + (b - a) * t, since (1 - t) * a + t * b of equal values may differ from them in the last digit
    upper, lower = a + (b - a) * (u - left), c + (d - c) * (u - left)
    return np.where(valid, upper + (lower - upper) * (v - top), in_pixel)


def ray_per_z(u: ArrayLike, v: ArrayLike, intrinsics: Intrinsics) -> np.ndarray:
    """Euclidean distance from the camera centre per unit of z-depth at pixel (u, v), >= 1, for a pinhole camera.

    z = ray / ray_per_z and ray = z * ray_per_z; `intrinsics` (fx, fy, cx, cy) are of the grid that u and v count.
    """
    fx, fy, cx, cy = intrinsics
    x = (np.asarray(u, dtype=np.float64) - cx) / fx
    y = (np.asarray(v, dtype=np.float64) - cy) / fy
    return np.sqrt(1.0 + x * x + y * y)


def change_grid_intrinsics(intrinsics: Intrinsics, size_from: tuple[int, int], size_to: tuple[int, int]) -> Intrinsics:
    """Intrinsics (fx, fy, cx, cy) of an image of size_from (W, H) for the same view on a grid of size_to (W, H)."""
    fx, fy, cx, cy = intrinsics
    centre = map(float, change_grid(cx, cy, size_from, size_to))
    return fx * size_to[0] / size_from[0], fy * size_to[1] / size_from[1], *centre


def apply(transform: np.ndarray, points: ArrayLike) -> np.ndarray:
    """A 4x4 transform on points (N, 3), in float64."""
    return np.asarray(points, dtype=np.float64) @ transform[:3, :3].T + transform[:3, 3]
