"""What a run reads, computes and needs, before it starts: `train_sft.py --dry_run`, and the warnings of every run."""

import dataclasses
import itertools
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import PeftConfig
from PIL import Image
from trl import ModelConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.processing_depthvlm import DepthVLMProcessor

from .arguments import DepthSFTConfig
from .data import DataArguments
from .encoding import Encoder
from .memory import Memory, memory_per_rank
from .rows import BLOCK
from .stream import TrainingStream

GIB = 2**30
MOST_PASSES = 4  # over a data set in a run before a warning
SAMPLES = 64  # looked at by a dry run
SHOWN = 4  # of them, decoded and as pictures, from as many data sets as there are
LITTLE_SHUFFLED = 16  # rows, in a dry run, which has no time to fill a large buffer

NO_INSTRUCTIONS = (
    "the language model is trained on depth rows alone. People who did so report that the model then answers every "
    "question with the depth prompt's response: add a data set of kind instruction or qa to `datasets`, and watch "
    "`canned_depth_replies` with retention_steps"
)


@dataclass
class Share:
    """One data set's part of a run: blocks are the least that is read at once, passes how often each row comes."""

    label: str
    rows: int
    blocks: int
    share: float
    passes: float = 0.0


def shares(stream: TrainingStream) -> list[Share]:
    return [
        Share(source.label, int(rows.sizes.sum()), len(rows.sizes), float(share))
        for source, rows, share in zip(stream.arguments.datasets, stream.rows, stream.shares, strict=True)
    ]


def set_length(arguments: DepthSFTConfig, mix: list[Share]) -> None:
    """Set `max_steps` from `num_train_epochs`, and the passes over each data set from `max_steps`."""
    if arguments.max_steps <= 0:
        if not arguments.num_train_epochs > 0:
            raise ValueError("neither max_steps nor num_train_epochs is set; give one of them")
        rows = sum(share.rows for share in mix)
        arguments.max_steps = math.ceil(arguments.num_train_epochs * rows / arguments.samples_per_step)
    samples = arguments.max_steps * arguments.samples_per_step
    for share in mix:
        share.passes = share.share * samples / share.rows


def warnings(data_args: DataArguments, training_args: DepthSFTConfig, mix: list[Share]) -> list[str]:
    """Sentences about the mix and the length of the run; `set_length` comes first."""
    sentences = []
    readers = training_args.processes * max(training_args.dataloader_num_workers, 1)
    for share in mix:
        if share.blocks < readers:
            sentences.append(
                f"{share.label} has {share.blocks} blocks (shards, or row groups of Parquet) for {readers} readers "
                f"({training_args.processes} processes x {max(training_args.dataloader_num_workers, 1)} workers), so "
                "several read each block; write more and smaller ones, or lower dataloader_num_workers"
            )
        if share.passes > MOST_PASSES:
            sentences.append(
                f"each row of {share.label} is seen {share.passes:.1f} times; lower its weight or the length of the "
                "run, or use sampling: rows"
            )
    if training_args.trains != ["depth_head"] and all(source.kind == "depth" for source in data_args.datasets):
        sentences.append(NO_INSTRUCTIONS)
    return sentences


# Samples


class KeepingEncoder(Encoder):
    """Adds the sample itself to its row."""

    def __call__(self, sample: dict) -> dict:
        return super().__call__(sample) | {"sample": sample}


def decoded(processor: DepthVLMProcessor, row: dict) -> str:
    """A row as text, in pieces that say whether they are prompt or answer."""
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    lines = []
    for is_answer, piece in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100):
        text = processor.tokenizer.decode([token for token, _ in piece])
        image = re.escape(processor.image_token)
        text = re.sub(f"({image})+", lambda m: f"{processor.image_token} x {m[0].count(processor.image_token)}", text)
        lines.append(f"  {'answer' if is_answer else 'prompt'} | {text!r}")
    return "\n".join(lines)


def write_label_picture(path: Path, image: Image.Image, label: torch.Tensor) -> None:
    """A photo beside its depth label, in colours, on the processed grid; white where there is no label."""
    height, width = label.shape
    figure = Figure(figsize=(12, 6 * height / width + 0.6), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(np.asarray(image.convert("RGB").resize((width, height))))
    near, far = np.percentile(label[label > 0], [1, 99])
    depth = np.where(label > 0, label, np.nan)
    shown = right.imshow(depth, cmap="turbo_r", vmin=near, vmax=far, interpolation="nearest")
    figure.colorbar(shown, ax=right, label="depth label (metres at the canonical focal length)", fraction=0.05)
    for axes in (left, right):
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# The report


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}" for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    return "\n".join(lines)


def print_mix(mix: list[Share], arguments: DepthSFTConfig) -> None:
    """Rows and passes of each data set, and the length of the run."""
    samples, rows = arguments.max_steps * arguments.samples_per_step, sum(share.rows for share in mix)
    cells = [
        [share.label, f"{share.rows:,}", f"{share.blocks:,}", f"{share.share:.2%}"]
        + [f"{share.share * samples:,.0f}", f"{share.passes:.2f}"]
        for share in mix
    ]
    print(table(["data set", "rows", "blocks", "share", "samples", "passes"], cells))
    print(f"(a block is a row group of Parquet, or {BLOCK} rows of another format; readers divide blocks, not rows)")
    print(
        f"\nglobal batch {arguments.samples_per_step} = {arguments.processes} processes x "
        f"{arguments.per_device_train_batch_size} x {arguments.gradient_accumulation_steps} micro-batches; "
        f"{arguments.max_steps:,} steps, {samples:,} samples, {samples / rows:.2f} epochs of {rows:,} rows"
    )


def print_lengths(rows: list[dict], batch_size: int) -> None:
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padding = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    print(
        f"tokens per sample: median {statistics.median(lengths):.0f}, p95 {np.percentile(lengths, 95):.0f}, largest "
        f"{max(lengths)}; padding {padding:.1%} (of {len(lengths)} samples)"
    )


def print_memory(plans: list[Memory], checkpointing: bool) -> None:
    names = ["with" if checkpointing else "without", "without" if checkpointing else "with"]
    print(f"\nmemory per rank in GiB, estimated from shapes; activations {names[0]} gradient checkpointing:")
    header = ["", "weights", "gradients", "optimizer", "activations", "total", f"({names[1]})", "checkpoint"]
    cells = [
        [plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.total]
        + [plan.total - plan.activations + plan.other_activations, plan.checkpoint]
        for plan in plans
    ]
    rows = [[plan.engine, *(f"{size / GIB:.2f}" for size in row)] for plan, row in zip(plans, cells, strict=True)]
    print(table(header, rows))


def print_samples(rows: list[dict], labels: list[str], processor: DepthVLMProcessor, pictures: Path) -> None:
    """The first sample of each data set, then others: their text, and pictures of their depth labels."""
    firsts = {row["set"]: number for number, row in reversed(list(enumerate(rows)))}
    others = sorted(set(range(len(rows))) - set(firsts.values()))
    for number in [*sorted(firsts.values()), *others][:SHOWN]:
        row = rows[number]
        print(f"\nsample {number}, of {labels[row['set']]}:")
        print(decoded(processor, row))
        for index, label in enumerate(row["depth_labels"]):
            if label is not None and (label > 0).any():
                path = pictures / f"sample{number}_image{index}.png"
                write_label_picture(path, row["sample"]["images"][index], label)
                print(f"  depth label of image {index}: {path}")


def memory_warnings(plans: list[Memory], arguments: DepthSFTConfig) -> list[str]:
    if arguments.device_memory is not None:
        limit = arguments.device_memory * GIB
    else:
        limit = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB
    return [
        f"with {plan.engine} a rank needs {plan.total / GIB:.1f} GiB, and the device has {limit / GIB:.1f}; lower "
        "per_device_train_batch_size (the global batch stays), use gradient_checkpointing, FSDP2 or LoRA"
        for plan in plans
        if plan.total > limit
    ]


def dry_run(
    data_args: DataArguments, training_args: DepthSFTConfig, model_args: ModelConfig, peft_config: PeftConfig | None
) -> None:
    """Print the report; pictures of depth labels go to `output_dir`/dry_run. Reads the model's config, no weights."""
    model_path = {"pretrained_model_name_or_path": model_args.model_name_or_path, "revision": model_args.model_revision}
    config = DepthVLMConfig.from_pretrained(**model_path)
    processor = DepthVLMProcessor.from_pretrained(**model_path, trust_remote_code=False)
    few = dataclasses.replace(data_args, shuffle_buffer=min(data_args.shuffle_buffer, LITTLE_SHUFFLED))
    size = training_args.per_device_train_batch_size
    encoder = KeepingEncoder(processor, training_args.max_length)
    stream = TrainingStream(few, training_args.seed, encoder=encoder, batch_size=size)

    mix = shares(stream)
    set_length(training_args, mix)
    print_mix(mix, training_args)

    rows = list(itertools.islice(stream, SAMPLES))
    print_lengths(rows, size)

    merged = config.vision_config.spatial_merge_size**2
    image_tokens = [row["image_grid_thw"].prod(-1) // merged for row in rows if "image_grid_thw" in row]
    plans = memory_per_rank(
        config,
        training_args,
        model_args,
        peft_config,
        tokens=size * max(len(row["input_ids"]) for row in rows),
        image_tokens=size * max((int(tokens.sum()) for tokens in image_tokens), default=0),
        image=max((int(tokens.max()) for tokens in image_tokens), default=0),
    )
    print_memory(plans, training_args.gradient_checkpointing)

    labels = [source.label for source in data_args.datasets]
    print_samples(rows, labels, processor, Path(training_args.output_dir) / "dry_run")

    print()
    for sentence in [*warnings(data_args, training_args, mix), *memory_warnings(plans, training_args)]:
        print(f"warning: {sentence}")
