"""Any vision-language model of transformers, asked in words (_prompt.py): Qwen3-VL, InternVL3.5, LLaVA and others."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from . import _prompt
from ._base import Answer, Contestant, NotRunnable, Query


class VisionLanguageModel(Contestant[list[Query]]):
    """Greedy decoding; what the checkpoint's own processor does to an image (tiles, sizes) is left as it is."""

    title = "Vision-language model"
    group = "General-Purpose VLMs"
    dense = False
    model_types = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl", "internvl", "llava", "llava_onevision")
    questions = staticmethod(_prompt.questions)
    text_key = "text"  # of a chat's text, as the checkpoint's template has it
    batch_size = 8  # points
    max_new_tokens = 512  # a reply cut off here is unparsable

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        self.title = Path(checkpoint).name
        try:
            model_type = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).model_type
        except ValueError as error:
            raise NotRunnable(
                f"{checkpoint} is no model of this transformers version, and no code of others is run; take a version "
                "that has it (InternVL: the checkpoint whose name ends in -HF), or serve it behind an "
                "OpenAI-compatible endpoint and pass openai:NAME"
            ) from error
        if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise NotRunnable(f"{checkpoint} has model_type {model_type!r}, which takes no images and text; pass a VLM")
        try:
            self.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        except (ImportError, AttributeError) as error:  # the latter is how Qwen3-VL's lack of torchvision shows
            raise NotRunnable(
                f"the processor of {checkpoint} cannot be loaded ({error}); pip install torchvision"
            ) from error
        self.processor.tokenizer.padding_side = "left"  # so that every row's reply starts at the same place
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, use_safetensors=True, trust_remote_code=False
        ).eval()

    def answers(self, prepared: list[Query]) -> list[list[Answer]]:
        return _prompt.answers(prepared, self.ask, self.batch_size, self.questions)

    @torch.inference_mode()
    def ask(self, questions: list[_prompt.Question]) -> list[Answer]:
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", self.text_key: prompt}]}]
            for image, prompt in questions
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),  # a checkpoint's own are for sampling
        )[:, inputs["input_ids"].shape[1] :]
        ends = torch.as_tensor(self.model.generation_config.eos_token_id).to(tokens.device)
        finished = torch.isin(tokens, ends).any(1).tolist()
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [_prompt.read(text.strip(), end) for text, end in zip(texts, finished, strict=True)]


CONTESTANT = VisionLanguageModel
