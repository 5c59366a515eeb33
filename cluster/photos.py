"""From single photos and conversations to batches for the model."""

import torch
from transformers import BatchFeature

from depthvlm.processing_depthvlm import DepthVLMProcessor


def encode(
    processor: DepthVLMProcessor, photos: list, text: str, focal_lengths=None, max_pixels: int | None = None
) -> BatchFeature:
    """
    One row of a batch for any conversation, as `handler.encode_inputs` makes it of one photo. photos: none, or one per
    placeholder of `text`. Raises what the processor raises.
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
