"""UniDepth V1 and V2 (Piccinelli et al., CVPR 2024; 2025), through the authors' package:
`unidepth:lpiccinelli/unidepth-v1-{vitl14,cnvnxtl}`, `unidepth:lpiccinelli/unidepth-v2-{vits14,vitb14,vitl14}`.

It predicts the camera, and z in metres at the image's own size. V2 runs under float16 autocast on a GPU, whatever the
dtype. V1's attention is that of an old xformers.
"""

import numpy as np
from transformers import PreTrainedConfig

from ._base import Query, package
from ._dense import PerImage, to_tensor

XFORMERS = "pip install --no-deps xformers==0.0.28.post3, the last one with xformers.components"


class UniDepth(PerImage):
    title = "UniDepth"

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        if dtype != "float32":
            raise ValueError(f"UniDepth prepares its input as float32, not {dtype}; pass float32")
        with package("unidepth", "UniDepth", "pip install git+https://github.com/lpiccinelli-eth/UniDepth"):
            from unidepth import models
        config, _ = PreTrainedConfig.get_config_dict(checkpoint)  # of its own form: {"model": {"name": ...}, ...}
        name = config.get("model", {}).get("name")
        if name not in ("UniDepthV1", "UniDepthV2"):
            raise ValueError(
                f"the config.json of {checkpoint} names the model {name!r}, neither UniDepthV1 nor UniDepthV2; pass "
                "lpiccinelli/unidepth-v2-vitl14 or another of theirs"
            )
        if name == "UniDepthV1":
            with package("xformers", "xformers, for UniDepth V1's attention,", XFORMERS):
                from xformers.components.attention import NystromAttention  # noqa: F401
        self.title = f"UniDepth {name[-2:]}"
        self.model = getattr(models, name).from_pretrained(checkpoint).to(device).eval()

    def map(self, query: Query) -> np.ndarray:
        depth = self.model.infer(to_tensor(query.image))["depth"]
        return depth[0, 0].float().numpy(force=True)


CONTESTANT = UniDepth
