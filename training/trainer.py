"""TRL's trainer with a depth loss, exact averages whatever each rank holds, and data that resumes to the sample."""

import dataclasses
import functools
import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration

from .data import TrainingStream
from .loss import add_depth_loss

PARTS = {
    "depth_head": "depth_head.",
    "language_model": "model.language_model.",
    "lm_head": "lm_head.",
    "vision": "model.visual.",
}


@dataclass
class DepthSFTConfig(SFTConfig):
    """TRL's arguments, some with other defaults, and this project's."""

    trains: list[str] = field(
        default_factory=lambda: ["depth_head"],
        metadata={"help": f"parts of the model to train, of {', '.join(PARTS)}; the rest is frozen"},
    )
    depth_weight: float = field(
        default=1.0, metadata={"help": "weight beta of the depth loss in L_LM + beta * L_depth; 0 turns it off"}
    )
    eval_questions: int = field(
        default=0,
        metadata={
            "help": "number of rows per evaluation data set whose questions are answered after training; 0 turns it off"
        },
    )
    retention_steps: int = field(
        default=0,
        metadata={
            "help": "interval, in steps, at which fixed questions are answered to detect forgetting; 0 turns it off"
        },
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "dtype of the final checkpoint, e.g. bfloat16; default: the dtype of training"}
    )

    max_length: int | None = field(
        default=None, metadata={"help": "maximum tokens per conversation; longer ones are never truncated"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "must stay true: the data stream resumes by its own positions"}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "must stay true: no logits are computed"})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "experiment trackers, e.g. tensorboard, wandb or trackio"}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "data loading processes per rank"})

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.trains) - set(PARTS):
            raise ValueError(f"trains names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
        if not self.trains:
            raise ValueError(f"trains is empty; name at least one of {', '.join(PARTS)}")
        for name in ("remove_unused_columns", "ignore_data_skip", "prediction_loss_only"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}; it must stay as it is, see --help: leave it out")
        if self.trains == ["depth_head"] and not self.depth_weight > 0:
            raise ValueError(f"depth_weight is {self.depth_weight}, so a head trained alone has no loss; raise it")


def freeze(model: DepthVLMForConditionalGeneration, trains: list[str]) -> None:
    """Make the named `PARTS` trainable and freeze every other parameter."""
    if "lm_head" in trains and model.config.tie_word_embeddings and "language_model" not in trains:
        raise ValueError(
            "trains has lm_head without language_model, but this model's LM head is the LLM's embedding; name both"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(PARTS[part] for part in trains))


class DepthSFTTrainer(SFTTrainer):
    """TRL's trainer with a depth loss, exact averages whatever each rank holds, and data that resumes to the sample."""

    def __init__(self, *args, train_dataset: TrainingStream, **kwargs):
        # TRL takes none but the classes of `datasets`, of which it looks at the first sample
        sample = functools.partial(itertools.islice, train_dataset, 1)
        super().__init__(*args, train_dataset=datasets.IterableDataset.from_generator(sample), **kwargs)
        self.train_dataset = train_dataset
        core = self.accelerator.unwrap_model(self.model)
        core = core.get_base_model() if hasattr(core, "get_base_model") else core
        trained = [name for name, parameter in core.named_parameters() if parameter.requires_grad]
        self.trains_text = any("depth_head." not in name for name in trained)
        add_depth_loss(core, self.trains_text)
        # Both losses are divided by the counts of the whole update, over ranks and accumulation, so by nothing else
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # accelerate's would add gradients over ranks, and return losses, in bfloat16
            in_float32 = {"reduce_dtype": torch.float32, "output_dtype": torch.float32}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **in_float32)
        self.positions, self.batches_done = {}, 0
        self.images_seen, self.last_log = 0, time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        # not prepared by accelerate, which would split the rank's own stream over the ranks once more
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # not the default one, whose state a resumed run takes over
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labelled = sum(int((label > 0).any()) for batch in batches for label in batch.get("depth_labels", ()))
        labelled = self.accelerator.reduce(torch.tensor(float(labelled), device=device), "sum")
        # DDP and FSDP average over ranks
        self.depth_scale = self.accelerator.num_processes / labelled.clamp(min=1)
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        worker, *position = inputs.pop("position")
        self.positions[worker] = position
        self.batches_done += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "position"}
        depth_labels = inputs.pop("depth_labels", [])
        if not self.args.depth_weight:
            depth_labels = []
        in_training = self.model.training
        if in_training:
            depth_scale = self.args.depth_weight * self.depth_scale
        else:
            depth_scale = self.args.depth_weight / max(sum(bool((label > 0).any()) for label in depth_labels), 1)
        outputs = None

        def call(**kwargs):  # TRL calls the model once
            nonlocal outputs
            outputs = model(**kwargs, depth_targets=SimpleNamespace(labels=depth_labels, scale=depth_scale))
            return outputs

        if self.trains_text:
            loss = super().compute_loss(call, inputs, num_items_in_batch=num_items_in_batch)
        else:
            inputs.pop("labels")
            call(**inputs, use_cache=False)
            loss = 0
        loss = loss + outputs.depth_loss
        self.record(outputs, inputs.get("image_grid_thw"), "train" if in_training else "eval")
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def record(self, outputs, image_grid_thw, mode: str):
        """Add to the log: the text loss a token; depth loss, delta1 and AbsRel a labelled image; images."""
        scores = outputs.depth_scores
        counts = [len(scores), 0 if image_grid_thw is None else len(image_grid_thw)]
        sums = [*scores.sum(0), *scores.new_tensor(counts)]
        if outputs.log_probs is not None:
            sums += [-outputs.log_probs.sum(), outputs.label_mask.sum()]
        sums = self.accelerator.reduce(torch.stack([value.float() for value in sums]), "sum").tolist()
        totals, (labelled, images), text = sums[:3], sums[3:5], sums[5:]
        metrics = self._metrics[mode]
        if labelled:
            for name, total in zip(("depth_loss", "delta1", "abs_rel"), totals, strict=True):
                metrics[name].extend([total / labelled] * round(labelled))  # TRL's log averages over entries
        if text and text[1]:
            metrics["lm_loss"].append(text[0] / text[1])
        if mode == "train":
            self.images_seen += images

    def log(self, logs, start_time=None):
        if self.model.training:
            now = time.perf_counter()
            logs["images_per_second"] = round(self.images_seen / (now - self.last_log), 2)
            logs["unreadable_rows"] = sum(bad for _, bad in self.positions.values())
            self.images_seen, self.last_log = 0, now
        super().log(logs, start_time)

    # Resuming

    def position_file(self, checkpoint) -> Path:
        return Path(checkpoint) / f"data_position_{self.args.process_index}.json"

    def sizes(self) -> dict[str, int]:
        """What the position in the data depends on, beside the data."""
        return {
            "world_size": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
            "per_device_train_batch_size": self._train_batch_size,
            "seed": self.args.seed,
            "shuffle_buffer": self.train_dataset.arguments.shuffle_buffer,
        }

    def _save(self, output_dir=None, state_dict=None):
        restore_class_name(self.model)
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        file = self.position_file(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        file.unlink(missing_ok=True)  # an older run's: until the new one is there, the checkpoint is not complete
        super()._save_checkpoint(model, trial)
        position = {
            "batches_done": self.batches_done,
            "positions": self.positions,
            "num_tokens": self._total_train_tokens,
        }
        file.with_suffix(".tmp").write_text(json.dumps(self.sizes() | position))
        file.with_suffix(".tmp").replace(file)  # written last, and whole: it says that the checkpoint is complete

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            position = json.loads(self.position_file(resume_from_checkpoint).read_text())
            for name, value in self.sizes().items():
                if position.get(name) != value:
                    raise ValueError(
                        f"{resume_from_checkpoint} was made with {name} {position.get(name)}, now it is {value}; the "
                        "data goes on at the same sample only with the same number"
                    )
            self.batches_done, self._total_train_tokens = position["batches_done"], position["num_tokens"]
            self.positions = {int(worker): tuple(value) for worker, value in position["positions"].items()}
            self.train_dataset.resume(self.batches_done, dict(self.positions))
            state = json.loads((Path(resume_from_checkpoint) / "trainer_state.json").read_text())
            if state["global_step"] >= self.args.max_steps:  # Trainer would look at the clock one step later
                self._load_from_checkpoint(str(resume_from_checkpoint))
                return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def restore_class_name(model):
    """FSDP2 gives a model a class of torch's own, whose name and file a save would state as the model's code."""
    if isinstance(model, FSDPModule):
        type(model).__name__ = DepthVLMForConditionalGeneration.__name__
        type(model).__module__ = DepthVLMForConditionalGeneration.__module__


class EpochCallback(TrainerCallback):
    """A stream's epoch is the whole run; Trainer would count it from the resumed step on."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps
