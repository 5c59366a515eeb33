"""MoGe-2 (Wang et al., "MoGe-2", 2025), through the authors' package: `moge:Ruicheng/moge-2-{vits,vitb,vitl}-normal`,
`moge:Ruicheng/moge-2-vitl`.

It is not told the camera, which it predicts, and answers z in metres at the image's own size. Its mask, which puts
infinity on the sky and what it finds unsure, is not applied: every scored point is somewhere.
"""

import numpy as np
import torch

from ._base import Contestant, package


class MoGe(Contestant):
    title = "MoGe-2"
    dense = True
    estimates_camera = True

    def __init__(self, checkpoint, device="cpu", dtype="float32"):
        if dtype == "bfloat16":
            raise ValueError("MoGe runs in float32 or float16, not bfloat16; pass one of them")
        with package("MoGe", "pip install git+https://github.com/microsoft/MoGe"):
            from moge.model.v2 import MoGeModel
        self.model = MoGeModel.from_pretrained(checkpoint).to(device).eval()
        if not hasattr(self.model, "scale_head"):
            raise ValueError(f"{checkpoint} has no metric scale; pass one of Ruicheng/moge-2-*")
        self.half = dtype == "float16"

    @torch.inference_mode()
    def maps(self, queries):
        return [self.map(np.array(query.image)) for query in queries]

    def map(self, rgb):
        return self.infer(rgb)["depth"].float().numpy(force=True)

    @torch.inference_mode()
    def focal_length(self, image):
        return self.infer(np.array(image))["intrinsics"][0, 0].item() * image.width  # stored relative to the width

    def infer(self, rgb):
        image = torch.from_numpy(rgb).permute(2, 0, 1) / 255
        return self.model.infer(image, apply_mask=False, use_fp16=self.half)


CONTESTANT = MoGe
