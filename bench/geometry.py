"""Cameras and grids: conversions that sources, points and scores share. Conventions: see sources/_base.py."""

import numpy as np
from numpy.typing import ArrayLike

Intrinsics = tuple[float, float, float, float]  # fx, fy, cx, cy in px


def change_grid(coordinate: ArrayLike, size_from: int, size_to: int) -> np.ndarray:
    """A coordinate along one axis from a grid of `size_from` pixels to one of `size_to`, by pixel centres."""
    return (np.asarray(coordinate, dtype=np.float64) + 0.5) * (size_to / size_from) - 0.5


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
    return (
        fx * size_to[0] / size_from[0],
        fy * size_to[1] / size_from[1],
        float(change_grid(cx, size_from[0], size_to[0])),
        float(change_grid(cy, size_from[1], size_to[1])),
    )


def apply(transform: np.ndarray, points: ArrayLike) -> np.ndarray:
    """A 4x4 transform on points (N, 3), in float64."""
    return np.asarray(points, dtype=np.float64) @ transform[:3, :3].T + transform[:3, 3]
