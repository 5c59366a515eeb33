"""How a run trains: TRL's arguments, some with other defaults, and this project's; and which weights it trains."""

from dataclasses import dataclass, field

from trl import SFTConfig

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration

from .loss import DEPTH_LOSSES

PARTS = {
    "depth_head": "depth_head.",
    "language_model": "model.language_model.",
    "lm_head": "lm_head.",
    "vision": "model.visual.",
}
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
