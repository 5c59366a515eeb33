"""Samples -> model inputs of a row, made where the row is read; rows -> a batch, which is padding and no more."""

import itertools
import math

import numpy as np
import torch

from depthvlm.processing_depthvlm import DepthVLMProcessor

BYTES_PER_TOKEN = 4  # of English text, roughly
DRAFT = 0.5  # a JPEG that is processed at this share of its size or less is decoded at a reduced one


class Encoder:
    """
    Makes the model's inputs of one sample, so that whatever the processor refuses is met where the row is read.

    Every piece of a conversation is tokenized for itself, answers apart from what comes between them, so `labels` cover
    exactly the answers, each with the token that ends it. max_length: tokens, beyond which a conversation is refused.
    """

    def __init__(self, processor: DepthVLMProcessor, max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length

    def measure(self, sample: dict) -> float:
        """
        The number of tokens that an opened sample will have, roughly, from its text and its images' headers.

        A JPEG that is processed at half its size or less is set to be decoded at a half, a quarter or an eighth.
        """
        turns = itertools.chain(sample["messages"], *(messages[-2:] for messages in sample["others"]))
        texts = (part.get("text", "") for turn in turns for part in turn["content"])
        tokens = sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN
        image_processor = self.processor.image_processor
        token = image_processor.patch_size * image_processor.merge_size
        budget = sample["max_pixels"] or image_processor.size["longest_edge"]
        floor = min(image_processor.size["shortest_edge"], budget)
        for index, (image, focal_length) in enumerate(zip(sample["images"], sample["focal_lengths"], strict=True)):
            width, height = image.size
            crop_side = sample.get("crop_side") or max(image.size)
            area = min(width, crop_side) * min(height, crop_side)
            normalized = focal_length is not None and self.processor.focal_normalization
            zoom = self.processor.canonical_focal_length / focal_length if normalized else 1
            pixels = min(max(area * zoom**2, floor), budget)
            tokens += pixels / token**2
            zoom = math.sqrt(pixels / area)
            if normalized and zoom <= DRAFT:
                image.draft(None, (math.ceil(width * zoom), math.ceil(height * zoom)))
                sample["focal_lengths"][index] *= image.size[0] / width
                sample["crop_side"] = crop_side * image.size[0] / width
        return tokens

    def __call__(self, sample: dict) -> dict:
        """
        Returns `input_ids`, `labels` and `mm_token_type_ids`, `(tokens,)`, `pixel_values`, 8-bit patches for
        `processor.normalize_patches`, and `image_grid_thw` where there are images, and `depth_labels`, one
        `(height, width)` or `None` per image. Of a sample with other conversations also `branches`, `(tokens,)`: 0 for
        what all share, then the number of the conversation, from 1.
        """
        pieces, images = self.branches(sample["messages"], *sample["others"]), sample["images"]
        inputs = {}
        if images:
            inputs = {key: sample[key] for key in ("images", "focal_lengths", "max_pixels")} | {"uint8_patches": True}
            if all(focal_length is None for focal_length in sample["focal_lengths"]):
                inputs["focal_normalization"] = False  # a question about no metres is asked as the base model's are
            if any(depth is not None for depth in sample["depth_maps"]):
                inputs["depth_maps"] = sample["depth_maps"]
        encoded = self.processor(text=[text for text, _, _ in pieces], **inputs)
        ids, labels, types, branches = [], [], [], []
        for (_, is_answer, branch), piece, piece_types in zip(
            pieces, encoded["input_ids"], encoded["mm_token_type_ids"], strict=True
        ):
            ids += piece
            labels += piece if is_answer else [-100] * len(piece)
            types += piece_types
            branches += [branch] * len(piece)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(f"the conversation has {len(ids)} tokens, more than max_length {self.max_length}")
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "mm_token_type_ids": torch.tensor(types)}
        if sample["others"]:
            row["branches"] = torch.tensor(branches)
        if images:
            row |= {name: torch.as_tensor(np.asarray(encoded[name])) for name in ("pixel_values", "image_grid_thw")}
        depth_labels = encoded.get("depth_labels", [None] * len(images))
        row["depth_labels"] = [
            None if depth is None else label for depth, label in zip(sample["depth_maps"], depth_labels, strict=True)
        ]
        return row

    def branches(self, messages: list[dict], *others: list[dict]) -> list[tuple[str, bool, int]]:
        """The text of all conversations in pieces, each with whether it is an answer, and its branch."""
        if not others:
            return [(text, is_answer, 0) for text, is_answer in self.pieces(messages)]
        end, branched, shared = self.processor.vision_end_token, [], None
        for branch, conversation in enumerate((messages, *others), start=1):
            (first, _), *rest = self.pieces(conversation)
            before, _, question = first.rpartition(end)
            if shared not in (None, before):
                raise ValueError("conversations that share an image differ before it; begin them alike")
            shared = before
            branched += [(text, is_answer, branch) for text, is_answer in ((question, False), *rest)]
        return [(shared + end, False, 0), *branched]

    def pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether it is an answer."""
        pieces, done = [], ""
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before = self.processor.apply_chat_template(messages[:index], add_generation_prompt=True)
            after = self.processor.apply_chat_template(messages[: index + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    "the chat template renders a conversation otherwise when it goes on, so answers cannot be told "
                    f"from prompts; use one that appends (at turn {index})"
                )
            end = self.processor.tokenizer.eos_token
            answer, _, _ = after[len(before) :].rpartition(end)
            pieces += [(before[len(done) :], False), (answer + end, True)]
            done = before + answer + end
        return pieces


class Collator:
    """
    Rows of `Encoder` -> the model's inputs, `labels` and `depth_labels`, a list of `(height, width)`, one per image, or
    absent where no image has one; `branches`, where a row has them; and what the trainer takes out before the model:

    - `position`: where the data stream stood after the last row (`stream.py`), where the rows have one;
    - `row_sets`, `image_sets`: index of the data set of each row and of each image.
    """

    def __init__(self, processor: DepthVLMProcessor) -> None:
        self.padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100, "mm_token_type_ids": 0}
        self.patch_size = processor.image_processor.patch_size

    def __call__(self, rows: list[dict]) -> dict:
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in self.padding.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if any("branches" in row for row in rows):
            branches = [row.get("branches", torch.zeros_like(row["input_ids"])) for row in rows]
            batch["branches"] = torch.nn.utils.rnn.pad_sequence(branches, batch_first=True, padding_value=-1)
        with_images = [row for row in rows if "pixel_values" in row]
        if with_images:
            for name in ("pixel_values", "image_grid_thw"):
                batch[name] = torch.cat([row[name] for row in with_images])
        labels = [label for row in rows for label in row["depth_labels"]]
        if any(label is not None for label in labels):
            sizes = (batch["image_grid_thw"][:, 1:] * self.patch_size).tolist()
            batch["depth_labels"] = [
                torch.zeros(size) if label is None else label for label, size in zip(labels, sizes, strict=True)
            ]
        batch["row_sets"] = [row.get("set", 0) for row in rows]
        batch["image_sets"] = [row.get("set", 0) for row in rows for _ in row["depth_labels"]]
        if "position" in rows[-1]:
            batch["position"] = rows[-1]["position"]
        return batch
