"""Writes an untrained tiny DepthVLM: `python create_tiny.py DIR`.

This repository's own configuration, tokenizer, chat template, processor and code, with new random weights. `make tiny`
and the ablations start from it.
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

ROOT = Path(__file__).resolve().parent


def create(directory: str | Path, seed: int = 0) -> None:
    """Write the checkpoint, complete with its code, to `directory`."""
    torch.manual_seed(seed)
    for cls, auto_class in (
        (DepthVLMConfig, "AutoConfig"),
        (DepthVLMForConditionalGeneration, "AutoModelForImageTextToText"),
        (DepthVLMProcessor, "AutoProcessor"),
    ):
        cls.register_for_auto_class(auto_class)  # so that saving copies the code
    config = DepthVLMConfig.from_pretrained(ROOT)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # the committed checkpoint is stored in bfloat16
    model = DepthVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(ROOT)
    model.save_pretrained(directory)
    DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False).save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="folder to write to")
    create(parser.parse_args().directory)
