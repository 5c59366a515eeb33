"""MoGe-2 (Wang et al., "MoGe-2", 2025), through the authors' package: `moge:Ruicheng/moge-2-{vits,vitb,vitl}-normal`,
`moge:Ruicheng/moge-2-vitl`.

It predicts the camera, and z in metres at the image's own size. Its mask, which puts infinity on the sky and wherever
it is unsure, is not applied: every scored point has a depth.
"""

import numpy as np
import torch
from PIL import Image

from ._base import Query, package
from ._dense import PerImage, to_tensor


class MoGe(PerImage):
    title = "MoGe-2"
    estimates_camera = True

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        if dtype == "bfloat16":
            raise ValueError("MoGe runs in float32 or float16, not bfloat16; pass one of them")
        with package("moge", "MoGe", "pip install git+https://github.com/microsoft/MoGe"):
            from moge.model.v2 import MoGeModel
        self.model = MoGeModel.from_pretrained(checkpoint).to(device).eval()
        if not hasattr(self.model, "scale_head"):
            raise ValueError(f"{checkpoint} has no metric scale; pass one of Ruicheng/moge-2-*")
        self.half = dtype == "float16"

    def map(self, query: Query) -> np.ndarray:
        return self.infer(query.image)["depth"].float().numpy(force=True)

    @torch.inference_mode()
    def focal_length(self, image: Image.Image) -> float:
        return self.infer(image)["intrinsics"][0, 0].item() * image.width  # stored relative to the width

    def infer(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return self.model.infer(to_tensor(image) / 255, apply_mask=False, use_fp16=self.half)


CONTESTANT = MoGe
