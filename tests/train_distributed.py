"""What `test_train_distributed.py` runs on two processes: `torchrun --nproc_per_node 2 train_distributed.py OUT`.

Rank 0 writes OUT/{case}.pt: (gradients of the first update, what was logged).
"""

# ruff: noqa: E402, I001  a script of its own: the paths come first, then the package that other imports are from

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny import tiny_model
from fixed_batches import ALL, HEAD, STAGE2, make_batch, make_trainer, some_rows
from trl.trainer.utils import add_fused_lm_head

from training.loss import add_depth_loss
from training.arguments import freeze

STEPS = 3
FULL = [make_batch([[(2, 3)], [(1, 2), (2, 2)]], labelled=(0, 2), seed=i) for i in range(STEPS)]
FEWER = [make_batch([[(3, 2)], []], labelled=(0,), seed=10 + i) for i in range(STEPS)]
UNLABELLED = [make_batch([[(2, 2)], [(1, 3)]], seed=20 + i) for i in range(STEPS)]
TEXT = [make_batch([[], [], []], seed=30 + i) for i in range(STEPS)]
SILENT = [make_batch([[(2, 2)]], labelled=(0,), seed=40 + i, answers=False) for i in range(STEPS)]
GRIDS = [[(2, 3)], [(2, 2), (1, 2)], [(3, 2)], [(1, 3)]]
WHOLE = [make_batch(GRIDS, labelled=(0, 1, 3, 4), seed=50 + i) for i in range(STEPS)]
HALVES = [[some_rows(batch, GRIDS, rows) for batch in WHOLE] for rows in (slice(0, 2), slice(2, 4))]

# case -> (what trains, batches of rank 0, batches of rank 1, further arguments)
DDP = {
    "stage1": (HEAD, FULL, FEWER, {}),
    "stage2": (STAGE2, FULL, FEWER, {}),
    "vision": (ALL, FULL, FEWER, {}),
    "no labels on a rank": (STAGE2, FULL, UNLABELLED, {}),
    "no labels in stage 1": (HEAD, UNLABELLED, FULL, {}),
    "text only on a rank": (ALL, TEXT, FULL, {}),
    "text only in stage 1": (HEAD, FULL, TEXT, {}),
    "text only, nothing searched": (ALL, FULL, TEXT, {"ddp_find_unused_parameters": False}),
    "no answers on a rank": (STAGE2, FULL, SILENT, {}),
    "nothing labelled anywhere": (STAGE2, TEXT, UNLABELLED, {}),
    "one batch in halves": (STAGE2, *HALVES, {}),
}
FSDP = {  # case -> (what trains, tied embeddings, batch of rank 0, batch of rank 1)
    "fsdp tied": (STAGE2, True, FULL[0], FEWER[0]),
    "fsdp untied": (STAGE2, False, FULL[0], FEWER[0]),
    "fsdp text only on a rank": (ALL, False, TEXT[0], FULL[0]),
    "fsdp stage 1": (HEAD, True, FULL[0], UNLABELLED[0]),
}


def ddp(trains, batches, arguments, output):
    trainer, gradients = make_trainer(tiny_model(), batches, output, trains, max_steps=STEPS, **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return gradients.updates[0], logged


def fsdp(trains, tied, batches, rank):
    """accelerate's own wrapping of the model; its Trainer side needs a GPU."""
    model = tiny_model(tie_word_embeddings=tied)
    freeze(model, trains)
    add_fused_lm_head(model, outputs=("log_probs",))
    add_depth_loss(model, trains_text=trains != HEAD)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"],
        reshard_after_forward=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device="cpu", is_main_process=rank == 0
    )
    model = fsdp2_prepare_model(accelerator, model)
    inputs = {**batches[rank], "fused_lm_head": True}
    for name in ("position", "row_sets", "image_sets"):
        del inputs[name]
    labels = inputs.pop("depth_labels", [])
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    images = sum(label.any() for batch in batches for label in batch.get("depth_labels", ()))
    scale = 2 / images.clamp(min=1)  # of two ranks, as the trainer does
    outputs = model(**inputs, depth_targets=SimpleNamespace(labels=labels, scale=scale))
    loss = outputs.depth_loss
    if outputs.log_probs is not None:
        loss = loss - 2 * outputs.log_probs.sum() / tokens
    loss.backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}, []


def main(output):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for case, (trains, *batches, arguments) in DDP.items():
        result = ddp(trains, batches[rank], arguments, output)
        if rank == 0:
            torch.save(result, output / f"{case}.pt")
    for case, (trains, tied, *batches) in FSDP.items():
        result = fsdp(trains, tied, batches, rank)
        if rank == 0:
            torch.save(result, output / f"{case}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
