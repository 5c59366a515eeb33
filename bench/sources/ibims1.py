"""iBims-1: 100 indoor photographs with laser-scanned depth. Evaluation only.

Depth is stored as value * 50 / 65535 metres, 0 = none, and read as z (the set does not state this; its values agree).
The 1-bit masks say which pixels to *keep*, despite their names: `mask_invalid` is 0 where depth is invalid,
`mask_transp` is 0 on transparent things. Both are applied.
"""

from collections.abc import Iterator

import numpy as np

from ._base import BadFrame, Frame, Sample, Source, open_image, pixels_of


class Ibims1(Source):
    name = "ibims1"
    title = "iBims-1"
    page = "https://www.asg.ed.tum.de/lmf/ibims1/"
    licence = "no explicit text found; ask on its page"
    citation = (
        "Koch, Liebel, Fraundorfer, Körner: Evaluation of CNN-based Single-Image Depth Estimation Methods, ECCVW 2018"
    )
    layout = (
        "the contents of ibims1_core_raw.zip: {rgb, depth, mask_invalid, mask_transp}/NAME.png, calib/NAME.txt and "
        "imagelist.txt (without it, all of rgb/ is taken)"
    )
    needs = (
        ("rgb/*.png", "images"),
        ("depth/*.png", "depth maps"),
        ("calib/*.txt", "intrinsics"),
        ("mask_invalid/*.png", "masks of valid depth"),
        ("mask_transp/*.png", "masks of things that are not transparent"),
    )
    splits = {"test": ("all",)}
    depth_range = (0.005, 25.0)
    depth_scale = 65535 / 50  # the set's step

    def frames(self, split: str) -> Iterator[Frame]:
        self.official_splits(split)
        if self.path("imagelist.txt").is_file():
            names = self.read_text("imagelist.txt").split()
        else:
            names = [name for name in self.listdir("rgb") if name.endswith(".png")]
        for name in sorted({name.removesuffix(".png") for name in names}):
            yield Frame(name, scene=name.rpartition("_")[0])

    def load(self, frame: Frame) -> Sample:
        file, calibration = f"{frame.id}.png", f"calib/{frame.id}.txt"
        image, _ = self.read_image("rgb", file)
        depth = self.read_depth16("depth", file).astype(np.float32) * np.float32(50 / 65535)
        for mask in ("mask_invalid", "mask_transp"):
            depth[~self._keep(f"{mask}/{file}", depth.shape)] = 0
        try:
            fx, fy, cx, cy = map(float, self.read_text(calibration).split(","))
        except ValueError as error:
            raise BadFrame(f"{calibration} is not one line fx,fy,cx,cy ({error})") from error
        return Sample(image, depth, (fx, fy, cx, cy))

    def _keep(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """A mask file -> (h, w) bool, true = keep."""
        mask = open_image(self.read_bytes(name), name)
        # Colour or palette indexes would not mean zero / non-zero.
        if mask.mode not in ("1", "L") or mask.size != shape[::-1]:
            raise BadFrame(
                f"{name} is {mask.size} of Pillow mode {mask.mode!r}; it must be a 1-bit mask of {shape[::-1]}"
            )
        return pixels_of(mask, name) != 0


SOURCE = Ibims1
