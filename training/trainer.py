"""TRL's trainer with a depth loss, exact averages whatever each rank holds, and data that resumes to the sample."""

import dataclasses
import functools
import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging
from trl import SFTTrainer

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.predictions.files import open_whole

from .arguments import DepthSFTConfig
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
from .held_out import FilledUp, collate_filled_up
from .loss import DepthTrainingOutput, add_depth_loss
from .stream import TrainingStream

logger = logging.get_logger(__name__)

# of the trainer's running sums, one row per data set; shares are of the update's answer tokens or labelled images
SUMS = ("lm_loss", "lm_share", "depth_loss", "delta1", "abs_rel", "depth_share")
ROWS_BEFORE_STOP = 100  # read on all ranks before the share of refused rows is judged


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
    ) -> None:
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict], num_batches: int, device: torch.device
    ) -> tuple[list[dict], torch.Tensor | None]:
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

    def judge_refused_rows(self, rows: Iterable[tuple[float, float]]) -> None:
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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, DepthTrainingOutput]:
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
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

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.clock += time.perf_counter() - start  # no time of training
        return metrics

    # Resuming

    def position_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data_position_{self.args.process_index}.json"

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

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
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
            with open_whole(file, "w") as opened:  # written last: it says that the checkpoint is complete
                json.dump(self.layout() | self.sizes() | position, opened)
        self.clock += time.perf_counter() - start

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs) -> TrainOutput | None:
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


class EpochCallback(TrainerCallback):
    """Counts epochs by rows; to Trainer, a stream's epoch is the whole run."""

    def __init__(self, rows: int) -> None:
        """rows: of all data sets together."""
        self.rows = rows

    def on_step_end(self, args: DepthSFTConfig, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        state.epoch = state.global_step * args.samples_per_step / self.rows
