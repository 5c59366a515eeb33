"""Writes an untrained tiny DepthVLM (a few MB, random weights): `python create_tiny.py DIR`.

Everything but the size is the real thing: configuration, tokenizer, chat template, processor and code. `make tiny`
starts from it.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import local_package  # noqa: F401
from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DEPTH_PROMPT, DEPTH_RESPONSE, SYSTEM_PROMPT, DepthVLMProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}{{- render(message.content) -}}{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CANONICAL_FOCAL_LENGTH = 200.0  # px; a fifth of the paper's, so that a common photo is about 8x6 tokens
TOKENIZER_FRAMES = 200  # procedural frames whose questions and answers the tokenizer learns from
VOCAB_SIZE = 512


def create_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE of 512 entries, learnt from the depth prompt and procedural questions and answers."""
    from bench.sources.procedural import render

    pairs = [pair for index in range(TOKENIZER_FRAMES) for pair in render("train", index).qa]
    corpus = [SYSTEM_PROMPT, DEPTH_PROMPT, DEPTH_RESPONSE, "system\nuser\nassistant\n"]
    corpus += [f"{question} {answer}" for _, question, answer in pairs]
    tokenizer = Tokenizer(models.BPE())
    # digits one by one, as Qwen2's own pre-tokenizer has them: it takes over when the tokenizer is loaded
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def create_model(tokenizer) -> DepthVLMForConditionalGeneration:
    """4.7 million parameters: six vision layers, four LLM layers, the paper's head with fewer channels."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    config = DepthVLMConfig(
        vision_config={
            "depth": 6,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 3, 5],
        },
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        depth_head_widths=[32, 48, 64, 96],
        depth_head_channels=32,
        canonical_focal_length=CANONICAL_FOCAL_LENGTH,
    )
    model = DepthVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def create_processor(tokenizer) -> DepthVLMProcessor:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 4096, "longest_edge": 320 * 240},  # px; more would double the training time
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return DepthVLMProcessor(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATE, canonical_focal_length=CANONICAL_FOCAL_LENGTH
    )


def create(directory: str | Path, seed: int = 0):
    """Write the checkpoint, complete with its code, to `directory`."""
    torch.manual_seed(seed)
    for cls, auto_class in (
        (DepthVLMConfig, "AutoConfig"),
        (DepthVLMForConditionalGeneration, "AutoModelForImageTextToText"),
        (DepthVLMProcessor, "AutoProcessor"),
    ):
        cls.register_for_auto_class(auto_class)  # so that saving copies the code
    tokenizer = create_tokenizer()
    create_model(tokenizer).save_pretrained(directory)
    create_processor(tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="folder to write to")
    create(parser.parse_args().directory)
