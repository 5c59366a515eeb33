"""Writes a tiny SUN RGB-D tree: scene folders with known depth, and allsplit.mat as the toolbox has it."""

import io

import numpy as np
import scipy.io
from PIL import Image

NYU_CROP = (518.8579, 519.4696, 284.5824, 208.7362)


def rotated(millimetres):
    """SUN's words: millimetres rotated left by 3 bits, by decimal arithmetic on 16-bit numbers."""
    millimetres = np.asarray(millimetres, dtype=np.int64)
    return (millimetres * 8 % 65536 + millimetres // 8192).astype(np.uint16)


def plane_and_box(size, intrinsics):
    """z in metres (h, w) of the wall 0.3 x + 0.2 y + z = 3 behind a box front, 0.6 m wide and high, at z = 1.5."""
    fx, fy, cx, cy = intrinsics
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    x, y = (u - cx) / fx, (v - cy) / fy
    box = (abs(1.5 * x) <= 0.3) & (abs(1.5 * y) <= 0.3)
    return np.where(box, 1.5, 3 / (0.3 * x + 0.2 * y + 1))


def write_scene(raw, folder, millimetres, intrinsics, folders=("depth_bfx", "depth"), name="0000001"):
    """A scene folder; `millimetres` (h, w) goes into each of `folders`. Image and depth names differ, as in xtion."""
    scene = raw / "SUNRGBD" / folder
    (scene / "image").mkdir(parents=True)
    height, width = np.shape(millimetres)
    jpeg = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(jpeg, "JPEG")
    (scene / "image" / f"{name}-000001497633.jpg").write_bytes(jpeg.getvalue())
    for depth in folders:
        (scene / depth).mkdir()
        Image.fromarray(rotated(millimetres)).save(scene / depth / f"{name}-000001490246.png")
    fx, fy, cx, cy = intrinsics
    (scene / "intrinsics.txt").write_text(f"{fx} 0 {cx}\n0 {fy} {cy}\n0 0 1\n")
    return jpeg.getvalue()


def cell(entries):
    out = np.empty((1, len(entries)), dtype=object)
    out[0] = entries
    return out


def write_allsplit(raw, test, train=("/n/fs/sun3d/data/SUNRGBD/kv2/kinect2data/train_only",)):
    folder = raw / "SUNRGBDtoolbox/traintestSUNRGBD"
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"alltest": cell(test), "alltrain": cell(train), "trainvalsplit": {"train": cell(train)}}
    scipy.io.savemat(folder / "allsplit.mat", variables, do_compression=True)
