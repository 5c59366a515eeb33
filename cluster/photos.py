"""From single photos and conversations to batches for the model."""

import numpy as np
import torch
from transformers import BatchFeature

from depthvlm.processing_depthvlm import SYSTEM_PROMPT, DepthVLMProcessor


def prompt(processor: DepthVLMProcessor, question: str | None) -> str:
    """The text of one photo: the depth prompt, or a question."""
    if question is None:
        return processor.depth_text()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    conversation = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True)


def encode(
    processor: DepthVLMProcessor, photos: list, text: str, focal_lengths=None, max_pixels: int | None = None
) -> BatchFeature:
    """
    One row of a batch, from any process: the processor's, with 8-bit patches. photos: none, or one per placeholder of
    `text`. Raises what the processor raises.
    """
    if not photos:
        return processor(text=[text], return_tensors="pt")
    return processor(
        images=photos,
        text=[text],
        focal_lengths=focal_lengths,
        max_pixels=max_pixels,
        uint8_patches=True,
        return_tensors="pt",
    )


def collate(processor: DepthVLMProcessor, rows: list[BatchFeature]) -> BatchFeature:
    """One batch of rows of `encode`, padded on the left, as `generate` needs it."""
    padding = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name][0] for row in rows], batch_first=True, padding_value=value, padding_side="left"
        )
        for name, value in padding.items()
    }
    with_images = [row for row in rows if "pixel_values" in row]
    if with_images:
        for name in ("pixel_values", "image_grid_thw"):
            batch[name] = torch.cat([row[name] for row in with_images])
        batch["cameras"] = [camera for row in with_images for camera in row["cameras"]]
    return BatchFeature(batch)


def to_device(processor: DepthVLMProcessor, batch: BatchFeature, device) -> BatchFeature:
    """A batch as the model takes it."""
    batch = batch.to(device)
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalize_patches(batch["pixel_values"])
    return batch


def intrinsics(camera: dict) -> dict[str, float]:
    """fx, fy, cx, cy in px of the photo, the centre of its first pixel being (0, 0)."""
    height, width = camera["size"]
    fx, fy = np.broadcast_to(camera["focal_length"], 2).tolist()
    return {"fx": fx, "fy": fy, "cx": (width - 1) / 2, "cy": (height - 1) / 2}
