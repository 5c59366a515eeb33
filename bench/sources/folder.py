"""Folder: frames of one's own, in the plain layout that training reads too (`training/folder.py`).

The scale of the depth maps and the focal lengths are the folder's; the principal point is taken for the image's centre.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.folder import EXIF, RGBDFolder

from ._base import BadFrame, BadRaw, Frame, Sample, Source, open_image

GREATEST = 65534  # of a depth map's values; the next one is where 16 bits end


class Folder(Source):
    name = "folder"
    title = "a folder of your own"
    page = "the README, 'Your own data'"
    licence = "yours"
    citation = "none"
    layout = (
        'rgb/NAME.* (JPEG or PNG), depth/NAME.png (16 bits), camera.json: {"depth_scale": values per metre, '
        '"focal_length": px, {NAME: px}, the name of a JSON or CSV file, or "exif"}'
    )
    needs = (("rgb", "images"), ("depth", "depth maps"), ("camera.json", "depth_scale and focal_length"))
    splits = {"test": ("all frames",)}
    depth_scale = 1000.0  # here and in depth_range: of a folder in millimetres; each folder states its own
    depth_range = (0.001, 65.534)

    def __init__(self, raw: str | Path) -> None:
        super().__init__(raw)
        try:
            self.folder = RGBDFolder(raw)
        except ValueError as error:
            raise BadRaw(str(error)) from error
        self.depth_scale = float(self.folder.depth_scale)
        self.depth_range = 1 / self.depth_scale, GREATEST / self.depth_scale

    def frames(self, split: str) -> Iterator[Frame]:
        self.official_splits(split)
        for name in self.folder.names:
            yield Frame(name, scene="")

    def load(self, frame: Frame) -> Sample:
        image, (width, height) = self.read_image(self.folder.image(frame.id))
        focal_length = self.folder.focal_length(frame.id)
        if focal_length == EXIF:
            from depthvlm.photos_depthvlm import exif_focal_length  # here: it imports torch, which others need not

            focal_length = exif_focal_length(open_image(image, frame.id))
        if focal_length is None:
            raise BadFrame(f"{frame.id}: neither camera.json nor EXIF data state its focal length")
        depth = self.read_depth16(self.folder.depth(frame.id)) / np.float64(self.depth_scale)
        return Sample(image, depth, (focal_length, focal_length, (width - 1) / 2, (height - 1) / 2))


SOURCE = Folder
