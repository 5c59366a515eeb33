"""UniK3D (Piccinelli et al., "UniK3D: Universal Camera Monocular 3D Estimation", CVPR 2025), through the authors'
package: `unik3d:lpiccinelli/unik3d-{vits,vitb,vitl}`.

It is not told the camera, which it predicts. Scored is z of its points, at the image's own size.
"""

import numpy as np
import torch

from ._base import Contestant, package


class UniK3D(Contestant):
    title = "UniK3D"
    dense = True

    def __init__(self, checkpoint, device="cpu", dtype="float32"):
        if dtype != "float32":
            raise ValueError(f"UniK3D prepares its input as float32, not {dtype}; pass float32")
        with package("UniK3D", "pip install git+https://github.com/lpiccinelli-eth/UniK3D"):
            from unik3d.models import UniK3D
        self.model = UniK3D.from_pretrained(checkpoint).to(device).eval()

    @torch.inference_mode()
    def maps(self, queries):
        return [self.map(np.array(query.image)) for query in queries]

    def map(self, rgb):
        points = self.model.infer(torch.from_numpy(rgb).permute(2, 0, 1))["points"]
        return points[0, 2].float().numpy(force=True)


CONTESTANT = UniK3D
