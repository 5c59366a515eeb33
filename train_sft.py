"""Trains DepthVLM with TRL: the paper's two stages, or any other, are sets of flags in a YAML file.

    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage1.yaml
    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage2.yaml
    python train_sft.py --config configs/tiny_stage1.yaml            # on a CPU

Stage 1 trains the depth head alone, with SILog; stage 2 the language model too, with cross-entropy on the answers +
`depth_weight` * SILog, both from one pass. `--help` lists every flag; flags win over the file.
"""

import dataclasses
import functools
import itertools
import json
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config
from trl.trainer.utils import FusedCausalLMOutput

import local_package  # noqa: F401
from data_sft import Collator, DataArguments, EvalSamples, TrainingStream, conversation, decode
from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration, DepthVLMSeen, silog_loss
from depthvlm.processing_depthvlm import DEPTH_RESPONSE, DepthVLMProcessor

logger = logging.get_logger(__name__)

PARTS = {
    "depth_head": "depth_head.",
    "language_model": "model.language_model.",
    "lm_head": "lm_head.",
    "vision": "model.visual.",
}
DELTA1 = 1.25
RETENTION_QUESTIONS = ("Describe this image.", "How many people are there?", "What is the largest object made of?")
NO_INSTRUCTIONS = (
    "the language model is trained on depth rows alone. People who did so report that the model then answers every "
    "question with the depth prompt's response: add a data set of kind instruction or qa to `datasets`, and watch "
    "`canned_depth_replies` with retention_steps"
)


@dataclass
class DepthSFTConfig(SFTConfig):
    """TRL's arguments with other defaults, and three of this project."""

    trains: list[str] = field(
        default_factory=lambda: ["depth_head"],
        metadata={"help": f"the parts that are trained, of {', '.join(PARTS)}; of the head alone, text plays no role"},
    )
    depth_weight: float = field(default=1.0, metadata={"help": "beta of L_LM + beta * L_depth; 0 leaves depth out"})
    eval_questions: int = field(default=0, metadata={"help": "held-out rows whose questions are answered at the end"})
    retention_steps: int = field(default=0, metadata={"help": "steps between looks of the retention watch; 0: none"})
    save_dtype: str | None = field(default=None, metadata={"help": "of the final save, e.g. bfloat16; as trained"})

    max_length: int | None = field(default=None, metadata={"help": "tokens; conversations are never cut"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})
    ignore_data_skip: bool = field(default=True, metadata={"help": "must stay true: the data resumes by itself"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "must stay true: logits are never kept"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "where metrics are sent"})
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that read and decode, a rank"})

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


@dataclass
class DepthTrainingOutput(FusedCausalLMOutput):
    """
    TRL's fused output and, of the images that have a label:

    depth_loss (`torch.Tensor` of shape `()`): the sum of their SILog losses, times the targets' scale.
    depth_scores (`torch.Tensor` of shape `(num_labelled, 3)`): SILog, delta1 and AbsRel of each, without gradient.
    """

    depth_loss: torch.Tensor | None = None
    depth_scores: torch.Tensor | None = None


def add_depth_loss(model: DepthVLMForConditionalGeneration, trains_text: bool):
    """
    Extend TRL's fused forward, which has to be there already, by the depth loss from the same backbone pass.

    `model(..., depth_targets=SimpleNamespace(labels=[...], scale=1.0))` then returns a `DepthTrainingOutput`; in plain
    arguments FSDP2 would round labels and scale to the parameters' dtype. It has to happen inside
    `model.forward`, so that DDP and FSDP, which wrap the model, see the head's parameters used. Without `trains_text`
    the backbone runs without gradients and the LM head not at all.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, depth_targets=None, **kwargs):
        if depth_targets is None:
            return fused_forward(*args, **kwargs)
        depth_labels, depth_scale = depth_targets.labels, depth_targets.scale
        seen = DepthVLMSeen()  # made here: DDP and FSDP would hand on a copy
        if isinstance(self.depth_head, FSDPModule):
            raise ValueError(
                "FSDP2 has sharded the depth head by itself, but ranks call it once a labelled image, so they would "
                "wait for each other; set fsdp_transformer_layer_cls_to_wrap without it, as configs/fsdp2.yaml does"
            )
        zero = connected_zero(self, has_images=kwargs.get("pixel_values") is not None)
        if self.config.depth_feature_source == "llm":
            kwargs["output_hidden_states"] = True
        text = {}
        if trains_text:
            text = fused_forward(*args, seen=seen, **kwargs)
        else:
            with torch.no_grad():
                self.base_model(*args, seen=seen, **kwargs)
        has_label = [bool((label > 0).any()) for label in depth_labels]
        images = self.depth_features(seen) if any(has_label) else []
        pairs = zip(images, depth_labels, strict=bool(images))
        labelled = [(*image, label) for (image, label), has in zip(pairs, has_label, strict=False) if has]
        trained = [parameter for parameter in self.depth_head.parameters() if parameter.requires_grad]
        if not labelled:
            zero = zero + sum(0 * parameter.sum() for parameter in trained)
            return DepthTrainingOutput(**text, depth_loss=zero, depth_scores=torch.zeros(0, 3, device=self.device))
        flat = [level for features, _, _ in labelled for level in features]
        sizes = [(len(features), grid, label) for features, grid, label in labelled]
        if torch.is_grad_enabled():
            loss, scores = ImageByImage.apply(self.depth_head, sizes, depth_scale, len(trained), *trained, *flat)
        else:
            predictions = [(self.depth_head(features, grid)[0], label) for features, grid, label in labelled]
            scores = torch.stack([torch.stack([silog_loss(*own), *depth_accuracy(*own)]) for own in predictions])
            loss = depth_scale * scores[:, 0].sum()
        return DepthTrainingOutput(**text, depth_loss=zero + loss, depth_scores=scores)

    model.forward = types.MethodType(forward, model)


class ImageByImage(torch.autograd.Function):
    """
    The sum of the images' depth losses, times a scale. Its gradients are computed on the way, so that the head's
    activations, two gigabytes an image at the paper's size, are held for one image at a time and not for the batch.
    """

    @staticmethod
    def forward(ctx, head, images, scale, num_parameters, *tensors):
        """
        images: (number of features, grid, label) of each. scale: of the loss. tensors: `num_parameters` parameters,
        then all features.

        Returns the loss and, an image, SILog, delta1 and AbsRel, `(num_images, 3)`.
        """
        parameters, features = tensors[:num_parameters], iter(tensors[num_parameters:])
        total, scores, sums, gradients = 0, [], [None] * num_parameters, []
        for number, grid, label in images:
            own = [next(features) for _ in range(number)]
            own = [level.detach().requires_grad_(level.requires_grad) for level in own]
            inputs = [*parameters, *own]
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            with torch.enable_grad():
                prediction = head(own, grid)[0]
                loss = silog_loss(prediction, label)
                found = iter(torch.autograd.grad(loss * scale, wanted, allow_unused=True))
            found = [next(found) if tensor.requires_grad else None for tensor in inputs]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found, strict=False)]
            gradients += found[num_parameters:]
            total = total + loss.detach() * scale
            scores.append(torch.stack([loss, *depth_accuracy(prediction, label)]).detach())
        ctx.gradients = [*sums, *gradients]
        scores = torch.stack(scores)
        ctx.mark_non_differentiable(scores)
        return total, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        return (None,) * 4 + tuple(gradient if gradient is None else gradient * scale for gradient in ctx.gradients)


def connected_zero(model: DepthVLMForConditionalGeneration, has_images: bool) -> torch.Tensor:
    """
    0, connected to what this micro-batch may leave out and another rank's may use: DDP and FSDP wait for every rank.

    Without an image the vision tower sees one of a single token. An LM head that FSDP2 has sharded by itself is called
    before TRL reads its weight: from then on, and only so, its gradient is averaged over ranks.
    """
    zero = torch.zeros((), device=model.device)
    head = model.lm_head
    if isinstance(head.weight, DTensor) and head.weight.requires_grad and not model.config.tie_word_embeddings:
        zero = zero + 0 * head(torch.zeros(1, head.in_features, device=model.device, dtype=model.dtype)).sum()
    if not has_images:
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2  # of a patch
        black = torch.zeros(side * side, values, device=model.device, dtype=model.dtype)
        grid = torch.tensor([[1, side, side]], device=model.device)
        features = model.base_model.get_image_features(black, grid)
        zero = zero + sum(0 * level[0].float().sum() for level in features.visual_maps)
    return zero


def depth_accuracy(prediction: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """delta1 and AbsRel of one image over its labelled pixels."""
    if prediction.shape != label.shape:
        prediction = torch.nn.functional.interpolate(
            prediction[None, None], size=label.shape, mode="bilinear", align_corners=True
        )[0, 0]
    prediction, label = prediction[label > 0], label[label > 0]
    ratio = torch.maximum(prediction / label, label / prediction)
    return (ratio < DELTA1).float().mean(), ((prediction - label).abs() / label).mean()


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


@torch.no_grad()  # not inference mode: what FSDP2 allocates now, training uses later
def generate_answers(
    model, processor, rows: list[dict], max_pixels=None, max_new_tokens=24, batch_size=16
) -> list[str]:
    """Greedy answers to `{"image", "focal_length", "question"}`."""
    training, answers = model.training, []
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(conversation([(row["question"], "")])[:-1], add_generation_prompt=True)
            for row in batch
        ]
        inputs = processor(
            images=[row["image"] for row in batch],
            text=prompts,
            focal_lengths=[row["focal_length"] for row in batch],
            max_pixels=max_pixels,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return [answer.strip() for answer in answers]


def is_right(kind: str, answer: str, truth: str) -> bool:
    """A distance within 25 %; anything else to the letter."""
    if kind != "distance":
        return answer == truth
    try:
        return abs(float(answer) - float(truth)) <= 0.25 * float(truth)
    except ValueError:
        return False


def score_questions(model, processor, data_args: DataArguments, limit: int) -> dict[str, float]:
    """Share of right answers to each kind of question, over the first `limit` rows of each held-out data set."""
    asked = []
    for source in data_args.eval_datasets:
        for row in source.open().take(limit):
            questions = row.get("qa") or {"kind": [], "question": [], "answer": []}
            for kind, question, answer in zip(*(questions[k] for k in ("kind", "question", "answer")), strict=True):
                sample = {"image": decode(row["image"]), "focal_length": row["fx"], "question": question}
                asked.append((kind, answer, sample))
    answers = generate_answers(model, processor, [sample for *_, sample in asked], data_args.max_pixels)
    right = {}
    for (kind, truth, _), answer in zip(asked, answers, strict=True):
        right.setdefault(kind, []).append(is_right(kind, answer, truth))
    right["all"] = [value for values in right.values() for value in values]
    return {f"questions_{kind}": sum(values) / len(values) for kind, values in right.items() if values}


class RetentionWatch(TrainerCallback):
    """
    Asks fixed questions about the first held-out images, before training and every so many steps, and logs

    - `canned_depth_replies`: the share of answers that are the depth prompt's;
    - `base_agreement`: the share of answers that are what they were before training.
    """

    def __init__(self, trainer: DepthSFTTrainer, data_args: DataArguments, every: int, limit: int = 8):
        self.trainer, self.every, self.max_pixels = trainer, every, data_args.max_pixels
        self.rows = []
        for source in data_args.eval_datasets:
            for row, question in zip(source.open().take(limit), itertools.cycle(RETENTION_QUESTIONS), strict=False):
                asked = (row.get("qa") or {}).get("question") or [question]
                images = row["images"] if source.kind == "instruction" else [row["image"]]
                if images:
                    self.rows.append({"image": decode(images[0]), "focal_length": row.get("fx"), "question": asked[0]})
        if not self.rows:
            raise ValueError(f"retention_steps is {every} but eval_datasets holds no image to ask about; add one")

    def answers(self) -> list[str]:
        core = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return generate_answers(core, self.trainer.processing_class, self.rows, self.max_pixels)

    def on_train_begin(self, args, state, control, **kwargs):
        stored = Path(args.output_dir) / "base_answers.json"
        if state.global_step and stored.exists():
            self.base = json.loads(stored.read_text())
            return
        self.base = self.answers()
        if args.should_save:
            stored.write_text(json.dumps(self.base, indent=1))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        answers = self.answers()
        canned = sum(answer == DEPTH_RESPONSE for answer in answers)
        kept = sum(answer == base for answer, base in zip(answers, self.base, strict=True))
        metrics = self.trainer._metrics["train"]
        metrics["canned_depth_replies"].append(canned / len(answers))
        metrics["base_agreement"].append(kept / len(answers))


def freeze(model: DepthVLMForConditionalGeneration, trains: list[str]):
    """Leave gradients to the named parts alone."""
    if "lm_head" in trains and model.config.tie_word_embeddings and "language_model" not in trains:
        raise ValueError(
            "trains has lm_head without language_model, but this model's LM head is the LLM's embedding; name both"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(PARTS[part] for part in trains))


def peft_config(model_args: ModelConfig, trains: list[str]):
    """LoRA on the LLM's linear layers where nothing else is asked for; the depth head is trained whole."""
    if model_args.use_peft:
        if "language_model" not in trains:
            raise ValueError(f"use_peft puts adapters on the LLM, which trains ({', '.join(trains)}) lacks; add it")
        if others := set(trains) - {"language_model", "depth_head"}:
            raise ValueError(f"trains names {', '.join(sorted(others))}, which adapters leave frozen; leave it out")
        model_args.lora_target_modules = model_args.lora_target_modules or r".*language_model.*_proj"
        if "depth_head" in trains:
            model_args.lora_modules_to_save = model_args.lora_modules_to_save or ["depth_head"]
    return get_peft_config(model_args)


def load_model(model_args: ModelConfig):
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit have no effect here; leave them out")
    for cls, auto_class in (
        (DepthVLMConfig, "AutoConfig"),
        (DepthVLMForConditionalGeneration, "AutoModelForImageTextToText"),
        (DepthVLMProcessor, "AutoProcessor"),
    ):
        cls.register_for_auto_class(auto_class)  # so that every save holds the code
    model = DepthVLMForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation,
    )
    processor = DepthVLMProcessor.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
    )
    return model, processor


def last_checkpoint(output: Path, world_size: int) -> Path:
    """The newest checkpoint that was written to its end."""
    found = [
        (int(folder.name.split("-")[1]), folder)
        for folder in output.glob("checkpoint-*")
        if all((folder / f"data_position_{rank}.json").exists() for rank in range(world_size))
    ]
    if not found:
        raise ValueError(f"{output} holds no complete checkpoint to resume from; leave resume_from_checkpoint out")
    return max(found)[1]


def save(trainer: DepthSFTTrainer):
    """A complete repository of weights, processor and code; adapters are merged."""
    if isinstance(trainer.model, PeftModel) and not trainer.is_fsdp_enabled:
        trainer.model = trainer.model.merge_and_unload()
        for file in Path(trainer.args.output_dir).glob("adapter_*"):  # pushed from a checkpoint: they are merged now
            file.unlink()
    if trainer.args.save_dtype:
        trainer.model.to(getattr(torch, trainer.args.save_dtype))
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def main(data_args: DataArguments, training_args: DepthSFTConfig, model_args: ModelConfig):
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # Model
    checkpoint = training_args.resume_from_checkpoint
    if not checkpoint and list(output.glob("checkpoint-*/data_position_0.json")):
        raise ValueError(
            f"{output} holds checkpoints of an earlier run; go on with --resume_from_checkpoint last, or remove them"
        )
    model, processor = load_model(model_args)
    freeze(model, training_args.trains)

    # Data
    rank, world_size = training_args.process_index, training_args.world_size
    train_dataset = TrainingStream(data_args, training_args.seed, rank, world_size, output / "unreadable.jsonl")
    eval_dataset = EvalSamples(data_args) if data_args.eval_datasets else None
    if training_args.trains != ["depth_head"] and all(source.kind == "depth" for source in data_args.datasets):
        logger.warning(NO_INSTRUCTIONS)

    # Training
    trainer = DepthSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(processor, data_args.max_pixels),
        processing_class=processor,
        peft_config=peft_config(model_args, training_args.trains),
        callbacks=[EpochCallback()],
    )
    if training_args.retention_steps:
        trainer.add_callback(RetentionWatch(trainer, data_args, training_args.retention_steps))
    trainer.train(resume_from_checkpoint=last_checkpoint(output, world_size) if checkpoint == "last" else checkpoint)

    # Evaluation
    if eval_dataset:
        trainer.save_metrics("eval", metrics := trainer.evaluate())
        trainer.log_metrics("eval", metrics)
    if training_args.eval_questions:
        core = trainer.accelerator.unwrap_model(trainer.model)
        metrics = score_questions(core, processor, data_args, training_args.eval_questions)
        trainer.log_metrics("questions", metrics)
        trainer.save_metrics("questions", metrics)

    save(trainer)


if __name__ == "__main__":
    parser = TrlParser((DataArguments, DepthSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
