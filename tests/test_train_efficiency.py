"""`bench/efficiency.py --train` compares two ways of one computation."""

import pytest
import torch
from fixed_batches import byte_processor
from tiny import tiny_config

from bench.efficiency import loader_efficiency, table, training_efficiency, training_steps


def test_both_steps_have_the_same_loss_and_gradients():
    report = training_efficiency(tiny_config(), (2, 3), images=2, dtype=torch.float32, repeats=1)
    assert "of straightforward stage-1 step" in table(report)
    assert report["loss_difference"] < 1e-6 and report["gradient_difference"] < 1e-5
    assert set(report["seconds"]) == set(report["peak_bytes"]) == {"straightforward stage-1 step", "stage-1 step"}
    assert report["ratios"]["stage-1 step"] > 0


def test_both_steps_of_stage_2_have_the_same_loss_and_gradients():
    steps = training_steps(tiny_config(), (2, 3), 2, torch.float32, stage=2, device="cpu")
    (their_loss, theirs), (loss, gradients) = (step() for step in steps.values())
    assert abs(loss - their_loss) < 1e-6 and torch.dist(gradients, theirs) < 1e-5 * theirs.norm()


def test_the_loader_is_weighed_against_float_patches(tmp_path):
    """Per pixel: 3 bytes in place of two equal frames of 3 floats; 4 bytes of label both ways. Token ids are few."""
    byte_processor().save_pretrained(tmp_path)
    weights = loader_efficiency(str(tmp_path), (120, 160), images=2, repeats=1)["batch_bytes"]
    pixels = 1344 * 992  # of 160 x 120 px with f = 119 px at f_c = 1000 px, in whole tokens
    assert weights["plain sample"] == pytest.approx(2 * pixels * (24 + 4), rel=0.01)
    assert weights["sample"] == pytest.approx(2 * pixels * (3 + 4), rel=0.01)
