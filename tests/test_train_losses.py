"""`DepthSFTTrainer` against the losses written out by hand: gradients, averages, what moves and what does not."""

import math

import pytest
import torch
from fixed_batches import (
    ALL,
    HEAD,
    NO_INPUTS,
    STAGE2,
    largest_difference,
    make_batch,
    make_trainer,
    naive_gradients,
    naive_losses,
    some_rows,
)
from peft import LoraConfig
from tiny import tiny_model

from depthvlm.modeling_depthvlm import DepthVLMSeen, silog_loss
from training.loss import gradient_matching_loss, score

BATCHES = [
    make_batch([[(2, 3)], [(2, 3), (1, 2)], []], labelled=(0, 2), seed=1),
    make_batch([[(3, 2)], [(1, 1)]], labelled=(1,), seed=2),
    make_batch([[], []], seed=3),
    make_batch([[(2, 2)]], seed=4, answers=False),
]


def update(tmp_path, batches, trains=STAGE2, model=None, **arguments):
    """(the gradients of one update over `batches`, what was logged)"""
    arguments = {"gradient_accumulation_steps": len(batches)} | arguments
    trainer, gradients = make_trainer(model or tiny_model(), batches, tmp_path, trains, **arguments)
    trainer.train()
    return gradients.updates[0], trainer.state.log_history[0]


@pytest.mark.parametrize("batches", [BATCHES[:1], BATCHES], ids=["one batch", "accumulation"])
@pytest.mark.parametrize("trains", [HEAD, STAGE2, ALL], ids=["stage 1", "stage 2", "vision too"])
def test_gradients_equal_naive(tmp_path, trains, batches):
    expected, text, depth = naive_gradients(tiny_model(), batches, trains)
    gradients, logged = update(tmp_path, batches, trains)
    assert largest_difference(gradients, expected) < 1e-6
    assert logged["loss"] == pytest.approx(text + depth, abs=1e-5)
    assert logged["depth_loss"] == pytest.approx(depth, abs=1e-5)
    assert ("lm_loss" in logged) == (trains != HEAD)


def test_gradients_with_checkpointing(tmp_path):
    expected, *_ = naive_gradients(tiny_model(), BATCHES, ALL)
    gradients, _ = update(tmp_path, BATCHES, ALL, gradient_checkpointing=True)
    assert largest_difference(gradients, expected) < 1e-6


def test_depth_weight(tmp_path):
    expected, *_ = naive_gradients(tiny_model(), BATCHES, STAGE2, beta=0.3)
    gradients, _ = update(tmp_path, BATCHES, depth_weight=0.3)
    assert largest_difference(gradients, expected) < 1e-6


def test_depth_that_trains_the_head_alone(tmp_path):
    """The head's gradients are those of the sum of both losses, everything else's those of the text loss."""
    both, *_ = naive_gradients(tiny_model(), BATCHES, ALL)
    text, *_ = naive_gradients(tiny_model(), BATCHES, ALL, beta=0)
    expected = text | {name: value for name, value in both.items() if name.startswith("depth_head.")}
    gradients, _ = update(tmp_path, BATCHES, ALL, depth_trains_head_alone=True)
    assert largest_difference(gradients, expected) < 1e-6


def test_label_of_another_size(tmp_path):
    batch = make_batch([[(2, 3)]], labelled=(0,), label_size=(50, 70))
    expected, *_ = naive_gradients(tiny_model(), [batch], STAGE2)
    gradients, _ = update(tmp_path, [batch])
    assert largest_difference(gradients, expected) < 1e-6


def plain_gradient_matching(prediction, label) -> float:
    """Ranftl et al. 2020, eq. 11, in log depth, one pixel after another."""
    total = 0.0
    for step in (1, 2, 4, 8):
        height, width = label[::step, ::step].shape
        residual = {
            (row, column): math.log(
                prediction[step * row, step * column].item() / label[step * row, step * column].item()
            )
            for row in range(height)
            for column in range(width)
            if label[step * row, step * column] > 0
        }
        differences = [
            abs(residual[neighbour] - residual[row, column])
            for row, column in residual
            for neighbour in ((row + 1, column), (row, column + 1))
            if neighbour in residual
        ]
        total += sum(differences) / max(len(residual), 1)
    return total


def test_gradient_matching_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    prediction, label = torch.rand(2, 19, 23, generator=generator) * 9 + 0.5
    assert gradient_matching_loss(prediction, label).item() == pytest.approx(
        plain_gradient_matching(prediction, label), rel=1e-5
    )
    label[torch.rand(label.shape, generator=generator) < 0.4] = 0
    prediction.requires_grad_()
    loss = gradient_matching_loss(prediction, label)
    assert loss.item() == pytest.approx(plain_gradient_matching(prediction, label), rel=1e-5)
    loss.backward()
    assert prediction.grad.isfinite().all() and not prediction.grad[label == 0].any()
    assert gradient_matching_loss(3 * label.clamp(min=0.1), label) < 1e-6  # a common factor costs nothing


def test_two_depth_terms_in_training_and_evaluation(tmp_path):
    """Both branches, with and without gradients, and the update's gradients, against the terms summed by hand."""
    losses = {"silog": 1.0, "gradient_matching": 0.3}
    reference, batch = tiny_model(), BATCHES[0]
    seen = DepthVLMSeen()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")}
    reference.model(**inputs, image_grid_thw=batch["image_grid_thw"], seen=seen)
    pairs = [
        (reference.depth_head(features, grid)[0], label)
        for (features, grid), label in zip(reference.depth_features(seen), batch["depth_labels"], strict=True)
        if label.any()
    ]
    expected = sum(silog_loss(*pair) + 0.3 * gradient_matching_loss(*pair) for pair in pairs) / len(pairs)
    expected.backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if name.startswith("depth_head.")}
    gradients, logged = update(tmp_path, [batch], HEAD, depth_losses=losses)
    assert largest_difference(gradients, wanted) < 1e-6
    assert logged["depth_loss"] == pytest.approx(expected.item(), abs=1e-6)
    with torch.no_grad():
        assert score(*pairs[0], losses)[0] == pytest.approx(
            (silog_loss(*pairs[0]) + 0.3 * gradient_matching_loss(*pairs[0])).item(), abs=1e-6
        )


def test_untied_lm_head(tmp_path):
    expected, *_ = naive_gradients(tiny_model(tie_word_embeddings=False), BATCHES, STAGE2)
    gradients, _ = update(tmp_path, BATCHES, model=tiny_model(tie_word_embeddings=False))
    assert "lm_head.weight" in gradients and largest_difference(gradients, expected) < 1e-6


@pytest.mark.parametrize("source", ["vit", "llm"])
def test_other_features(tmp_path, source):
    expected, *_ = naive_gradients(tiny_model(depth_feature_source=source), BATCHES, STAGE2)
    gradients, _ = update(tmp_path, BATCHES, model=tiny_model(depth_feature_source=source))
    assert largest_difference(gradients, expected) < 1e-6


def test_lora(tmp_path):
    """Adapters as they are drawn, and a head that is trained whole; the reference is the same model, not wrapped."""
    config = LoraConfig(
        r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["depth_head"], init_lora_weights=False
    )
    trainer, gradients = make_trainer(
        tiny_model(), BATCHES, tmp_path, STAGE2, config, gradient_accumulation_steps=len(BATCHES)
    )
    adapted = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    trainer.train()
    del adapted.get_base_model().forward  # back to the class's own
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.copy_(before[name])
            parameter.grad = None

    sum(naive_losses(adapted.get_base_model(), BATCHES)).backward()
    expected = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in expected) and any("depth_head" in name for name in expected)
    assert largest_difference(gradients.updates[0], expected) < 1e-6


@pytest.mark.parametrize("batch", range(2, 4))
def test_without_images_or_answers(tmp_path, batch):
    """Text alone and an image with neither answer nor label train without error, and move what they can."""
    expected, *_ = naive_gradients(tiny_model(), BATCHES[batch : batch + 1], ALL)
    gradients, logged = update(tmp_path, BATCHES[batch : batch + 1], ALL)
    assert largest_difference(gradients, expected) < 1e-6
    assert "depth_loss" not in logged and logged["loss"] >= 0
    assert all(name in gradients for name, parameter in tiny_model().named_parameters() if "depth_head" in name)


def test_stage_1_leaves_text_alone(tmp_path):
    model = tiny_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {k: BATCHES[0][k] for k in BATCHES[0] if k not in NO_INPUTS}
    logits = model(**inputs).logits
    trainer, _ = make_trainer(model, BATCHES[:2], tmp_path, HEAD, max_steps=2, optim="adamw_torch", weight_decay=0.1)
    lm_head_calls = []
    model.lm_head.register_forward_hook(lambda *_: lm_head_calls.append(1))
    trainer.train()
    assert not lm_head_calls
    model.eval()
    assert torch.equal(model(**inputs).logits, logits)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if name.startswith("depth_head.")}


@pytest.mark.parametrize("tied", [True, False])
def test_stage_2_moves_what_it_should(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    base = {name: value.clone() for name, value in model.named_parameters()}
    trainer, _ = make_trainer(model, BATCHES[:2], tmp_path, max_steps=2, optim="adamw_torch", weight_decay=0.1)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if not name.startswith("model.visual.")}


def test_pretraining_leaves_the_head(tmp_path):
    model = tiny_model()
    base = {name: value.clone() for name, value in model.named_parameters()}
    trainer, _ = make_trainer(
        model, BATCHES[:2], tmp_path, ["language_model", "lm_head", "vision"], max_steps=2, depth_weight=0
    )
    trainer.train()
    assert "depth_loss" not in trainer.state.log_history[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if not name.startswith("depth_head.")}


def test_logits_of_the_whole_sequence_are_never_made(tmp_path, monkeypatch):
    """TRL's fused head is what text goes through: the LM head module is not called."""
    model = tiny_model()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer, _ = make_trainer(model, BATCHES[:1], tmp_path)
    trainer.train()
    assert not calls


def test_one_backbone_pass(tmp_path):
    model = tiny_model()
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append("llm"))
    model.model.visual.register_forward_hook(lambda *_: calls.append("vision"))
    trainer, _ = make_trainer(model, BATCHES[:1], tmp_path)
    trainer.train()
    assert sorted(calls) == ["llm", "vision"]


def test_trl_metrics_are_kept(tmp_path):
    _, logged = update(tmp_path, BATCHES)
    expected = {"entropy", "mean_token_accuracy", "num_tokens", "lm_loss", "depth_loss", "delta1", "abs_rel"}
    assert expected | {"images_per_second"} <= logged.keys()


GRIDS = [[(2, 3)], [(2, 2), (1, 2)], [(3, 2)], [(1, 3)]]
WHOLE = make_batch(GRIDS, labelled=(0, 1, 3, 4), seed=9)
LOSSES = ("loss", "lm_loss", "depth_loss", "delta1", "abs_rel")


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_logged_losses_do_not_depend_on_the_split(tmp_path, rows):
    """One update of four rows in one, two or four micro-batches, against the losses by hand; its data sets add up."""
    batches = [some_rows(WHOLE, GRIDS, slice(start, start + rows)) for start in range(0, 4, rows)]
    _, logged = update(tmp_path, batches, depth_weight=0.7)
    text, depth = (value.item() for value in naive_losses(tiny_model(), [WHOLE]))
    assert logged["lm_loss"] == pytest.approx(text, abs=1e-6) and logged["depth_loss"] == pytest.approx(depth, abs=1e-6)
    assert logged["loss"] == logged["lm_loss"] + 0.7 * logged["depth_loss"]
    for share, names in (("lm_share", ["lm_loss"]), ("depth_share", ["depth_loss", "delta1", "abs_rel"])):
        assert sum(logged[f"{share}/{name}"] for name in ("even", "odd")) == pytest.approx(1, abs=1e-9)
        for metric in names:
            of_sets = [logged[f"{share}/{name}"] * logged[f"{metric}/{name}"] for name in ("even", "odd")]
            assert sum(of_sets) == pytest.approx(logged[metric], abs=1e-9)


def test_losses_of_a_data_set_are_those_of_its_rows_alone(tmp_path):
    _, logged = update(tmp_path, [WHOLE])
    for name, rows in (("even", (0, 2)), ("odd", (1, 3))):
        parts = [some_rows(WHOLE, GRIDS, slice(row, row + 1)) for row in rows]
        text, depth = (value.item() for value in naive_losses(tiny_model(), parts))
        assert logged[f"lm_loss/{name}"] == pytest.approx(text, abs=1e-6)
        assert logged[f"depth_loss/{name}"] == pytest.approx(depth, abs=1e-6)
    assert logged["depth_share/even"] == 2 / 4  # images 0 and 3 of the labelled four


def test_logged_losses_of_several_updates_are_their_means(tmp_path):
    """At learning rate 0; the second update has no depth, which counts as a depth loss of 0, but as no accuracy."""
    batches = [WHOLE, make_batch([[], []], seed=3)]
    arguments = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "gradient_accumulation_steps": 1}
    trainer, _ = make_trainer(tiny_model(), batches, tmp_path, **arguments)
    trainer.train()
    logged, final = trainer.state.log_history
    losses = [[value.item() for value in naive_losses(tiny_model(), [batch])] for batch in batches]
    _, alone = update(tmp_path, [WHOLE], learning_rate=0.0)
    assert logged["lm_loss"] == pytest.approx((losses[0][0] + losses[1][0]) / 2, abs=1e-6)
    assert logged["depth_loss"] == pytest.approx(losses[0][1] / 2, abs=1e-6)
    assert logged["delta1"] == pytest.approx(alone["delta1"], abs=1e-9)
    assert logged["loss"] == pytest.approx(final["train_loss"], abs=1e-6)  # Trainer's own sum of what was propagated


def test_rates(tmp_path):
    _, logged = update(tmp_path, [WHOLE])
    mask = WHOLE["attention_mask"]
    assert logged["padding_share"] == pytest.approx(1 - mask.sum().item() / mask.numel(), abs=1e-4)
    assert logged["tokens_per_second"] / logged["images_per_second"] == pytest.approx(mask.sum().item() / 5, rel=0.02)
    assert 0 <= logged["data_wait_share"] < 1


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="trains names sound"):
        make_trainer(tiny_model(), BATCHES, tmp_path, ["sound"])
    with pytest.raises(ValueError, match="name both"):
        make_trainer(tiny_model(), BATCHES, tmp_path, ["lm_head", "depth_head"])
    with pytest.raises(ValueError, match="no loss"):
        make_trainer(tiny_model(), BATCHES, tmp_path, HEAD, depth_weight=0)
