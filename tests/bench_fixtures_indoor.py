"""A known scene, a slanted plane, and writers of raw files that several indoor sources share."""

import io
import json

import numpy as np
from PIL import Image

NORMAL, OFFSET = np.array([0.2, -0.1, 1.0]), 2.0  # points X on the plane: NORMAL @ X = OFFSET, in metres


def plane_depth(width, height, focal, middle_u, middle_v):
    """z-depth (height, width) of the plane; the middle in px from the image's top-left *corner*."""
    x = (np.arange(width) + 0.5 - middle_u) / focal
    y = (np.arange(height) + 0.5 - middle_v) / focal
    return OFFSET / (NORMAL[0] * x[None, :] + NORMAL[1] * y[:, None] + NORMAL[2])


def plane_error(depth, intrinsics):
    """Largest distance in metres (times |NORMAL|) from the plane of the valid pixels, put into space by intrinsics."""
    fx, fy, cx, cy = intrinsics
    v, u = np.nonzero(depth)
    z = depth[v, u].astype(np.float64)
    points = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z])
    return np.abs(NORMAL @ points - OFFSET).max()


def picture(width, height, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 60)).save(buffer, kind)
    return buffer.getvalue()


def png16(words):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(words, dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_omnidata_view(root, part, scene, view, fov, camera="point_info", size=64, depth=True):
    """One view as Omnidata stores it; the top-left 2x3 pixels look through a hole in the mesh."""
    words = np.round(plane_depth(size, size, size / 2 / np.tan(fov / 2), size / 2, size / 2) * 512)
    words[:2, :3] = 65535
    put(root / "rgb" / part / scene / f"{view}_domain_rgb.png", picture(size, size))
    if depth:
        put(root / "depth_zbuffer" / part / scene / f"{view}_domain_depth_zbuffer.png", png16(words))
    entry = {"field_of_view_rads": fov, "resolution": 512, "camera_location": [0, 0, 1.5]}
    put(root / "point_info" / part / scene / f"{view}_domain_{camera}.json", json.dumps(entry))
