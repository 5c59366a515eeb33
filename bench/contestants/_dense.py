"""What contestants with maps share."""

from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from ._base import Contestant, Query


class PerImage(Contestant[list[Query]]):
    """A contestant whose model takes one image at a time. Subclasses override `map`."""

    dense = True

    @torch.inference_mode()
    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        return [self.map(query) for query in prepared]

    def map(self, query: Query) -> np.ndarray:
        """(H, W) float32, metres at the image's own size."""
        raise NotImplementedError


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class DepthModel(Contestant[list[Query]]):
    """A checkpoint of `model_class`; its config is checked before its weights are read."""

    dense = True
    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{checkpoint} is a {config.model_type!r} model, not {self.title}; try pipeline:{checkpoint}"
            )
        self.check(checkpoint, config)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.model = self.model_class.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        self.model.to(device).eval()

    def check(self, checkpoint: str, config: PreTrainedConfig) -> None:
        """Raise ValueError for a checkpoint without metres, NotRunnable for what is not installed."""
