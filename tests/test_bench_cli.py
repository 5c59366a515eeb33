import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from bench_fixtures_toy import DyingToy, HidingToy, Toy, encoded, picture, write_toy

import bench
from bench import sources
from bench.__main__ import main
from bench.sources._base import import_package

ROOT = Path(__file__).parents[1]
DATASETS3 = ROOT / ".venv-datasets3" / "bin" / "python"


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The raw folder of a toy source that the command line knows beside the real ones."""
    real = sources.get
    known = {"toy": Toy, "hiding": HidingToy, "dying": DyingToy}
    monkeypatch.setattr(sources, "get", lambda name: known.get(name) or real(name))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(write_toy(write_toy(tmp_path / "raw", {"a/x": 3, "b/x": 2}), {"a/x": 2}, "train"))


def test_build_prints_a_summary_of_every_split(toy, tmp_path, capsys):
    (Path(toy) / "test" / "a" / "x" / "001.npy").unlink()
    assert main(["build", "toy", "--raw", toy, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "toy/train: 2 images and 0 points in 1 shards" in output and "1 frames skipped" in output
    assert re.search(r"toy/test: 4 images and \d+ points in 1 shards, 8\d\.\d% of depth pixels valid", output)
    assert "skipped a/x/001:" in output and "001.npy" in output
    loaded = datasets.load_dataset(str(tmp_path / "out"), "toy")
    assert {name: len(split) for name, split in loaded.items()} == {"train": 2, "test": 4}


def test_build_options(toy, tmp_path):
    out = str(tmp_path / "out")
    command = ["build", "toy", "--raw", toy, "--out", out, "--split", "test", "--max-frames", "2", "--seed", "5"]
    assert main(command) == 0
    parameters = json.loads((tmp_path / "out" / "toy" / "test.json").read_text())["parameters"]
    assert (parameters["seed"], parameters["images"]) == (5, 2)
    assert not (tmp_path / "out" / "toy" / "train.json").exists()
    assert main(["build", "hiding", "--raw", toy, "--out", str(tmp_path / "kept"), "--keep-hidden"]) == 0


def test_strict_exits_1(toy, tmp_path, capsys):
    (Path(toy) / "test" / "a" / "x" / "001.npy").unlink()
    command = ["build", "toy", "--raw", toy, "--out", str(tmp_path / "out"), "--split", "test"]
    assert main([*command, "--strict"]) == 1
    assert "a/x/001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("build nosuch --raw {raw} --out {out}", "unknown source 'nosuch'; the sources are argoverse2, "),
        ("build toy --out {out}", "toy needs --raw"),
        ("build toy --raw {raw}/nosuch --out {out}", "is not a directory"),
        ("build toy --raw {raw} --out {out} --keep-hidden", "leave --keep-hidden out"),
        ("build toy --raw {raw} --out {raw}/test/a/x/001.npy", "001.npy"),
        ("check nosuch --raw {raw}", "unknown source"),
        ("import {raw}/no.jsonl --images {raw} --depths {raw} --out {out} --source toy", "No such file"),
        ("import {raw}/no.jsonl --images {raw}/none --out {out} --source toy", "is not a folder"),
        ("import {raw}/no.jsonl --images {raw} --out {out} --source nosuch", "unknown source"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_2(toy, tmp_path, capsys, arguments, message):
    assert main(arguments.format(raw=toy, out=tmp_path / "out").split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1 and not captured.out


@pytest.mark.parametrize(
    "arguments", ["", "nosuch", "build toy --out x --num-proc 0", "build toy --out x --max-frames -1"]
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2


def test_killed_worker_is_reported_with_a_remedy(toy, tmp_path, capsys):
    command = ["build", "dying", "--raw", toy, "--out", str(tmp_path / "out"), "--split", "test", "--num-proc", "2"]
    assert main(command) == 1
    assert "smaller --num-proc" in capsys.readouterr().err


def test_import_reads_the_arguments(toy, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded(picture(0), "PNG"))
    (tmp_path / "d.png").write_bytes(encoded(np.full((12, 20), 2000, np.uint16), "PNG"))
    record = {
        "image": "a.png", "depth_path": "d.png", "depth_scale": 1000, "original_rgb_size": [40, 24],
        "original_depth_size": [20, 12], "original_fx": 30, "canonical_size": [1333, 800],
        "pixel_coords": [[19, 11]], "depth": [2.0],
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n{\n")
    command = f"import {tmp_path}/a.jsonl --images {tmp_path} --depths {tmp_path} --out {tmp_path}/out --source toy"
    assert main(command.split()) == 0
    assert "skipped line-2: not a JSON record" in capsys.readouterr().out
    assert main([*command.replace("/out", "/kept").split(), "--as-released"]) == 0
    points = {
        out: datasets.load_dataset(str(tmp_path / out), "toy", split="test")[0]["points_u"] for out in ("out", "kept")
    }
    assert points == {"out": [38.5], "kept": [19.0]}
    assert main([*command.replace("/out", "/strict").split(), "--strict"]) == 1


def test_sources_lists_all_with_licence_page_and_layout(capsys):
    assert main(["sources"]) == 0
    output = capsys.readouterr().out
    assert [line.split(":")[0] for line in output.splitlines() if line and line[0] != " "] == sources.names()
    for name in sources.names():
        source = sources.get(name)
        assert source.licence in output and source.page in output


def test_manual_has_every_source_with_its_range():
    manual = (ROOT / "bench" / "README.md").read_text()
    stated = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+)–([\d.]+) \|", manual, re.MULTILINE)
    ranges = {name: sources.get(name).depth_range for name in sources.names()}
    assert {name: (float(low), float(high)) for name, low, high in stated} == ranges


def test_packages_of_single_readers_are_the_extra_and_named_where_missing(monkeypatch):
    code = "".join(path.read_text() for path in (ROOT / "bench" / "sources").rglob("*.py"))
    imported = dict(re.findall(r'import_package\("([\w.]+)", "([\w-]+)"\)', code))
    (extra,) = re.findall(r"^readers = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(imported.values()) == {re.match(r"[\w-]+", package)[0] for package in json.loads(extra)}
    for module, package in imported.items():
        assert import_package(module, package).__name__ == module
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"read with {package}; run: pip install {package}$"):
            import_package(module, package)


def test_check_says_that_a_folder_looks_right(toy, capsys):
    assert main(["check", "toy", "--raw", toy]) == 0
    output = capsys.readouterr().out
    assert "test: a/x/000: image 40x24, depth 20x12 with 8" in output and "toy looks right" in output
    assert "fx 30.0 fy 31.0 cx 19.5 cy 11.5 px" in output


def test_check_says_what_is_missing(toy, capsys):
    for path in Path(toy).glob("*/*/*/*.npy"):
        path.unlink()
    shutil.rmtree(Path(toy) / "train")
    assert main(["check", "toy", "--raw", toy]) == 1
    output = capsys.readouterr().out
    assert "missing: depth maps (*/*/*/*.npy)" in output and "expected: SPLIT/SCENE/CAMERA" in output
    assert "train: [Errno 2]" in output and "test: [Errno 2]" in output and "3 problems" in output


def test_check_names_a_bad_first_frame_and_an_empty_split(toy, capsys):
    np.save(Path(toy) / "test" / "a" / "x" / "000.npy", np.zeros((12, 20), np.float32))
    shutil.rmtree(Path(toy) / "train" / "a")
    assert main(["check", "toy", "--raw", toy]) == 1
    output = capsys.readouterr().out
    assert "test: frame a/x/000: a/x/000: no depth within" in output and "train: no frames" in output


# The card's own example, and the script on datasets 3


def write_myset(raw):
    """Raw data of the card's fourteenth source: a wall at 2 m."""
    for folder in ("rgb", "depth"):
        (raw / folder).mkdir(parents=True)
    for name in ("b", "a"):
        (raw / "rgb" / f"{name}.jpg").write_bytes(encoded(picture(0), "JPEG"))
        (raw / "depth" / f"{name}.png").write_bytes(encoded(np.full((12, 20), 2000, np.uint16), "PNG"))
    return raw


@pytest.fixture
def with_fourteenth(tmp_path):
    """A copy of the package with the card's snippet as its fourteenth source, one file; and raw data for it."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "bench" / "README.md").read_text(), re.DOTALL)
    copy = tmp_path / "copy"
    shutil.copytree(Path(bench.__file__).parent, copy / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "bench" / "sources" / "myset.py").write_text(snippet)
    return copy, write_myset(tmp_path / "raw")


def python(interpreter, folder, *arguments, cache):
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(interpreter), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Reads a split in three ways and prints what the rows are, for two versions to compare.
READ = """
import hashlib, json, sys
import datasets, numpy as np
def tell(rows):
    told = []
    for row in rows:
        row = dict(row)
        for key in ("image", "depth"):
            row[key] = [row[key].mode, hashlib.sha256(np.asarray(row[key]).tobytes()).hexdigest()]
        told.append(row)
    return told
out, name = sys.argv[1:3]
told = tell(datasets.load_dataset(out, name, split="test"))
assert told == tell(datasets.load_dataset(out, name, split="test", streaming=True))
print(json.dumps([sorted(told[0]), told]))
"""

SCRIPT = """
import sys
import datasets
script, raw, name, out = sys.argv[1:5]
assert datasets.__version__.startswith("3."), datasets.__version__
rows = datasets.load_dataset(script, name, data_dir=raw, trust_remote_code=True, split="test")
built = datasets.load_dataset(out, name, split="test")
assert rows.features == built.features, (rows.features, built.features)
assert list(rows) == list(built) and len(rows) == 2
try:
    datasets.load_dataset(script, "nosuch", data_dir=raw, trust_remote_code=True)
except ValueError as error:
    assert "unknown source 'nosuch'" in str(error), error
"""


def test_the_card_s_fourteenth_source_builds(with_fourteenth, tmp_path):
    copy, raw = with_fourteenth
    command = ("-m", "bench", "build", "myset", "--raw", str(raw), "--out", str(tmp_path / "out"))
    output = python(sys.executable, copy, *command, cache=tmp_path / "cache")
    assert "myset/test: 2 images and 480 points" in output
    rows = datasets.load_dataset(str(tmp_path / "out"), "myset", split="test", cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == ["a", "b"] and set(rows["points_depth"][0]) == {2.0}


def test_script_and_shards_on_datasets_3(with_fourteenth, tmp_path):
    if not DATASETS3.exists():
        pytest.skip(f"no environment with datasets 3.6 at {DATASETS3.parents[1]}; see the Makefile")
    copy, raw = with_fourteenth
    out, cache = str(tmp_path / "out"), tmp_path / "cache"
    command = ("-m", "bench", "build", "myset", "--raw", str(raw), "--out", out)
    python(sys.executable, copy, *command, cache=cache)
    old = python(DATASETS3, tmp_path, "-c", READ, out, "myset", cache=cache / "3")
    new = python(sys.executable, tmp_path, "-c", READ, out, "myset", cache=cache / "5")
    assert json.loads(old.splitlines()[-1]) == json.loads(new.splitlines()[-1])
    script = str(copy / "bench" / "depthvlm_bench.py")
    python(DATASETS3, tmp_path, "-c", SCRIPT, script, str(raw), "myset", out, cache=cache / "3")
