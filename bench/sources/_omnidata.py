"""What Taskonomy and HM3D share: both come as Omnidata's square renders, with one folder per kind of image.

Facts: EPFL-VILAB/omnidata, dataset README and annotator; StanfordVL/taskonomy, data/README.md.
"""

import csv
import json
import math
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from ._base import BadFrame, BadRaw, Frame, Sample, Source

NO_DEPTH = 65535  # the ray met no mesh
VIEW = re.compile(r"(point_\d+_view_\d+)_domain_rgb\.png", re.ASCII)


class Omnidata(Source):
    """Base of the sets below {rgb,depth_zbuffer,point_info}/{part}/{scene}/point_P_view_V_domain_*.

    Depth is z (the folder depth_euclidean holds ray distance and is not read). The camera is a field of view over a
    square image; its principal point is not stated and assumed to be the image's middle. mask_valid is not used.
    """

    part: ClassVar[str]  # the set's folder below each kind's folder
    split_file: ClassVar[str]  # a CSV of scenes; line ends CR, CRLF or LF
    depth_scale = 512.0
    max_canonical_edge = 1024
    splits = {"train": ("train",)}

    def scene_of(self, row: dict[str, str], official_split: str) -> str | None:
        """The scene of a row of the split file, None if it is of another split."""
        raise NotImplementedError(f"{type(self).__name__}.scene_of")

    def frames(self, split: str) -> Iterator[Frame]:
        for official_split in self.official_splits(split):
            try:
                rows = csv.DictReader(self.read_text(self.split_file).splitlines())
                scenes = {self.scene_of(row, official_split) for row in rows} - {None}
            except (OSError, KeyError) as error:
                raise BadRaw(
                    f"{self.split_file} in {self.raw} is no list of scenes ({error!r}); expected: {self.layout}"
                ) from error
            if not scenes:
                raise BadRaw(f"{self.raw} lists no scene of the split {official_split!r}; expected: {self.layout}")
            for scene in sorted(scenes):
                yield from self.views(scene)

    def views(self, scene: str) -> Iterator[Frame]:
        """A scene's images, or one frame with the problem of a scene that has none."""
        views, problem = [], f"rgb/{self.part}/{scene} holds no point_P_view_V_domain_rgb.png; unpack this scene"
        try:
            views = [match[1] for name in self.listdir("rgb", self.part, scene) if (match := VIEW.fullmatch(name))]
        except (OSError, BadFrame) as error:
            problem = str(error)
        if not views:
            yield Frame(scene, scene, problem=problem)
        for view in sorted(views):
            yield Frame(f"{scene}/{view}", scene, data=view)

    def load(self, frame: Frame) -> Sample:
        scene, view = frame.scene, frame.data
        image, (width, height) = self.read_image("rgb", self.part, scene, f"{view}_domain_rgb.png")
        if width != height:
            raise BadFrame(f"rgb of {frame.id} is {width}x{height}, but the field of view is of a square image")
        focal_length = width / (2 * math.tan(self.field_of_view(scene, view) / 2))
        centre = width / 2 - 0.5  # the middle, counted from the first pixel's centre
        stored = self.read_depth16("depth_zbuffer", self.part, scene, f"{view}_domain_depth_zbuffer.png")
        depth = np.where(stored == NO_DEPTH, 0, stored / np.float32(self.depth_scale)).astype(np.float32)
        return Sample(image, depth, (focal_length, focal_length, centre, centre))

    def field_of_view(self, scene: str, view: str) -> float:
        """Radians over the image's side, whatever size it is stored at; both names of the camera file are in use."""
        folder = f"point_info/{self.part}/{scene}"
        names = [f"{view}_domain_{kind}.json" for kind in ("point_info", "fixatedpose")]
        name = next((name for name in names if self.path(folder, name).is_file()), None)
        if name is None:
            raise BadFrame(f"{folder} has neither {' nor '.join(names)}")
        fov = json.loads(self.read_text(folder, name))["field_of_view_rads"]
        if not 0 < fov < math.pi:
            raise BadFrame(f"{folder}/{name}: field_of_view_rads is {fov}; it must lie between 0 and pi")
        return fov
