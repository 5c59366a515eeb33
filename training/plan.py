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
from trl import ModelConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.processing_depthvlm import DepthVLMProcessor

from .arguments import DepthSFTConfig
from .data import DataArguments
from .encoding import Encoder
from .memory import memory_per_rank
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
    found = []
    readers = training_args.processes * max(training_args.dataloader_num_workers, 1)
    for share in mix:
        if share.blocks < readers:
            found.append(
                f"{share.label} has {share.blocks} blocks (shards, or row groups of Parquet) for {readers} readers "
                f"({training_args.processes} processes x {max(training_args.dataloader_num_workers, 1)} workers), so "
                "several read each block; write more and smaller ones, or lower dataloader_num_workers"
            )
        if share.passes > MOST_PASSES:
            found.append(
                f"each row of {share.label} is seen {share.passes:.1f} times; lower its weight or the length of the "
                "run, or use sampling: rows"
            )
    if training_args.trains != ["depth_head"] and all(source.kind == "depth" for source in data_args.datasets):
        found.append(NO_INSTRUCTIONS)
    return found


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


def write_label_picture(path: Path, image, label: torch.Tensor) -> None:
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


def device_bytes(arguments: DepthSFTConfig) -> float:
    if arguments.device_memory is not None:
        return arguments.device_memory * GIB
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB


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
    samples, rows = training_args.max_steps * training_args.samples_per_step, sum(share.rows for share in mix)
    cells = [
        [share.label, f"{share.rows:,}", f"{share.blocks:,}", f"{share.share:.2%}"]
        + [f"{share.share * samples:,.0f}", f"{share.passes:.2f}"]
        for share in mix
    ]
    print(table(["data set", "rows", "blocks", "share", "samples", "passes"], cells))
    print(
        f"\nglobal batch {training_args.samples_per_step} = {training_args.processes} processes x {size} x "
        f"{training_args.gradient_accumulation_steps} micro-batches; {training_args.max_steps:,} steps, {samples:,} "
        f"samples, {samples / rows:.2f} epochs of {rows:,} rows"
    )

    read = list(itertools.islice(stream, SAMPLES))
    lengths = [len(row["input_ids"]) for row in read]
    merged = config.vision_config.spatial_merge_size**2
    images = [row["image_grid_thw"].prod(-1) // merged for row in read if "image_grid_thw" in row]
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    padding = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    print(
        f"tokens per sample: median {statistics.median(lengths):.0f}, p95 {np.percentile(lengths, 95):.0f}, largest "
        f"{max(lengths)}; padding {padding:.1%} (of {len(lengths)} samples)"
    )

    of_samples = max((int(sizes.sum()) for sizes in images), default=0)
    largest = max((int(sizes.max()) for sizes in images), default=0)
    plans = memory_per_rank(
        config, training_args, model_args, peft_config, size * max(lengths), size * of_samples, largest
    )
    checkpointing = training_args.gradient_checkpointing
    names = ["with" if checkpointing else "without", "without" if checkpointing else "with"]
    print(f"\nmemory per rank in GiB, estimated from shapes; activations {names[0]} gradient checkpointing:")
    header = ["", "weights", "gradients", "optimizer", "activations", "total", f"({names[1]})", "checkpoint"]
    cells = [
        [plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.total]
        + [plan.total - plan.activations + plan.other_activations, plan.checkpoint]
        for plan in plans
    ]
    rows = [[plan.engine, *(f"{number / GIB:.2f}" for number in row)] for plan, row in zip(plans, cells, strict=True)]
    print(table(header, rows))

    firsts = {row["set"]: number for number, row in reversed(list(enumerate(read)))}  # of each data set
    for number in [*sorted(firsts.values()), *sorted(set(range(len(read))) - set(firsts.values()))][:SHOWN]:
        row = read[number]
        print(f"\nsample {number}, of {data_args.datasets[row['set']].label}:")
        print(decoded(processor, row))
        for index, label in enumerate(row["depth_labels"]):
            if label is not None and (label > 0).any():
                path = Path(training_args.output_dir) / "dry_run" / f"sample{number}_image{index}.png"
                write_label_picture(path, row["sample"]["images"][index], label)
                print(f"  depth label of image {index}: {path}")

    print()
    found = warnings(data_args, training_args, mix)
    limit = device_bytes(training_args)
    for plan in plans:
        if plan.total > limit:
            found.append(
                f"with {plan.engine} a rank needs {plan.total / GIB:.1f} GiB, and the device has {limit / GIB:.1f}; "
                "lower per_device_train_batch_size (the global batch stays), use gradient_checkpointing, FSDP2 or LoRA"
            )
    for sentence in found:
        print(f"warning: {sentence}")
