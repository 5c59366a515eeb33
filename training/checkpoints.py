"""Checkpoints of a run: the newest complete one, weights in shards under FSDP2, adapters merged, the model card.

python -m training.checkpoints RUN/checkpoint-200 DST    # one complete repository of a checkpoint in shards
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.dynamic_module_utils import custom_object_save
from trl import ModelConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.predictions.outputs import color_png
from depthvlm.processing_depthvlm import DepthVLMProcessor

TRAINED, FROZEN = "trained_weights", "frozen_weights"  # folders: of each checkpoint, and of the run
EXAMPLE = Path(__file__).resolve().parent.parent / "samples" / "room.jpg"
EXAMPLE_PHOTO, EXAMPLE_DEPTH = "depth_example_photo.jpg", "depth_example.png"  # files of a save
CARD = """---
{{ card_data }}
---

# {{ name }}

A DepthVLM: a Qwen3-VL that answers in words and in metric depth from one forward pass. Trained from `{{ base }}`,
{{ stage }}.

{% if has_example -%}
![a photo]({{ photo }})
![its depth]({{ depth }})

{% endif -%}
```python
import torch
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{{ name }}", trust_remote_code=True)
model = AutoModel.from_pretrained("{{ name }}", trust_remote_code=True)
inputs = processor(images=["photo.jpg"], focal_lengths=[1430.0], return_tensors="pt")  # px; default: from EXIF
with torch.inference_mode():
    outputs = model(**inputs)
depth = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]  # (H, W), metres
```

## Data

| data set | kind | weight | rows | epochs |
|---|---|---:|---:|---:|
{% for row in data -%}
| {{ row | join(" | ") }} |
{% endfor %}
## Training

{{ steps }} of {{ steps_planned }} steps of {{ samples }} samples, learning rate {{ learning_rate }}, seed {{ seed }},
depth loss {{ depth_losses }} (beta {{ depth_weight }}).

## Metrics

{{ metrics_of }}

| metric | value |
|---|---:|
{% for name, value in metrics.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
"""


def last_checkpoint(output: Path) -> Path:
    """The newest checkpoint that every rank wrote to its end; ValueError where there is none."""
    complete = []
    for folder in output.glob("checkpoint-*"):
        files = list(folder.glob("data_position_*.json"))
        if files and len(files) == json.loads(files[0].read_text())["world_size"]:
            complete.append((int(folder.name.split("-")[1]), folder))
    if not complete:
        raise ValueError(f"{output} holds no complete checkpoint to resume from; leave resume_from_checkpoint out")
    return max(complete)[1]


# Weights in shards: each rank writes its part, as safetensors


def weights_of(model: DepthVLMForConditionalGeneration, trained: bool) -> dict[str, torch.Tensor]:
    """This rank's part of the trained weights, or of the frozen ones; tied weights have one name."""
    of_trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    return {
        name: value
        for name, value in get_model_state_dict(model).items()
        if (name in of_trained) == trained and name not in model.all_tied_weights_keys
    }


def save_shards(model: DepthVLMForConditionalGeneration, folder: Path, trained: bool) -> None:
    """Write `weights_of` a model that FSDP2 divides among ranks; all ranks call it."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter  # older supported versions of torch lack it

    dcp.save(weights_of(model, trained), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_shards(model: DepthVLMForConditionalGeneration, folder: Path) -> None:
    """Load trained weights that `save_shards` wrote, by any number of ranks; all ranks call it."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    weights = weights_of(model, trained=True)
    dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder that `save_shards` wrote, whole, in this process."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return weights


def assemble(checkpoint: Path, destination: Path) -> None:
    """Write the complete repository of a checkpoint in shards: weights, processor and code."""
    run = checkpoint.parent
    for folder in (checkpoint / TRAINED, run / FROZEN):
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; pass RUN/checkpoint-N of a run under FSDP2")
    weights = read_shards(run / FROZEN) | read_shards(checkpoint / TRAINED)
    register_code()
    config = DepthVLMConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = DepthVLMForConditionalGeneration(config)
    if missing := model.state_dict().keys() - weights.keys() - model.all_tied_weights_keys.keys():
        raise ValueError(
            f"{checkpoint} and {run / FROZEN} lack {len(missing)} tensors ({', '.join(sorted(missing)[:3])}, ...), so "
            "a save was cut short; use an earlier checkpoint"
        )
    model.save_pretrained(destination, state_dict=weights)
    DepthVLMProcessor.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(destination)


# Adapters


def merge_adapters(model_args: ModelConfig, adapters: str | Path) -> DepthVLMForConditionalGeneration:
    """The base model, read again from disk in the dtype of training, with a folder of adapters merged into it."""
    base = DepthVLMForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype or "float32"
    )
    base.depth_head.float()
    return PeftModel.from_pretrained(base, adapters).merge_and_unload()


# Repositories


def register_code() -> None:
    """Have every save hold the code that its files name."""
    for cls, auto_class in (
        (DepthVLMConfig, "AutoConfig"),
        (DepthVLMForConditionalGeneration, "AutoModelForImageTextToText"),
        (DepthVLMProcessor, "AutoProcessor"),
    ):
        cls.register_for_auto_class(auto_class)


def restore_class_name(model: torch.nn.Module) -> None:
    """FSDP2 gives a model a class of torch's own, whose name and file a save would state as the model's code."""
    if isinstance(model, FSDPModule):
        type(model).__name__ = DepthVLMForConditionalGeneration.__name__
        type(model).__module__ = DepthVLMForConditionalGeneration.__module__


def save_without_weights(model: torch.nn.Module, processor: DepthVLMProcessor, folder: str | Path) -> None:
    """All of a repository but its weights: config, code, processor. The model may be divided, or hold adapters."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    restore_class_name(core)
    Path(folder).mkdir(parents=True, exist_ok=True)
    core.config.save_pretrained(folder)
    core.generation_config.save_pretrained(folder)
    custom_object_save(core, folder, config=core.config)
    processor.save_pretrained(folder)


@torch.no_grad()
def save_example(model: torch.nn.Module, processor: DepthVLMProcessor, folder: Path, writes: bool) -> None:
    """A photo of this repository and its depth, as the model card shows them; under FSDP2 all ranks call it."""
    inputs = processor(images=[EXAMPLE], return_tensors="pt").to(model.device)
    model.eval()
    outputs = model(**inputs, logits_to_keep=1)
    if writes:
        depth = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]
        shutil.copy(EXAMPLE, folder / EXAMPLE_PHOTO)
        (folder / EXAMPLE_DEPTH).write_bytes(color_png(depth.numpy(force=True)))


def model_card(trainer: Trainer, name: str, has_example: bool) -> ModelCard:
    """
    What the model was made of, from which data, how, and how well it does.

    trainer: a `DepthSFTTrainer`. has_example: whether the files of `save_example` lie beside the card.
    """
    args, sources = trainer.args, trainer.train_dataset.arguments.datasets
    base = trainer.model.config.name_or_path
    is_local = Path(base).exists()
    history = trainer.state.log_history
    logs = next((entry for entry in reversed(history) if "eval_loss" in entry), None)
    metrics_of = "On the held-out rows:"
    if logs is None:
        logs = next((entry for entry in reversed(history) if "loss" in entry), {})
        metrics_of = "Of the last training steps (nothing was held out):"
    names = ("loss", "lm_loss", "depth_loss", "delta1", "abs_rel")
    metrics = {key: round(value, 4) for key, value in logs.items() if key.removeprefix("eval_").split("/")[0] in names}
    questions = Path(args.output_dir) / "questions_results.json"
    if questions.exists():
        metrics |= {key: round(value, 4) for key, value in json.loads(questions.read_text()).items()}
    results = [
        EvalResult(
            task_type="depth-estimation",
            dataset_type="custom",
            dataset_name=name,
            dataset_config=name,  # two results of one data set are told by this
            metric_type=metric,
            metric_value=metrics[f"eval_{metric}/{name}"],
        )
        for metric in ("delta1", "abs_rel")
        for name in trainer.set_names["eval"]
        if f"eval_{metric}/{name}" in metrics
    ]
    data = ModelCardData(
        base_model=None if is_local else base,
        datasets=[source.path for source in sources if not Path(source.path).exists()] or None,
        eval_results=results or None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="depth-estimation",
        tags=["depth-estimation", "metric-depth", "image-text-to-text", "qwen3_vl", "trl", "sft"],
    )
    prefix = "epochs/"
    epochs = {
        key.removeprefix(prefix): value for entry in history for key, value in entry.items() if key.startswith(prefix)
    }
    stage = "the depth head alone" if args.trains == ["depth_head"] else " and ".join(args.trains) + " together"
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        has_example=has_example,
        photo=EXAMPLE_PHOTO,
        depth=EXAMPLE_DEPTH,
        base=Path(base).resolve().name if is_local else base,
        stage=f"training {stage}" + (", the language model by adapters" if trainer.has_adapters else ""),
        data=[
            [source.label, source.kind, source.weight, trainer.rows.get(source.label) or "?"]
            + [epochs.get(source.label, "?")]
            for source in sources
        ],
        steps=trainer.state.global_step,
        steps_planned=args.max_steps,
        samples=args.samples_per_step,
        learning_rate=args.learning_rate,
        depth_losses=" + ".join(f"{weight:g} {loss}" for loss, weight in args.depth_losses.items()),
        depth_weight=args.depth_weight,
        seed=args.seed,
        metrics_of=metrics_of,
        metrics=metrics,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.checkpoints", description=assemble.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder RUN/checkpoint-N of a run under FSDP2")
    parser.add_argument("destination", type=Path, help="folder of the repository")
    options = parser.parse_args()
    assemble(options.checkpoint, options.destination)
    print(f"{options.destination} is a complete repository")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"training.checkpoints: {error}")
