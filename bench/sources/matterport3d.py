"""Matterport3D: 18 undistorted 1280x1024 views a panorama with sensor depth. Train only.

The .conf counts cy from the bottom row: from the top it is 1023 - cy. Facts: niessner/Matterport, data_organization.md
and gaps/pkgs/RGBD/RGBDCamera.cpp, which flips it when it reads the raw cameras' files.
"""

import re
from collections.abc import Iterator

import numpy as np

from ._base import BadRaw, Frame, Sample, Source, pinhole

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
        for official_split in self.official_splits(split):
            for scan in self._scans(f"scenes_{official_split}.txt"):
                yield from self._views(scan)

    def _scans(self, name: str) -> list[str]:
        file = next((file for file in (name, f"tasks/benchmark/{name}") if self.path(file).is_file()), None)
        if file is None:
            raise BadRaw(f"{name} is missing below {self.raw}; take it from tasks/benchmark of niessner/Matterport")
        return sorted(set(self.read_text(file).split()))

    def _views(self, scan: str) -> Iterator[Frame]:
        """The views that the scan's .conf lists."""
        conf = f"{scan}/undistorted_camera_parameters/{scan}.conf"
        try:
            n_images, scans = read_conf(self.read_text(conf))
        except (OSError, ValueError) as error:
            yield Frame(scan, scan, problem=f"{conf} cannot be read ({error}); download or unpack this scan")
            return
        frames = []
        for line, files, matrix in scans:
            if match := PAIR.fullmatch(files):
                view = f"{scan}/{match[1]}_i{match[2]}_{match[3]}"
                frames.append(Frame(view, scan, f"i{match[2]}", (*files.split(), matrix)))
            else:
                problem = f"{conf}, line {line}: {files!r} is not the depth and colour image of one view"
                frames.append(Frame(f"{scan}/line_{line}", scan, problem=problem))
        if n_images != str(len(scans)):
            problem = f"{conf} says n_images {n_images!r}, but has {len(scans)} scan lines; download it again"
            frames.append(Frame(f"{scan}/n_images", scan, problem=problem))
        yield from sorted(frames, key=lambda frame: frame.id)

    def load(self, frame: Frame) -> Sample:
        depth_name, image_name, matrix = frame.data
        fx, fy, cx, cy = pinhole(matrix, f"the intrinsics_matrix of {image_name}")
        image, _ = self.read_image(frame.scene, "undistorted_color_images", image_name, size=IMAGE_SIZE)
        stored = self.read_depth16(frame.scene, "undistorted_depth_images", depth_name)
        return Sample(image, stored / np.float32(self.depth_scale), (fx, fy, cx, IMAGE_SIZE[1] - 1 - cy))


def read_conf(text: str) -> tuple[str, list[tuple[int, str, list[str]]]]:
    """The n_images of a .conf and its scan lines: line number, "DEPTH COLOUR" file names, intrinsics_matrix.

    An intrinsics_matrix line holds for the scan lines after it, until the next one; empty where none precedes.
    The poses are not needed: depth is in the camera's own frame.
    """
    n_images, matrix, scans = "", [], []
    for number, line in enumerate(text.splitlines(), 1):
        key, *values = line.split() or [""]  # split() takes the double blanks of intrinsics_matrix as one
        if key == "n_images":
            n_images = " ".join(values)
        elif key == "intrinsics_matrix":
            matrix = values
        elif key == "scan":
            scans.append((number, " ".join(values[:2]), matrix))
    return n_images, scans


SOURCE = Matterport3D
