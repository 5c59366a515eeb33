"""Matterport3D: 18 undistorted 1280x1024 views a panorama with sensor depth. Train only.

Facts: niessner/Matterport, data_organization.md. It says that the undistorted images have their origin at the bottom
left, but not whether cy counts from there; cx and cy are passed on as stored (cy lies within a few px of the middle).
"""

import math
import re
from collections.abc import Iterator

import numpy as np

from ._base import BadFrame, BadRaw, Frame, Sample, Source

IMAGE_SIZE = (1280, 1024)  # W, H that the .conf's intrinsics are of
# PANORAMA_dCAMERA_YAW.png and the colour image of the same view; the .conf names them, and nothing else is opened
PAIR = re.compile(r"([0-9a-f]{32})_d([0-2])_([0-5])\.png \1_i\2_\3\.jpg")


class Matterport3D(Source):
    name = "matterport3d"
    title = "Matterport3D"
    page = "https://niessner.github.io/Matterport/"
    licence = "Matterport3D Terms of Use (signed form), non-commercial"
    citation = "Chang et al., Matterport3D: Learning from RGB-D Data in Indoor Environments, 3DV 2017"
    layout = (
        "SCAN/undistorted_camera_parameters/SCAN.conf, SCAN/undistorted_color_images/*.jpg, "
        "SCAN/undistorted_depth_images/*.png, and scenes_train.txt (niessner/Matterport, tasks/benchmark), "
        "at the top or in tasks/benchmark"
    )
    needs = (
        ("*/undistorted_camera_parameters/*.conf", "cameras"),
        ("*/undistorted_color_images/*.jpg", "images"),
        ("*/undistorted_depth_images/*.png", "depth"),
    )
    splits = {"train": ("train",)}
    depth_range = (0.01, 10.0)
    depth_scale = 4000.0

    def frames(self, split: str) -> Iterator[Frame]:
        for own_split in self.own_splits(split):
            for scan in self._scans(f"scenes_{own_split}.txt"):
                yield from self._views(scan)

    def _scans(self, name: str) -> list[str]:
        for parts in ((name,), ("tasks", "benchmark", name)):
            if self.path(*parts).is_file():
                break
        else:
            raise BadRaw(f"{name} is missing below {self.raw}; take it from tasks/benchmark of niessner/Matterport")
        scans = sorted(set(self.read_text(*parts).split()))
        for scan in scans:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", scan):
                raise BadRaw(f"{name} holds {scan!r}, which is not a scan name; download it again")
        return scans

    def _views(self, scan: str) -> Iterator[Frame]:
        """The views that the scan's .conf lists."""
        conf = f"{scan}/undistorted_camera_parameters/{scan}.conf"
        try:
            n_images, lines = read_conf(self.read_text(conf))
        except (OSError, ValueError) as error:
            yield Frame(scan, scan, problem=f"{conf} cannot be read ({error}); download or unpack this scan")
            return
        found = {}
        for number, files, intrinsics in lines:
            match = PAIR.fullmatch(files)
            key = f"{scan}/{match[1]}_i{match[2]}_{match[3]}" if match else ""
            if not match or key in found:
                why = "is listed twice" if match else "is not the depth and colour image of one view"
                bad = f"{scan}/line_{number}"
                found[bad] = Frame(bad, scan, problem=f"{conf}, line {number}: {files!r} {why}")
            elif intrinsics is None:
                found[key] = Frame(key, scan, problem=f"{conf}, line {number}: no valid intrinsics_matrix precedes it")
            else:
                found[key] = Frame(key, scan, camera=f"i{match[2]}", data=(*files.split(), intrinsics))
        if n_images != str(len(lines)):
            short = f"{conf} says n_images {n_images!r}, but has {len(lines)} scan lines; download it again"
            found[f"{scan}/n_images"] = Frame(f"{scan}/n_images", scan, problem=short)
        yield from (found[key] for key in sorted(found))

    def load(self, frame: Frame) -> Sample:
        depth_name, image_name, intrinsics = frame.data
        image, size = self.read_image(frame.scene, "undistorted_color_images", image_name)
        if size != IMAGE_SIZE:
            why = "but its intrinsics are of 1280x1024; take the image as released"
            raise BadFrame(f"{image_name} is {size[0]}x{size[1]}, {why}")
        words = self.read_depth16(frame.scene, "undistorted_depth_images", depth_name)
        return Sample(image, words / np.float32(self.depth_scale), intrinsics)


def read_conf(text: str) -> tuple[str, list[tuple[int, str, tuple[float, ...] | None]]]:
    """The n_images of a .conf and its scan lines: line number, "DEPTH COLOUR" file names, intrinsics.

    An intrinsics_matrix line holds for the scan lines after it, until the next one; None where there is no valid one.
    The poses are not needed: depth is in the camera's own frame.
    """
    n_images, intrinsics, scans = "", None, []
    for number, line in enumerate(text.splitlines(), 1):
        word, *values = line.split() or [""]  # split() takes the double blanks of intrinsics_matrix as one
        if word == "n_images":
            n_images = " ".join(values)
        elif word == "intrinsics_matrix":
            intrinsics = pinhole(values)
        elif word == "scan":
            scans.append((number, " ".join(values[:2]), intrinsics))
    return n_images, scans


def pinhole(values: list[str]) -> tuple[float, ...] | None:
    """fx, fy, cx, cy of a row-major 3x3 matrix; None if it is not one of a pinhole camera."""
    try:
        fx, skew, cx, zero, fy, cy, *last = (float(value) for value in values)
    except ValueError:
        return None
    if last != [0, 0, 1] or skew or zero or not (fx > 0 and fy > 0 and all(map(math.isfinite, (fx, fy, cx, cy)))):
        return None
    return fx, fy, cx, cy


SOURCE = Matterport3D
