"""Depth Anything V1's metric models (Yang et al., "Depth Anything", CVPR 2024): its encoder under ZoeDepth's head.

`depth_anything_v1:.../depth_anything_metric_depth_{indoor,outdoor}.pt`, the files of the authors' release. The code is
in their research repository alone, which is no package and reads files relative to its folder `metric_depth`. One pass
per image; the authors' evaluation averages it with the mirrored image's. (`LiheYoung/depth-anything-*-hf` is relative
depth.)
"""

import os
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from ._base import NotRunnable, Query, package
from ._dense import PerImage, to_tensor

SETUP = (
    "git clone https://github.com/LiheYoung/Depth-Anything, install metric_depth/environment.yml, put "
    "depth_anything_vitl14.pth into metric_depth/checkpoints/, and run with PYTHONPATH=Depth-Anything/metric_depth"
)


class DepthAnythingV1(PerImage):
    title = "Depth Anything V1"

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        if dtype != "float32":
            raise ValueError(f"Depth Anything V1's head is written for float32, not {dtype}; pass float32")
        path = Path(checkpoint).resolve()
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} is not a file; pass depth_anything_metric_depth_indoor.pt or _outdoor.pt, from "
                "https://huggingface.co/spaces/LiheYoung/Depth-Anything/tree/main/checkpoints_metric_depth"
            )
        if "indoor" not in path.name and "outdoor" not in path.name:
            raise ValueError(
                f"{path.name} names neither indoor nor outdoor, which choose the head's settings; rename it"
            )
        with package("zoedepth", "Depth Anything V1's metric code", SETUP):
            from zoedepth.models import builder
            from zoedepth.utils.config import get_config
        config = get_config("zoedepth", "eval", "nyu" if "indoor" in path.name else "kitti")
        config.pretrained_resource = f"local::{path}"
        folder = os.getcwd()
        os.chdir(Path(builder.__file__).parents[2])  # metric_depth: it reads ./checkpoints and ../torchhub
        try:
            self.model = builder.build_model(config)
        except OSError as error:
            raise NotRunnable(f"Depth Anything V1 lacks a file ({error}): {SETUP}") from error
        finally:
            os.chdir(folder)
        self.device = device
        self.model.to(device).eval()

    def map(self, query: Query) -> np.ndarray:
        depth = self.model(to_tensor(query.image)[None].to(self.device) / 255)["metric_depth"]
        depth = F.interpolate(depth, size=query.image.size[::-1], mode="bilinear", align_corners=True)
        return depth[0, 0].numpy(force=True)


CONTESTANT = DepthAnythingV1
