"""Trains DepthVLM with TRL: the paper's two stages, or any other, are sets of flags in a YAML file.

    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage1.yaml
    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage2.yaml
    python train_sft.py --config configs/tiny_stage1.yaml            # on a CPU

Stage 1 trains the depth head alone, with SILog; stage 2 the language model too, with cross-entropy on the answers +
`depth_weight` * SILog, both from one pass. `--help` lists every flag; flags win over the file.
"""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor
from training.data import Collator, DataArguments, EvalSamples, TrainingStream
from training.plan import dry_run, set_length, shares, total_rows, warnings
from training.questions import RetentionWatch, score_questions
from training.trainer import DepthSFTConfig, DepthSFTTrainer, EpochCallback, freeze

logger = logging.get_logger(__name__)


def peft_config(model_args: ModelConfig, trains: list[str]) -> PeftConfig | None:
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


def load_model(model_args: ModelConfig) -> tuple[DepthVLMForConditionalGeneration, DepthVLMProcessor]:
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
    complete = [
        (int(folder.name.split("-")[1]), folder)
        for folder in output.glob("checkpoint-*")
        if all((folder / f"data_position_{rank}.json").exists() for rank in range(world_size))
    ]
    if not complete:
        raise ValueError(f"{output} holds no complete checkpoint to resume from; leave resume_from_checkpoint out")
    return max(complete)[1]


def save(trainer: DepthSFTTrainer) -> None:
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


def main(data_args: DataArguments, training_args: DepthSFTConfig, model_args: ModelConfig) -> None:
    adapters = peft_config(model_args, training_args.trains)
    if training_args.dry_run is not None:
        return dry_run(data_args, training_args, model_args, adapters)
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # Plan
    (mix,) = broadcast_object_list([shares(data_args) if training_args.process_index == 0 else None])
    set_length(training_args, mix)
    for sentence in warnings(data_args, training_args, mix):
        logger.warning(sentence)

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

    # Training
    trainer = DepthSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(processor, data_args.max_pixels),
        processing_class=processor,
        peft_config=adapters,
        rows={share.label: share.rows for share in mix},
        callbacks=[EpochCallback(total_rows(mix))],
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
