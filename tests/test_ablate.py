"""`bench ablate`: rows as files, one real run of two rows, resuming, and tables by hand."""

import csv
import json
import subprocess

import pytest
import yaml

from bench import ablate, paper
from bench.tables import markdown
from depthvlm.configuration_depthvlm import DepthVLMConfig

FAST = {"max_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 0}
FAST |= {"eval_questions": 0}
CANONICAL_FOCAL_LENGTH = 200.0  # px, of the tiny model
ROWS_OF_PAPER = {4: 4, 5: 4, 6: 4, 7: 4}
BEST_OF_PAPER = {  # table -> its last column, IBims-1, in the paper's order of rows
    4: [0.695, 0.806, 0.895, 0.912],
    5: [0.777, 0.744, 0.829, 0.912],
    6: [0.753, 0.805, 0.900, 0.912],
    7: [0.630, 0.883, 0.912, 0.856],
}


def test_rows_are_the_papers():
    rows = ablate.read_rows()
    assert len(rows) == 13  # sixteen, of which one is in all four tables
    for table, count in ROWS_OF_PAPER.items():
        names = ablate.rows_of(rows, table)
        assert len(names) == count and "ours" in names
        published = paper.read_tables()[str(table)]
        last = published["columns"].index("ibims1")
        places = [rows[name]["tables"][table] for name in names]
        assert [published["rows"][place - 1]["values"][last] for place in places] == BEST_OF_PAPER[table]
    assert all(len(row["values"]) == 8 for row in paper.read_tables()["6"]["rows"])
    assert [name for name in rows if not rows[name]["focal_normalization"]] == ["focal_raw"]
    assert [name for name in rows if "vision" in rows[name]["stage2"]["trains"]] == ["unfreeze_vit"]
    tiny = CANONICAL_FOCAL_LENGTH
    focal = {name: rows[name]["config"].get("canonical_focal_length", tiny) / tiny for name in ablate.rows_of(rows, 7)}
    assert focal == {"focal_raw": 1, "focal_500": 0.5, "ours": 1, "focal_1500": 1.5}


def test_rows_are_known_to_model_and_trainer():
    """Every field is the configuration's, and every stage's argument the trainer's."""
    from training.arguments import PARTS

    known = set(DepthVLMConfig().to_dict())
    for row in ablate.read_rows().values():
        assert set(row["config"]) <= known and set(row["stages"]) <= {"stage1", "stage2"}
        assert set(row["stage2"]) == {"trains", "max_steps"} and not row["stage1"]
        assert set(row["stage2"]["trains"]) <= set(PARTS)


def test_ill_written_row_is_refused(tmp_path):
    (tmp_path / "ours.yaml").write_text((ablate.ROWS / "ours.yaml").read_text())
    (tmp_path / "new.yaml").write_text("tables: {4: 1}\nlr: 1\n")
    with pytest.raises(ValueError, match="new.yaml has lr; a row has config"):
        ablate.read_rows(tmp_path)
    (tmp_path / "new.yaml").write_text("stages: [stage1]\n")
    with pytest.raises(ValueError, match="new.yaml has no tables"):
        ablate.read_rows(tmp_path)


def test_two_rows_end_to_end(tmp_path, monkeypatch):
    """Two heads trained by train_sft.py itself; a second call trains nothing and ends in the same tables."""
    rows = {name: ablate.read_rows()[name] | {"stages": ["stage1"]} for name in ("head_mlp", "ours")}
    results = ablate.ablate(tmp_path, rows, [4], [0], 2, FAST)
    assert all(0 <= results[name][0]["delta1"] <= 1 and results[name][0]["abs_rel"] > 0 for name in rows)
    heads = sorted(
        json.loads((folder / "config.json").read_text())["depth_head_type"]
        for folder in (tmp_path / "runs").glob("stage1-*")
    )
    assert heads == ["dpt", "mlp"]
    assert not list((tmp_path / "runs").glob("*/checkpoint-*"))  # gigabytes, over all rows
    text = ablate.write_tables(tmp_path, rows, results, [4], 2, FAST)
    assert "0.695" in text and "Two-layer MLP" in text and "1 steps per stage" in text
    with open(tmp_path / "table4.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["delta1 seed 0"]) for line in lines] == [results[name][0]["delta1"] for name in rows]

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert ablate.ablate(tmp_path, rows, [4], [0], 2, FAST) == results


class Trainer:
    """Stands in for train_sft.py: writes the scores that it is told and keeps what it was asked."""

    def __init__(self, status=0):
        self.commands, self.status = [], status

    def __call__(self, command, cwd, stdout, stderr, env):
        place = command.index("--config") + 1
        arguments = yaml.safe_load(open(command[place]).read())
        self.commands.append((command[place + 1 :], arguments))
        with open(f"{arguments['output_dir']}/eval_results.json", "w") as file:
            json.dump({"eval_delta1": 0.5, "eval_abs_rel": 0.25, "eval_runtime": 1}, file)
        return subprocess.CompletedProcess(command, self.status)


def test_chain_of_stages_and_what_is_shared(tmp_path, monkeypatch):
    """Stage 2 starts from stage 1's folder; rows with the same first stage train it once; a cut-short run goes on."""
    rows, trainer = ablate.read_rows(), Trainer()
    monkeypatch.setattr(subprocess, "run", trainer)
    monkeypatch.setattr(ablate, "pretrain", lambda out, *_: out / "pretrained")
    monkeypatch.setattr(ablate, "start_with_head", lambda out, start, config, seed: out / f"head-{config}")
    monkeypatch.setattr(ablate, "build_data", lambda folder, frames, num_proc: folder)
    results = ablate.ablate(tmp_path, rows, [6], [3], 40, {"max_steps": 7})
    assert results == {name: {3: {"delta1": 0.5, "abs_rel": 0.25}} for name in ablate.rows_of(rows, 6)}
    asked = [arguments for _, arguments in trainer.commands]
    stage1 = [arguments for arguments in asked if arguments["trains"] == ["depth_head"]]
    # alone, its last look asks questions; before a second stage it need not
    assert len(asked) == 5 and [arguments["eval_questions"] for arguments in stage1] == [0, 4]
    assert {arguments["model_name_or_path"] for arguments in asked} == {
        str(tmp_path / "head-{}"),
        stage1[0]["output_dir"],
    }
    for arguments in asked:
        assert (arguments["seed"], arguments["max_steps"], arguments["max_eval_samples"]) == (3, 7, 4)
        assert {source["path"] for source in arguments["datasets"]} == {str(tmp_path / "data-40")}

    ablate.ablate(tmp_path, rows, [6], [3], 40, {"max_steps": 7})
    assert len(trainer.commands) == 5
    cut = tmp_path / "runs" / asked[0]["output_dir"].rsplit("/", 1)[1]
    (cut / "finished.json").unlink()
    (cut / "checkpoint-3").mkdir()
    (cut / "checkpoint-3" / "data_position_0.json").write_text("{}")
    ablate.ablate(tmp_path, rows, [6], [3], 40, {"max_steps": 7})
    assert len(trainer.commands) == 6 and trainer.commands[-1][0] == ["--resume_from_checkpoint", "last"]
    assert trainer.commands[-1][1] == asked[0] and not (cut / "checkpoint-3").exists()
    ablate.ablate(tmp_path, rows, [6], [3], 40, {"max_steps": 8})  # other settings are other runs
    assert len(trainer.commands) == 11


def test_failed_training_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Trainer(status=3))
    settings = ablate.stage_settings("stage1", tmp_path / "start", tmp_path / "data", 0, 10, {}, {})
    with pytest.raises(ChildProcessError, match="ended with status 3; read .*train.log"):
        ablate.train(tmp_path, "stage1", settings)
    assert not list(tmp_path.glob("runs/*/finished.json"))


def test_raw_data_claims_one_focal_length_and_is_else_the_same(tmp_path):
    """With the canonical focal length the processor leaves a photo its size, up to whole tokens, and its depth."""
    from datasets import load_dataset
    from fixed_batches import byte_processor

    from training.data import DataSource, read_sample

    data = ablate.build_data(tmp_path / "data", 3, 1)
    raw = ablate.without_focal_lengths(data, CANONICAL_FOCAL_LENGTH)
    before, after = (
        list(load_dataset(str(folder), "procedural", split="train", streaming=True).decode(False))
        for folder in (data, raw)
    )
    assert len(before) == len(after) == 3 and {row["fx"] for row in after} == {row["fy"] for row in after} == {200}
    assert len({row["fx"] for row in before}) == 3
    kept = set(before[0]) - {"fx", "fy"}
    assert [{key: row[key] for key in kept} for row in before] == [{key: row[key] for key in kept} for row in after]
    for row in after:
        sample = read_sample(row, DataSource(str(raw), "procedural"), None)
        camera = byte_processor()(images=sample["images"], focal_lengths=sample["focal_lengths"])["cameras"][0]
        assert all(abs(a - b) <= 16 for a, b in zip(camera["size"], camera["processed_size"], strict=True))
        assert camera["metric_scale"] == pytest.approx(1, abs=0.06)
    assert ablate.without_focal_lengths(data, CANONICAL_FOCAL_LENGTH) == raw


def record(title, published, values):
    row = {"method": title, "values": [published] * 4}
    by_seed = {seed: {"delta1": value, "abs_rel": 0.1} for seed, value in enumerate(values)}
    return ablate.record(row, ["waymo", "nuscenes", "sunrgbd", "ibims1"], by_seed, ("delta1", "abs_rel"))


def test_mean_spread_and_order():
    """Means and sample deviations by hand; the order is told as it is found."""
    a, b, c = record("a", 0.5, [0.1, 0.3]), record("b", 0.6, [0.5, 0.6]), record("c", 0.7, [0.55, 0.6])
    assert a["delta1"] == pytest.approx(0.2) and a["delta1 spread"] == pytest.approx(0.02**0.5)
    text = markdown(ablate.comparison(4, [a, b, c]))
    assert "| a | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.200 ± 0.141 | 0.100 ± 0.000 |" in text
    text = ablate.order([a, b, c])
    assert (
        "order of rows came out: 3 of 3" in text
        and "here: c; b; a." in text
        and text.endswith("1 pairs differ by no more than the spread over seeds.")
    )
    text = ablate.order([a, b, record("c", 0.7, [0.4, 0.4])])
    assert "order of rows did not come out: 2 of 3" in text and "here: b; c; a." in text
    alone = [record("a", 0.5, [0.1]), record("b", 0.6, [0.2])]
    text = markdown(ablate.comparison(4, alone))
    assert "One seed says nothing about spread" in ablate.order(alone) and "± " not in text


def test_rows_about_depth_and_words():
    """Three runs that differ in the depth loss alone; their last stage asks questions."""
    rows = ablate.read_rows(ablate.ROWS.parent / "depth_for_words")
    assert ablate.rows_of(rows, ablate.WORDS) == ["ours", "no_depth", "head_alone"]
    ours = {"max_steps": rows["ours"]["words"]["max_steps"], "depth_weight": 1.0}
    assert rows["ours"]["words"] == ours
    assert rows["no_depth"]["words"] == ours | {"depth_weight": 0}
    assert rows["head_alone"]["words"] == ours | {"depth_trains_head_alone": True}
    assert all(row["stages"] == ["stage1", "words"] for row in rows.values())


def test_gain_in_words_with_its_interval(tmp_path):
    """Seed by seed, against SciPy's interval of the mean difference."""
    from scipy import stats

    rows = ablate.read_rows(ablate.ROWS.parent / "depth_for_words")
    shares = {"ours": [0.5, 0.6, 0.7], "no_depth": [0.4, 0.55, 0.5], "head_alone": [0.5, 0.6, 0.7]}
    results = {
        name: {seed: dict.fromkeys(ablate.KINDS, value) for seed, value in enumerate(values)}
        for name, values in shares.items()
    }
    text = ablate.write_words(tmp_path, rows, results)
    gains = [after - before for after, before in zip(shares["no_depth"], shares["ours"], strict=True)]
    low, high = stats.t.interval(0.95, 2, loc=sum(gains) / 3, scale=stats.sem(gains))
    with open(tmp_path / "words.csv", newline="") as file:
        ours, no_depth, head_alone = csv.DictReader(file)
    assert float(no_depth["distance gain"]) == pytest.approx((low + high) / 2)
    assert float(no_depth["distance half interval"]) == pytest.approx((high - low) / 2)
    assert float(head_alone["nearer gain"]) == 0 and float(ours["nearer seed 2"]) == 0.7
    assert "| no_depth | 48.3% (-11.7% ± " in text and "| ours | 60.0% |" in text
    one = {name: {0: seeds[0]} for name, seeds in results.items()}
    assert "nan" in ablate.write_words(tmp_path, rows, one)
