"""TRL's trainer with a depth loss, exact averages whatever each rank holds, and data that resumes to the sample."""

import dataclasses
import functools
import itertools
import json
import shutil
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration

from .checkpoints import (
    EXAMPLE_DEPTH,
    FROZEN,
    TRAINED,
    load_shards,
    model_card,
    restore_class_name,
    save_shards,
    save_without_weights,
)
from .loss import DEPTH_LOSSES, add_depth_loss
from .stream import TrainingStream

logger = logging.get_logger(__name__)

PARTS = {
    "depth_head": "depth_head.",
    "language_model": "model.language_model.",
    "lm_head": "lm_head.",
    "vision": "model.visual.",
}
# of the trainer's running sums, one row per data set; shares are of the update's answer tokens or labelled images
SUMS = ("lm_loss", "lm_share", "depth_loss", "delta1", "abs_rel", "depth_share")
ROWS_BEFORE_STOP = 100  # read on all ranks before the share of refused rows is judged
REFUSED = {  # arguments of TRL's that have no effect here, or another one -> why
    "label_smoothing_factor": "it needs the logits of the whole vocabulary, which are never computed",
    "assistant_only_loss": "the loss is always over the assistant's answers and nothing else",
    "completion_only_loss": "the loss is always over the assistant's answers and nothing else",
    "auto_find_batch_size": "it would change the global batch; set per_device_train_batch_size, see --dry_run",
    "packing": "rows with images cannot be packed",
    "padding_free": "rows with images cannot be flattened",
}


@dataclass
class DepthSFTConfig(SFTConfig):
    """TRL's arguments, some with other defaults, and this project's."""

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["depth_losses"]

    trains: list[str] = field(
        default_factory=lambda: ["depth_head"],
        metadata={"help": f"parts of the model to train, of {', '.join(PARTS)}; the rest is frozen"},
    )
    depth_weight: float = field(
        default=1.0, metadata={"help": "weight beta of the depth loss in L_LM + beta * L_depth; 0 turns it off"}
    )
    depth_losses: dict | str | None = field(
        default=None,
        metadata={
            "help": f"terms of the depth loss with their weights, of {', '.join(DEPTH_LOSSES)}; default: {{silog: 1}}"
        },
    )
    depth_trains_head_alone: bool = field(
        default=False,
        metadata={"help": "end the depth loss's gradient at the depth head's inputs, whatever else is trained"},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "samples per optimizer step on all processes; sets gradient_accumulation_steps, or is refused "
            "where processes times per_device_train_batch_size do not divide it"
        },
    )
    dry_run: int | None = field(
        default=None,
        metadata={
            "help": "report data, batches and memory for this number of processes (default: as launched), then stop",
            "nargs": "?",
            "const": 0,
        },
    )
    device_memory: float | None = field(
        default=None, metadata={"help": "memory of a device in GiB, for --dry_run; default: this machine's GPU, or 80"}
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
        default=None, metadata={"help": "maximum tokens per conversation; longer ones are refused and counted"}
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "passes over the rows of all data sets together; sets max_steps"}
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
        if self.dry_run is not None:
            self.use_cpu = True
        if self.resume_from_checkpoint in ("true", "True", "false", "False"):
            self.resume_from_checkpoint = "last" if self.resume_from_checkpoint.lower() == "true" else None
        super().__post_init__()
        if unknown := set(self.trains) - set(PARTS):
            raise ValueError(f"trains names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
        if not self.trains:
            raise ValueError(f"trains is empty; name at least one of {', '.join(PARTS)}")
        for name in ("remove_unused_columns", "ignore_data_skip", "prediction_loss_only"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}; it must stay as it is, see --help: leave it out")
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but {reason}; leave it out")
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type is {self.loss_type!r}, but lm_loss is the negative log-likelihood; leave it out"
            )
        if self.trains == ["depth_head"] and not self.depth_weight > 0:
            raise ValueError(f"depth_weight is {self.depth_weight}, so a head trained alone has no loss; raise it")
        self.depth_losses = self.depth_losses or {"silog": 1.0}
        if unknown := set(self.depth_losses) - set(DEPTH_LOSSES):
            raise ValueError(
                f"depth_losses names {', '.join(sorted(unknown))}; the terms are {', '.join(DEPTH_LOSSES)}"
            )
        if self.max_steps > 0 and self.num_train_epochs > 0:
            raise ValueError(
                f"max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}, and each sets the length "
                "of the run; leave one of them out"
            )
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self.accumulation()

    @property
    def processes(self) -> int:
        """Number of processes that train: as launched, or as --dry_run asks for."""
        return self.dry_run or self.world_size

    @property
    def samples_per_step(self) -> int:
        return self.processes * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def accumulation(self) -> int:
        """Micro-batches per optimizer step that make up `global_batch_size`; ValueError where no number does."""
        at_once = self.processes * self.per_device_train_batch_size
        steps, rest = divmod(self.global_batch_size, at_once)
        product = (
            f"{self.processes} processes x per_device_train_batch_size {self.per_device_train_batch_size} = {at_once}"
        )
        if rest or not steps:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, which is not a multiple of {product}; change the "
                "number of processes or per_device_train_batch_size, or set global_batch_size to "
                f"{max(steps, 1) * at_once} or {(steps + 1) * at_once}"
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but {product} and "
                f"global_batch_size {self.global_batch_size} make it {steps}; leave one of them out"
            )
        return steps


def freeze(model: DepthVLMForConditionalGeneration, trains: list[str]) -> None:
    """Make the named `PARTS` trainable and freeze every other parameter."""
    if "lm_head" in trains and model.config.tie_word_embeddings and "language_model" not in trains:
        raise ValueError(
            "trains has lm_head without language_model, but this model's LM head is the LLM's embedding; name both"
        )
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(tuple(PARTS[part] for part in trains))
        parameter.requires_grad = is_trained and parameter.is_floating_point()  # of 4-bit weights, adapters are trained


class DepthSFTTrainer(SFTTrainer):
    """
    TRL's trainer with a depth loss, exact averages whatever each rank holds, and data that resumes to the sample.

    Logged losses are sums over whole updates, micro-batches and ranks included, averaged over the updates since the
    last log: `loss = lm_loss + depth_weight * depth_loss`. `depth_loss/NAME` and the like are means over one data set's
    images or answer tokens, and `depth_share/NAME` and `lm_share/NAME` its share of them: summed over the data sets,
    share times loss is the loss of all.
    """

    def __init__(
        self,
        model: DepthVLMForConditionalGeneration,
        *args,
        train_dataset: TrainingStream,
        rows: dict[str, int] | None = None,
        **kwargs,
    ):
        """rows: number of rows of each data set of the mix, by its label, for the log's `epochs/NAME`."""
        if any(parameter.requires_grad for parameter in model.depth_head.parameters()):
            model.depth_head.float()  # whatever the base is in
        head = {name: value.clone() for name, value in model.depth_head.state_dict().items()}
        # TRL takes none but the classes of `datasets`, of which it looks at the first sample
        sample = datasets.IterableDataset.from_generator(lambda: iter([{"images": []}]))
        super().__init__(model, *args, train_dataset=sample, **kwargs)
        self.train_dataset, self.rows = train_dataset, rows or {}
        core = self.accelerator.unwrap_model(self.model)
        self.has_adapters = isinstance(core, PeftModel)
        core = core.get_base_model() if self.has_adapters else core
        if getattr(core, "is_loaded_in_4bit", False):  # TRL has rounded all that is trained to bfloat16
            for parameter in core.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            if "depth_head" in self.args.trains:
                core.depth_head.modules_to_save["default"].load_state_dict(head)
        low = {parameter.dtype for parameter in core.parameters() if parameter.requires_grad} - {torch.float32}
        if low and not (self.is_fsdp_enabled and self.args.bf16):  # there, accelerate makes float32 masters
            logger.warning(
                f"weights are trained in {', '.join(map(str, low))}, which rounds small updates away; leave dtype out "
                "for float32 masters (with bf16: true the computation stays in bfloat16), or use FSDP2 or use_peft"
            )
        trained = [name for name, parameter in core.named_parameters() if parameter.requires_grad]
        self.trains_text = any("depth_head." not in name for name in trained)
        add_depth_loss(core, self.trains_text, self.args.depth_losses, self.args.depth_trains_head_alone)
        # Both losses are divided by the counts of the whole update, over ranks and accumulation, so by nothing else
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # accelerate's would add gradients over ranks, and return losses, in bfloat16
            in_float32 = {"reduce_dtype": torch.float32, "output_dtype": torch.float32}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **in_float32)
        # of the last batch of each data loading process: they take turns
        self.positions, self.batches_done = deque(maxlen=max(self.args.dataloader_num_workers, 1)), 0
        arguments = train_dataset.arguments
        self.set_names = {
            mode: [source.label for source in mix]
            for mode, mix in (("train", arguments.datasets), ("eval", arguments.eval_datasets))
        }
        self.sums = {mode: self.empty_sums(mode) for mode in self.set_names}
        self.refused_rows = {}  # data set -> rows read and refused on all ranks
        self.frozen_saved = False  # of a run in shards, which writes them once
        if self.in_shards and self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy is {self.args.hub_strategy.value}, but checkpoints in shards (fsdp_state_dict_type "
                "SHARDED_STATE_DICT) are no repository; set hub_strategy to end, or FULL_STATE_DICT"
            )
        self.start_counting()

    def empty_sums(self, mode: str) -> torch.Tensor:
        return torch.zeros(len(self.set_names[mode]), len(SUMS), dtype=torch.float64, device=self.args.device)

    def start_counting(self) -> None:
        self.updates, self.clock = 0, time.perf_counter()
        self.counts = {"images": 0, "tokens": 0, "places": 0, "data_wait": 0.0}  # of this rank, since the last log

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

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Every rank the same number of batches, as FSDP2 needs; rows that fill them up count nowhere."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, ranks = self.args.process_index, self.args.world_size
        return DataLoader(
            FilledUp(dataset),
            batch_size=self.args.eval_batch_size,
            sampler=range(rank, ranks * -(-len(dataset) // ranks), ranks),
            collate_fn=functools.partial(collate_filled_up, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        start = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.counts["data_wait"] += time.perf_counter() - start
        self.updates += 1
        self.batches_done += len(batches)
        for batch in batches:
            self.positions.append(batch.pop("position"))
            self.counts["images"] += len(batch["image_sets"])
            self.counts["tokens"] += int(batch["attention_mask"].sum())
            self.counts["places"] += batch["attention_mask"].numel()
        labelled = sum(int((label > 0).any()) for batch in batches for label in batch.get("depth_labels", ()))
        rows = self.train_dataset.bad_rows(list(self.positions))
        rows = [number for name in self.set_names["train"] for number in rows.get(name, (0, 0))]
        totals = torch.tensor([labelled, *rows], dtype=torch.float64, device=device)
        labelled, *rows = self.accelerator.reduce(totals, "sum").tolist()
        self.labelled = max(labelled, 1)
        self.judge_refused_rows(zip(rows[::2], rows[1::2], strict=True))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def judge_refused_rows(self, rows) -> None:
        """rows: (read, refused) of each data set, on all ranks. Raises ValueError past `max_bad_share`."""
        self.refused_rows = dict(zip(self.set_names["train"], rows, strict=True))
        read, refused = (sum(column) for column in zip(*self.refused_rows.values(), strict=True))
        limit = self.train_dataset.arguments.max_bad_share
        if read >= ROWS_BEFORE_STOP and refused > limit * read:
            each = ", ".join(f"{name} {bad:.0f} of {number:.0f}" for name, (number, bad) in self.refused_rows.items())
            raise ValueError(
                f"{refused:.0f} of {read:.0f} rows cannot be used ({each}), more than max_bad_share {limit}; repair "
                f"the data, listed in {self.train_dataset.log}, or raise max_bad_share"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = dict(inputs)
        row_sets, image_sets = inputs.pop("row_sets"), inputs.pop("image_sets")
        depth_labels = inputs.pop("depth_labels", [])
        if "pixel_values" in inputs and inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.processing_class.normalize_patches(inputs["pixel_values"])
        if not self.args.depth_weight:
            depth_labels = []
        labelled = [bool((label > 0).any()) for label in depth_labels]
        answers = inputs["labels"][:, 1:] != -100
        if mode == "train":
            images, tokens = self.labelled, num_items_in_batch.clamp(min=1)
            scale = self.args.depth_weight * self.accelerator.num_processes / images  # DDP and FSDP average over ranks
        else:
            images = tokens = 1  # divided at the end, by the sums of the shares
            scale = self.args.depth_weight / max(sum(labelled), 1)
        outputs = None

        def call(**kwargs):  # TRL calls the model once
            nonlocal outputs
            outputs = model(**kwargs, depth_targets=SimpleNamespace(labels=depth_labels, scale=scale))
            return outputs

        if self.trains_text:
            loss = super().compute_loss(call, inputs, num_items_in_batch=num_items_in_batch)
        else:
            inputs.pop("labels")
            call(**inputs, use_cache=False)
            loss = 0
        loss = loss + outputs.depth_loss
        if outputs.log_probs is not None:
            rows = torch.tensor(row_sets, device=answers.device)[answers.nonzero()[:, 0]]
            log_probs = outputs.log_probs.flatten()
            self.record(mode, "lm_loss", rows, torch.stack([-log_probs, torch.ones_like(log_probs)], 1), tokens)
        if len(outputs.depth_scores):
            sets = [name for name, has_label in zip(image_sets, labelled, strict=True) if has_label]
            scores = torch.nn.functional.pad(outputs.depth_scores, (0, 1), value=1)
            self.record(mode, "depth_loss", torch.tensor(sets, device=scores.device), scores, images)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def record(self, mode: str, first: str, sets: torch.Tensor, values: torch.Tensor, count) -> None:
        """Add values / count to the sums, from the column `first` on. sets: data set of each row of values."""
        column = SUMS.index(first)
        self.sums[mode][:, column : column + values.shape[1]].index_add_(0, sets, values.double() / count)

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if mode == "eval" or self.updates:
            prefix = "eval_" if mode == "eval" else ""
            logs |= {prefix + name: value for name, value in self.losses(mode).items()}
        if mode == "train" and self.updates:
            logs |= self.rates()
            self.start_counting()
        super().log(logs, start_time)

    def losses(self, mode: str) -> dict[str, float]:
        """The running sums of all ranks as what is logged; they begin anew."""
        sums = self.accelerator.reduce(self.sums[mode], "sum")
        self.sums[mode] = self.empty_sums(mode)
        total, metrics = dict(zip(SUMS, sums.sum(0).tolist(), strict=True)), {"loss": 0.0}
        kinds = (
            ("lm_share", ["lm_loss"], 1.0),
            ("depth_share", ["depth_loss", "delta1", "abs_rel"], self.args.depth_weight),
        )
        for share, names, weight in kinds:
            if not total[share]:
                continue
            # in training a share is of updates; in evaluation of tokens or images
            whole = self.updates if mode == "train" else total[share]
            metrics[names[0]] = total[names[0]] / whole
            metrics["loss"] += weight * metrics[names[0]]
            metrics |= {name: total[name] / total[share] for name in names[1:]}
            if len(sums) == 1:
                continue
            for label, row in zip(self.set_names[mode], sums.tolist(), strict=True):
                values = dict(zip(SUMS, row, strict=True))
                if values[share]:
                    metrics |= {f"{name}/{label}": values[name] / values[share] for name in names}
                    metrics[f"{share}/{label}"] = values[share] / whole
        return metrics

    def rates(self) -> dict[str, float]:
        """Throughput of all ranks since the last log, and what has been read of the data."""
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64, device=self.args.device)
        images, tokens, places, data_wait = self.accelerator.reduce(counts, "sum").tolist()
        seconds = time.perf_counter() - self.clock
        refused = {name: refused for name, (_, refused) in self.refused_rows.items()}
        return {
            "images_per_second": round(images / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1 - tokens / places, 4),
            "data_wait_share": round(data_wait / seconds / self.accelerator.num_processes, 4),
            "unreadable_rows": int(sum(refused.values())),
            **{f"unreadable_rows/{name}": int(number) for name, number in refused.items() if number},
            **{
                f"epochs/{name}": round(read / self.rows[name], 4)
                for name, (read, _) in self.refused_rows.items()
                if self.rows.get(name)
            },
        }

    def evaluate(self, *args, **kwargs):
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.clock += time.perf_counter() - start  # no time of training
        return metrics

    # Resuming

    def position_file(self, checkpoint) -> Path:
        return Path(checkpoint) / f"data_position_{self.args.process_index}.json"

    def sizes(self) -> dict:
        """What must stay the same for the data to go on from a position."""
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "seed": self.args.seed,
            "shuffle_buffer": self.train_dataset.arguments.shuffle_buffer,
        }

    def layout(self) -> dict[str, int]:
        return {"world_size": self.args.world_size, "dataloader_num_workers": self.args.dataloader_num_workers}

    # Saving

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            self.save_card(self.args.output_dir)

    def save_card(self, folder: str | Path) -> None:
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        model_card(self, name, (Path(folder) / EXAMPLE_DEPTH).exists()).save(Path(folder) / "README.md")

    @property
    def in_shards(self) -> bool:
        """Whether FSDP2 has each rank save its own part."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints hold what `save_shards` writes; adapters are saved by accelerate."""
        return self.in_shards and not isinstance(self.model, PeftModel)

    def save_model(self, output_dir=None, _internal_call=False):
        if self.in_shards and self.args.should_save:  # Trainer would write nothing
            save_without_weights(self.model, self.processing_class, output_dir or self.args.output_dir)
            self.save_card(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        restore_class_name(self.model)
        if state_dict is not None:  # gathered from all ranks, tied weights once under each of their names
            tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            if isinstance(self.model, PeftModel):
                save_without_weights(self.model, self.processing_class, output_dir)
            self.save_card(output_dir or self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            save_without_weights(self.model, self.processing_class, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.saves_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.write_shards(Path(output_dir) / TRAINED, trained=True)
        frozen = Path(self.args.output_dir) / FROZEN
        if not self.frozen_saved:
            self.write_shards(frozen, trained=False)
            self.frozen_saved = True
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def write_shards(self, folder: Path, trained: bool) -> None:
        """`save_shards` into a folder that has its name only when all ranks are done."""
        unfinished = folder.with_suffix(".tmp")
        if self.args.should_save:
            for old in (folder, unfinished):
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        save_shards(self.model, unfinished, trained)
        if self.args.should_save:
            unfinished.rename(folder)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.saves_shards:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_shards(self.model if model is None else model, Path(resume_from_checkpoint) / TRAINED)

    def _save_checkpoint(self, model, trial):
        start = time.perf_counter()
        file = self.position_file(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        file.unlink(missing_ok=True)  # an older run's: until the new one is there, the checkpoint is not complete
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            position = {
                "batches_done": self.batches_done,
                "positions": list(self.positions),
                "num_tokens": self._total_train_tokens,
            }
            file.with_suffix(".tmp").write_text(json.dumps(self.layout() | self.sizes() | position))
            file.with_suffix(".tmp").replace(file)  # written last, and whole: it says that the checkpoint is complete
        self.clock += time.perf_counter() - start

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs):
        if resume_from_checkpoint:
            self.resume_data(resume_from_checkpoint)
            state = json.loads((Path(resume_from_checkpoint) / "trainer_state.json").read_text())
            if state["global_step"] >= self.args.max_steps:  # Trainer would look at the clock one step later
                self._load_from_checkpoint(str(resume_from_checkpoint))
                return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def resume_data(self, checkpoint: str | Path) -> None:
        """Take up the data where all ranks of the run that wrote the checkpoint were; they may have been others."""
        files = sorted(Path(checkpoint).glob("data_position_*.json"))
        if not files:
            raise ValueError(
                f"{checkpoint} holds no position in the data, so it is no checkpoint to resume from (save_only_model, "
                "or cut short); start a new run with model_name_or_path set to it"
            )
        ranks = {int(file.stem.rpartition("_")[2]): json.loads(file.read_text()) for file in files}
        position = ranks[0]
        for name, value in self.sizes().items():
            if position.get(name) != value:
                raise ValueError(
                    f"{checkpoint} was made with {name} {position.get(name)}, now it is {value}; the data can go on "
                    "only with the same"
                )
        self.frozen_saved = (Path(self.args.output_dir) / FROZEN).is_dir()
        self.batches_done, self._total_train_tokens = position["batches_done"], position["num_tokens"]
        self.train_dataset.resume(
            self.batches_done, [worker for rank in sorted(ranks) for worker in ranks[rank]["positions"]]
        )
        if all(position[name] == value for name, value in self.layout().items()):
            self.positions.extend(ranks[self.args.process_index]["positions"])


class FilledUp(Dataset):
    """A data set whose indices beyond its length are rows of it that are marked not to count."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[dict, bool]:
        return self.dataset[index % len(self.dataset)], index < len(self.dataset)


def collate_filled_up(collator, rows: list[tuple[dict, bool]]) -> dict:
    """A batch without the answers and depth labels of the rows that do not count."""
    samples, counts = zip(*rows, strict=True)
    batch = collator(list(samples))
    batch["labels"][~torch.tensor(counts)] = -100
    if "depth_labels" in batch:
        of_images = [counted for sample, counted in rows for _ in sample["depth_labels"]]
        batch["depth_labels"] = [
            label if counted else torch.zeros_like(label)
            for label, counted in zip(batch["depth_labels"], of_images, strict=True)
        ]
    return batch


class EpochCallback(TrainerCallback):
    """Counts epochs by rows; to Trainer, a stream's epoch is the whole run."""

    def __init__(self, rows: int):
        """rows: of all data sets together."""
        self.rows = rows

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step * args.samples_per_step / self.rows
