"""A trainer that is given its batches, the same losses by hand, and gradients to compare them by."""

import functools

import torch
import torch.nn.functional as F
from tiny import ROOT, SPECIAL_TOKENS, tiny_batch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, TrainerCallback

from depthvlm.modeling_depthvlm import DepthVLMSeen
from depthvlm.processing_depthvlm import DepthVLMProcessor
from training.arguments import DepthSFTConfig, freeze
from training.data import DataArguments
from training.trainer import DepthSFTTrainer

HEAD, ALL = ["depth_head"], ["language_model", "lm_head", "depth_head", "vision"]
STAGE2 = ["language_model", "lm_head", "depth_head"]
NO_INPUTS = ("labels", "depth_labels", "position", "row_sets", "image_sets")  # of a batch


@functools.cache
def byte_processor():
    """A processor whose tokenizer knows bytes and special tokens alone, so that no training of words can change it."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    own = DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)
    return DepthVLMProcessor(own.image_processor, tokenizer, own.chat_template, own.canonical_focal_length)


def make_batch(grids_per_row, labelled=(), seed=0, answers=True, label_size=None) -> dict:
    """`tiny_batch` with labels for the last tokens of each row and depth labels for the images in `labelled`.

    Rows belong to the data sets 0 and 1 in turns.
    """
    batch = tiny_batch(grids_per_row, padding="right", seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = batch["input_ids"].clone()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        labels[row, : length - 2 - row % 2] = -100  # not the same number of tokens in every row
        labels[row, length:] = -100
    batch["labels"] = labels if answers else torch.full_like(labels, -100)
    grids = [grid for row in grids_per_row for grid in row]
    depth = []
    for index, (height, width) in enumerate(grids):
        size = label_size or (32 * height, 32 * width)
        metres = torch.rand(size, generator=generator) * 9 + 1
        metres[torch.rand(size, generator=generator) < 0.3] = 0
        depth.append(metres if index in labelled else torch.zeros(size))
    if labelled:
        batch["depth_labels"] = depth
    sets = [row % 2 for row in range(len(grids_per_row))]
    image_sets = [name for name, row in zip(sets, grids_per_row, strict=True) for _ in row]
    return batch | {"position": (0, 0, 0), "row_sets": sets, "image_sets": image_sets}


def some_rows(batch, grids_per_row, rows: slice) -> dict:
    """The batch that these rows of it make, in tensors of the same width."""
    first, last = (sum(map(len, grids_per_row[:row])) for row in rows.indices(len(grids_per_row))[:2])
    images = slice(first, last)
    patches = batch["image_grid_thw"].prod(-1).tolist()
    out = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels")}
    out |= {"row_sets": batch["row_sets"][rows], "position": batch["position"]}
    out |= {name: batch[name][images] for name in ("image_grid_thw", "image_sets", "depth_labels")}
    return out | {"pixel_values": torch.cat(batch["pixel_values"].split(patches)[images])}


class Batches(torch.utils.data.IterableDataset):
    """Stands in for the stream: its samples are batches."""

    arguments = DataArguments(datasets=[{"path": "even"}, {"path": "odd"}], eval_datasets=[{"path": "held out"}])

    def __init__(self, batches):
        self.batches = batches

    def bad_rows(self, positions):
        return {}

    def __iter__(self):
        return ({"images": [], "batch": batch} for batch in self.batches)


def only_batch(samples):
    (sample,) = samples
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in sample["batch"].items()}


class Gradients(TrainerCallback):
    """Keeps each update's gradients."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.updates.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(model, batches, output_dir, trains=STAGE2, peft_config=None, **arguments):
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
    }
    training_args = DepthSFTConfig(output_dir=str(output_dir), trains=trains, **defaults | arguments)
    freeze(model, trains)
    gradients = Gradients()
    trainer = DepthSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=Batches(batches),
        data_collator=only_batch,
        processing_class=byte_processor(),
        peft_config=peft_config,
        callbacks=[gradients],
    )
    return trainer, gradients


def naive_losses(model, batches, beta=1.0, text=True):
    """(text loss, depth loss) of one update by hand: the whole logits, one image after another, no wrapping.

    The text loss is the mean over all answer tokens of the update, the depth loss over all its labelled images.
    """
    tokens, token_count, images = 0.0, 0, []
    for batch in batches:
        inputs = {key: batch[key] for key in batch if key not in NO_INPUTS}
        seen = DepthVLMSeen()
        logits = model.lm_head(model.model(**inputs, seen=seen, output_hidden_states=True).last_hidden_state)
        targets = batch["labels"][:, 1:]
        tokens = tokens + F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        token_count += int((targets != -100).sum())
        for (features, grid), label in zip(model.depth_features(seen), batch.get("depth_labels", ()), strict=False):
            if not label.any():
                continue
            depth = model.depth_head(features, grid)[0]
            if depth.shape != label.shape:
                depth = F.interpolate(depth[None, None], size=label.shape, mode="bilinear", align_corners=True)[0, 0]
            d = depth[label > 0].log() - label[label > 0].log()
            images.append((d.pow(2).mean() - 0.5 * d.mean().pow(2) + 1e-8).sqrt())
    text_loss = tokens / max(token_count, 1) if text else torch.zeros(())
    return text_loss, beta * sum(images, torch.zeros(())) / max(len(images), 1)


def naive_gradients(model, batches, trains, **kwargs):
    freeze(model, trains)
    model.zero_grad()
    text, depth = naive_losses(model, batches, text=trains != HEAD, **kwargs)
    (text + depth).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, text.item(), depth.item()


def largest_difference(gradients, reference) -> float:
    """Over all parameters, of values relative to the largest gradient of the parameter or 1, whichever is more."""
    names = {name for name, value in gradients.items() if value.any()} | {
        name for name, value in reference.items() if value.any()
    }
    assert names <= reference.keys() and names <= gradients.keys(), names ^ reference.keys()
    differences = [
        ((gradients[name] - reference[name]).abs().max() / reference[name].abs().max().clamp(min=1)).item()
        for name in names
    ]
    return max(differences, default=0.0)
