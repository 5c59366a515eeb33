"""DepthVLM as the model `depthvlm` of lmms-eval: general questions, scored under its Qwen3-VL's very conditions."""

import torch
from accelerate import Accelerator
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from transformers import AutoModelForImageTextToText, AutoProcessor


class DepthVLM(Qwen3_VL):
    """
    lmms-eval's Qwen3-VL around a DepthVLM checkpoint, whose own code is run (`trust_remote_code`).

    Photos are sized as lmms-eval sizes them for the base model, not by focal length, and no depth is computed: scores
    compare with `--model qwen3_vl` on the base. It knows images alone. Arguments as `qwen3_vl` has them, of which only
    these are taken; an unknown one raises `TypeError`.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cuda",
        device_map: str | None = None,
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        min_pixels: int = 256 * 28 * 28,
        max_pixels: int = 1605632,
        system_prompt: str = "You are a helpful assistant.",
    ):
        super(Qwen3_VL.__base__, self).__init__()  # past both Qwen3-VLs, which would load transformers' own model
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        self._device = self.accelerator.device if self._world_size > 1 else torch.device(device)
        self.device_map = device_map if device_map and self._world_size == 1 else str(self._device)
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            trust_remote_code=True,
            use_safetensors=True,
            dtype="bfloat16",
            device_map=self.device_map,
            attn_implementation=attn_implementation,
        )
        if model.config.model_type != "depthvlm":
            raise ValueError(f"{pretrained} is a {model.config.model_type}; use --model qwen3_vl for a plain Qwen3-VL")
        self._model, self._config = model.eval(), model.config
        # lmms-eval sizes the photos by itself, as for Qwen3-VL
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True, focal_normalization=False)
        self._tokenizer, self._max_length = self.processor.tokenizer, 2048
        self.batch_size_per_gpu, self.use_cache = int(batch_size), True
        self.min_pixels, self.max_pixels, self.total_pixels = min_pixels, max_pixels, None
        self.max_num_frames, self.fps = 32, None
        self.system_prompt, self.reasoning_prompt = system_prompt, None
        self.enable_thinking, self.interleave_visuals = None, False

    def _build_video_kwargs(self) -> dict:
        return {}
