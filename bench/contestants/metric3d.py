"""Metric3D (Yin et al., ICCV 2023) and Metric3D v2 (Hu et al., TPAMI 2024): `metric3d:metric3d_convnext_large` (v1),
`metric3d:metric3d_vit_giant2` (v2), by the names of the authors' torch.hub.

torch.hub downloads and runs the code of github.com/YvanYin/Metric3D; choosing this contestant is the consent. Weights
are read without unpickling. The model answers for a focal length of 1000 px: its depth times the focal length in px of
the image as resized, / 1000, held within 0 and 300 m (the repository's hubconf.py). It has no metres without a camera.
The repository's decoders put tensors on "cuda" by name, so that it needs a CUDA GPU.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download

from ._base import NotRunnable, Query
from ._dense import PerImage, to_tensor

WEIGHTS = {  # of JUGGHM/Metric3D
    "metric3d_convnext_tiny": "convtiny_hourglass_v1.pth",
    "metric3d_convnext_large": "convlarge_hourglass_0.3_150_step750k_v1.1.pth",
    "metric3d_vit_small": "metric_depth_vit_small_800k.pth",
    "metric3d_vit_large": "metric_depth_vit_large_800k.pth",
    "metric3d_vit_giant2": "metric_depth_vit_giant2_800k.pth",
}
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


class Metric3D(PerImage):
    title = "Metric3D"
    uses_intrinsics = True

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        if checkpoint not in WEIGHTS:
            raise ValueError(f"unknown Metric3D model {checkpoint!r}; they are {', '.join(WEIGHTS)}")
        if dtype != "float32":
            raise ValueError(f"Metric3D's decoder mixes in float32, not {dtype}; pass float32")
        if not torch.cuda.is_available():
            raise NotRunnable("Metric3D's code puts tensors on 'cuda' by name; run it on a machine with a CUDA GPU")
        try:
            self.model = torch.hub.load("yvanyin/metric3d", checkpoint, pretrain=False, trust_repo=True)
        except (ImportError, OSError, RuntimeError) as error:
            raise NotRunnable(
                f"torch.hub cannot make {checkpoint} ({error}): pip install mmcv-lite mmengine timm torchvision, and "
                "let it reach github.com/YvanYin/Metric3D once"
            ) from error
        weights = torch.load(hf_hub_download("JUGGHM/Metric3D", WEIGHTS[checkpoint]), "cpu", weights_only=True)
        missing, _ = self.model.load_state_dict(weights["model_state_dict"], strict=False)  # as hubconf.py does
        if missing:
            warnings.warn(f"{checkpoint}: {len(missing)} weights are not in its file: {missing[:5]}", stacklevel=2)
        self.model.to(device).eval()
        self.device = device
        vit = "vit" in checkpoint
        self.title, self.size = ("Metric3D v2", (616, 1064)) if vit else ("Metric3D", (544, 1216))

    def map(self, query: Query) -> np.ndarray:
        width, height = query.image.size
        scale = min(self.size[0] / height, self.size[1] / width)
        rows, columns = int(height * scale), int(width * scale)
        image = to_tensor(query.image)[None].float()
        image = (F.interpolate(image, size=(rows, columns), mode="bilinear") - MEAN) / STD
        top, left = (self.size[0] - rows) // 2, (self.size[1] - columns) // 2
        # zeros are the mean colour now
        image = F.pad(image, (left, self.size[1] - columns - left, top, self.size[0] - rows - top))
        depth, _, _ = self.model.inference({"input": image.to(self.device)})
        depth = depth.reshape(1, 1, *depth.shape[-2:])[..., top : top + rows, left : left + columns].float()
        depth = F.interpolate(depth, size=(height, width), mode="bilinear") * (query.intrinsics[0] * scale / 1000)
        return depth[0, 0].clamp(0, 300).numpy(force=True)


CONTESTANT = Metric3D
