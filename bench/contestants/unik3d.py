"""UniK3D (Piccinelli et al., "UniK3D: Universal Camera Monocular 3D Estimation", CVPR 2025), through the authors'
package: `unik3d:lpiccinelli/unik3d-{vits,vitb,vitl}`.

It predicts the camera, and points at the image's own size, whose z is scored.
"""

import numpy as np

from ._base import Query, package
from ._dense import PerImage, to_tensor


class UniK3D(PerImage):
    title = "UniK3D"

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        if dtype != "float32":
            raise ValueError(f"UniK3D prepares its input as float32, not {dtype}; pass float32")
        install = "pip install git+https://github.com/lpiccinelli-eth/UniK3D 'setuptools<81'"  # for pkg_resources
        with package("unik3d", "UniK3D", install):
            from unik3d.models import UniK3D
        self.model = UniK3D.from_pretrained(checkpoint).to(device).eval()

    def map(self, query: Query) -> np.ndarray:
        points = self.model.infer(to_tensor(query.image))["points"]
        return points[0, 2].float().numpy(force=True)


CONTESTANT = UniK3D
