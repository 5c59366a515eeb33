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

from ..geometry import focal_from_fov
from ._base import BadFrame, BadRaw, Frame, Sample, Source

NO_DEPTH = 65535  # the ray met no mesh
VIEW = re.compile(r"(point_\d+_view_\d+)_domain_rgb\.png", re.ASCII)


class Omnidata(Source):
    """Base of the sets below {rgb,depth_zbuffer,point_info}/{part}/{scene}/point_P_view_V_domain_*.

    Depth is z (the folder depth_euclidean holds ray distance and is not read). The camera is a field of view over a
    square image; its principal point is not stated and assumed to be the image's middle. mask_valid is not used.
    """

    part: ClassVar[str]  # the set's folder below each kind's folder
    depth_scale = 512.0
    max_canonical_edge = 1024
    splits = {"train": ("train",)}

    def scenes(self, own_split: str) -> list[str]:
        """Scene names of one of the set's own splits. Raises BadRaw."""
        raise NotImplementedError(f"{type(self).__name__}.scenes")

    def table(self, name: str, *columns: str) -> list[tuple[str, ...]]:
        """These columns of a CSV in the raw folder, the first of them scene names; line ends CR, CRLF or LF."""
        try:
            lines = self.read_text(name).splitlines()  # read_text has made every line end LF
            rows = [tuple((row[column] or "").strip() for column in columns) for row in csv.DictReader(lines)]
        except FileNotFoundError as error:
            raise BadRaw(f"{name} is missing below {self.raw}; expected: {self.layout}") from error
        except (ValueError, KeyError, csv.Error) as error:
            raise BadRaw(f"{name} has no columns {', '.join(columns)} ({error!r}); download it again") from error
        for scene, *_ in rows:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", scene):
                raise BadRaw(f"{name} holds {scene!r}, which is not a scene name; download it again")
        return rows

    def frames(self, split: str) -> Iterator[Frame]:
        for own_split in self.own_splits(split):
            scenes = sorted(set(self.scenes(own_split)))
            if not scenes:
                raise BadRaw(f"{self.raw} lists no scene of the split {own_split!r}; expected: {self.layout}")
            for scene in scenes:
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
        focal = focal_from_fov(self.field_of_view(scene, view), width)
        centre = width / 2 - 0.5  # the middle, counted from the first pixel's centre
        words = self.read_depth16("depth_zbuffer", self.part, scene, f"{view}_domain_depth_zbuffer.png")
        depth = np.where(words == NO_DEPTH, 0, words / np.float32(self.depth_scale)).astype(np.float32)
        return Sample(image, depth, (focal, focal, centre, centre))

    def field_of_view(self, scene: str, view: str) -> float:
        """Radians over the image's side, whatever size it is stored at; both names of the camera file are in use."""
        for kind in ("point_info", "fixatedpose"):
            parts = ("point_info", self.part, scene, f"{view}_domain_{kind}.json")
            if self.path(*parts).is_file():
                break
        else:
            folder = "/".join(parts[:-1])
            raise BadFrame(f"{folder} has neither {view}_domain_point_info.json nor {view}_domain_fixatedpose.json")
        try:
            fov = float(json.loads(self.read_text(*parts))["field_of_view_rads"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadFrame(f"{'/'.join(parts)} has no number field_of_view_rads ({error!r})") from error
        if not 0 < fov < math.pi:
            raise BadFrame(f"{'/'.join(parts)}: field_of_view_rads is {fov}; it must lie between 0 and pi")
        return fov
