"""Two processes give what one process gives, whatever each of them holds: DDP by the Trainer, FSDP2 by accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from answer_distributed import answer
from fixed_batches import largest_difference, make_trainer, naive_gradients
from tiny import tiny_model
from train_distributed import DDP, FSDP, STEPS, WHOLE

from bench.__main__ import main
from training.trainer import SUMS

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each rank has: another number of threads adds up in another order, which shows in the seventh digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_on_two(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, HERE / script, *arguments], env=environment, check=True, timeout=400)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed")
    run_on_two("train_distributed.py", output)
    return {path.stem: torch.load(path, weights_only=True) for path in output.glob("*.pt")}


@pytest.mark.parametrize("case", DDP)
def test_ddp_gradients_equal_naive(results, case):
    trains, first, second, _ = DDP[case]
    expected, text, depth = naive_gradients(tiny_model(), [first[0], second[0]], trains)
    gradients, logged = results[case]
    assert largest_difference(gradients, expected) < 1e-6
    assert logged[0]["loss"] == pytest.approx(text + depth, abs=1e-5)
    assert logged[0].get("depth_loss", 0) == pytest.approx(depth, abs=1e-5)


@pytest.mark.parametrize("case", ["stage1", "stage2", "text only on a rank"])
def test_two_processes_train_like_one(results, tmp_path, case):
    trains, *of_ranks, _ = DDP[case]
    batches = [batch for step in zip(*of_ranks, strict=True) for batch in step]
    trainer, _ = make_trainer(tiny_model(), batches, tmp_path, trains, max_steps=STEPS, gradient_accumulation_steps=2)
    trainer.train()
    one = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    two = [entry["loss"] for entry in results[case][1]]
    assert len(one) == STEPS and two == pytest.approx(one, abs=1e-5)


def test_logged_losses_do_not_depend_on_the_number_of_processes(results, tmp_path):
    trainer, _ = make_trainer(tiny_model(), WHOLE, tmp_path, max_steps=STEPS)
    trainer.train()
    one, *_ = trainer.state.log_history
    two, *_ = results["one batch in halves"][1]
    names = [name for name in one if name.split("/")[0] in {*SUMS, "loss"}]
    assert len(names) == 5 + 2 * len(SUMS)
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-6)
    assert two["loss"] == two["lm_loss"] + two["depth_loss"]


@pytest.mark.parametrize("case", FSDP)
def test_fsdp2_gradients_equal_naive(results, case):
    """With an untied LM head, TRL's own fused head would leave each rank its own gradient."""
    trains, tied, *batches = FSDP[case]
    expected, *_ = naive_gradients(tiny_model(tie_word_embeddings=tied), batches, trains)
    gradients, _ = results[case]
    assert largest_difference(gradients, expected) < 1e-6


def test_two_processes_share_the_questions_and_score_them_like_one(tmp_path):
    build = ["build", "procedural_easy", "--out", str(tmp_path), "--split", "test", "--max-frames", "3"]
    assert main(build) == 0
    scores, answered = answer(str(tmp_path))
    assert 0 < scores["questions_all"] < 1 and answered > 40
    run_on_two("answer_distributed.py", tmp_path, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one for one, _ in ranks] == [scores, scores]
    assert sum(own for _, own in ranks) == answered and abs(ranks[0][1] - ranks[1][1]) <= 1
