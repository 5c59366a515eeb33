"""An analytic street for the lidar sets: a slanted wall with a box before it, touched by lidar at known pixel centres.

Written with scipy's rotations and plane formulas in camera coordinates, not with bench.geometry.
"""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

# A camera that looks along the vehicle's +x: columns are the camera's x (right), y (down), z (forward).
LOOK_FORWARD = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


class View(NamedTuple):
    """A camera at the time of its image: world_from_camera 4x4, intrinsics fx, fy, cx, cy and size (W, H) in px."""

    world_from_camera: np.ndarray
    intrinsics: tuple[float, float, float, float]
    size: tuple[int, int]


def transform(rotation: Rotation, translation) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.as_matrix()
    matrix[:3, 3] = translation
    return matrix


def turn(yaw, pitch=0.0, roll=0.0) -> Rotation:
    """Degrees, about the vehicle's z (up), y (left) and x (forward)."""
    return Rotation.from_euler("ZYX", [yaw, pitch, roll], degrees=True)


def wxyz(matrix: np.ndarray) -> list[float]:
    """The quaternion of a transform, scalar first."""
    x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
    return [float(w), float(x), float(y), float(z)]


def move(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return (matrix @ np.c_[points, np.ones(len(points))].T).T[:, :3]


def plane_depth(view: View, normal, offset, u, v) -> np.ndarray:
    """z-depth at pixels (u, v) of the plane normal . X = offset, which is given in world coordinates."""
    rotation, centre = view.world_from_camera[:3, :3], view.world_from_camera[:3, 3]
    fx, fy, cx, cy = view.intrinsics
    a, b, c = rotation.T @ np.asarray(normal)
    return (offset - np.dot(normal, centre)) / (a * (u - cx) / fx + b * (v - cy) / fy + c)


def unproject(view: View, u, v, z) -> np.ndarray:
    fx, fy, cx, cy = view.intrinsics
    return move(view.world_from_camera, np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z], axis=1))


def street(view: View, wall: float = 12.0, box: float = 7.0):
    """Points that a lidar sees, and the depth map that the camera should get of them.

    The wall is about `wall` metres before the camera and slanted, the box `box` metres, in the middle of the image.
    Lidar touches what the camera sees at every second pixel. Between the box's pixels it also touches the wall behind:
    these points, last of all, are hidden from the camera.
    Returns (points (N, 3) in the world, depth (H, W) of the visible ones, depth (H, W) of the hidden ones).
    """
    width, height = view.size
    u, v = (grid.ravel() for grid in np.meshgrid(np.arange(width), np.arange(height)))
    forward, right = view.world_from_camera[:3, 2], view.world_from_camera[:3, 0]
    slanted = forward + 0.2 * right
    z_wall = plane_depth(view, slanted, slanted @ (view.world_from_camera[:3, 3] + wall * forward), u, v)
    z_box = plane_depth(view, forward, forward @ (view.world_from_camera[:3, 3] + box * forward), u, v)
    on_box = (abs(u - width // 2) <= width // 6) & (abs(v - height // 2) <= height // 6)
    inner = (abs(u - width // 2) <= width // 6 - 3) & (abs(v - height // 2) <= height // 6 - 3)
    seen, hidden = (u % 2 == 0) & (v % 2 == 0), inner & (u % 2 == 1) & (v % 2 == 1)
    z_seen = np.where(on_box, z_box, z_wall)
    points = np.concatenate(
        [unproject(view, u[seen], v[seen], z_seen[seen]), unproject(view, u[hidden], v[hidden], z_wall[hidden])]
    )
    maps = [np.where(mask, z, 0).reshape(height, width) for mask, z in ((seen, z_seen), (hidden, z_wall))]
    return points, *maps


@functools.cache
def image_bytes(size: tuple[int, int], form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
