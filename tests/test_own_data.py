"""Data as people have them: every form gives what Parquet with images gives; the README's section runs."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
import yaml
from fixed_batches import byte_processor
from PIL import Image
from test_train_data import make_row, png
from test_train_script import run_here

from bench.sources.procedural.source import render
from training.data import DataArguments, open_sample, read_sample
from training.encoding import Encoder
from training.folder import RGBDFolder
from training.rows import ParquetRows

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [("What is it?", "a room"), ("Sure?", "yes")]
ROWS = 5


def picture(index: int) -> bytes:
    return make_row(index, size=(70 + 20 * index, 60))["image"]["bytes"]


def parts(index, image) -> list[dict]:
    """OpenAI's and Qwen's messages."""
    messages = []
    for number, (question, answer) in enumerate(QUESTIONS):
        content = [{"type": "text", "text": f"{question} {index}"}]
        messages.append({"role": "user", "content": [image, *content] if number == 0 else content})
        messages.append({"role": "assistant", "content": answer})
    return messages


def llava(index) -> dict:
    turns = []
    for number, (question, answer) in enumerate(QUESTIONS):
        place = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": f"{place}{question} {index}"}, {"from": "gpt", "value": answer}]
    return {"id": index, "image": f"pictures/{index}.png", "conversations": turns}


def openai(index) -> dict:
    url = f"data:image/png;base64,{base64.b64encode(picture(index)).decode()}"
    return {"messages": parts(index, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}})}


def qwen(index) -> dict:
    return {"messages": parts(index, {"type": "image", "image": f"pictures/{index}.png"})}


def trl(index) -> dict:
    messages = parts(index, None)
    messages[0] = {"role": "user", "content": messages[0]["content"][1]["text"]}
    return {"messages": messages, "images": [f"pictures/{index}.png"]}


def prompt_and_completion(index) -> dict:
    *prompt, completion = parts(index, {"type": "image"})
    return {"prompt": prompt, "completion": [completion], "images": [f"pictures/{index}.png"]}


def text_only(index) -> dict:
    return {"messages": parts(index, None)[2:]}


FORMS = [llava, openai, qwen, trl, prompt_and_completion, text_only]
TURN = {
    "role": datasets.Value("string"),
    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
}
FEATURES = datasets.Features({"messages": datasets.List(TURN), "images": datasets.List(datasets.Image())})


def reference_rows(form) -> list[dict]:
    """The same conversations, with the images in the rows, as the one form that could always be read."""
    rows = []
    for index in range(ROWS):
        messages = parts(index, {"type": "image", "text": None})
        for turn in messages[1::2]:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        images = [{"bytes": picture(index), "path": None}]
        rows.append(
            {"messages": messages[2:], "images": []} if form is text_only else {"messages": messages, "images": images}
        )
    return rows


def write_pictures(folder: Path) -> Path:
    (folder / "pictures").mkdir(parents=True)
    for index in range(ROWS):
        (folder / "pictures" / f"{index}.png").write_bytes(picture(index))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of pictures, of each form's JSON lines, and of the reference for each."""
    folder = write_pictures(tmp_path_factory.mktemp("instructions"))
    for form in FORMS:
        rows = [form(index) for index in range(ROWS)]
        (folder / f"{form.__name__}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / f"{form.__name__}.json").write_text(json.dumps(rows, indent=1))
        reference = datasets.Dataset.from_list(reference_rows(form), features=FEATURES)
        reference.to_parquet(folder / f"{form.__name__}_reference.parquet")
    return folder


def encoded(**entry) -> list[dict]:
    """All rows of a data set as model inputs."""
    (source,) = DataArguments(datasets=[{"kind": "instruction"} | entry]).datasets
    encode = Encoder(byte_processor())
    return [encode(read_sample(row, source, np.random.default_rng(0))) for row in source.open().take(99)]


def assert_same(rows: list[dict], others: list[dict]):
    assert len(rows) == len(others) == ROWS
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"depth_labels"}:
            assert torch.equal(row[name], other[name]), name
        for label, expected in zip(row["depth_labels"], other["depth_labels"], strict=True):
            assert (label is None and expected is None) or torch.equal(label, expected)


# Forms and containers


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_parquet_with_images_is(root, form, suffix):
    rows = encoded(path=str(root / f"{form.__name__}.{suffix}"), image_root=str(root))
    assert_same(rows, encoded(path=str(root / f"{form.__name__}_reference.parquet")))


def test_every_container_is_what_the_file_is(root, tmp_path):
    expected = encoded(path=str(root / "llava_reference.parquet"))
    rows = [llava(index) for index in range(ROWS)]
    lines = "\n".join(map(json.dumps, rows))
    stored = datasets.Dataset.from_list(rows)
    stored.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": stored}).save_to_disk(tmp_path / "splits")
    stored.to_parquet(tmp_path / "paths.parquet")
    datasets.Dataset.from_list(reference_rows(llava), features=FEATURES).save_to_disk(tmp_path / "with_images")
    for name in ("folder", "named"):
        write_pictures(tmp_path / name)
        (tmp_path / name / "train.jsonl").write_text("\r\n".join(["", *map(json.dumps, rows), ""]))
    (tmp_path / "bom.json").write_text(lines, encoding="utf-8-sig")
    here = {"image_root": str(root)}
    for entry in (
        {"path": str(tmp_path / "saved"), **here},
        {"path": str(tmp_path / "splits"), **here},
        {"path": str(tmp_path / "with_images")},
        {"path": str(tmp_path / "paths.parquet"), **here},
        {"path": str(tmp_path / "bom.json"), **here},
        {"path": str(tmp_path / "folder")},  # its pictures are its own
        {"path": str(tmp_path / "named"), "data_files": "train.jsonl"},
        {"path": "json", "data_files": {"train": str(root / "llava.jsonl")}, **here},
    ):
        assert_same(encoded(**entry), expected)


def test_other_formats_are_read_by_load_dataset(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n1+1?,two\n2+2?,four\n")
    for entry in ({"path": "csv", "data_files": str(tmp_path / "rows.csv")}, {"path": str(tmp_path)}):
        answers = [row["labels"][row["labels"] != -100] for row in encoded(**entry)]
        assert byte_processor().batch_decode(answers) == ["two<|im_end|>", "four<|im_end|>"]


def test_parquet_is_read_where_it_lies(root):
    """Through `fsspec`, as files of the Hub are: here from memory."""
    fsspec.filesystem("memory").pipe("/rows.parquet", (root / "llava_reference.parquet").read_bytes())
    rows = ParquetRows(["memory://rows.parquet"], ("messages", "images", "points"))
    assert rows.columns == ["messages", "images"] and rows.sizes.tolist() == [ROWS]
    assert rows.read(0)[1]["images"][0]["bytes"] == picture(1)
    assert rows.name(0, 1) == "memory://rows.parquet, row group 0, row 1"


def test_mixed_contents_that_datasets_stores_as_json(root, tmp_path):
    """Strings and lists of parts in one column: `datasets` 5 stores them as JSON in Arrow and Parquet."""
    mixed = datasets.load_dataset("json", data_files=str(root / "openai.jsonl"), split="train")
    mixed.to_parquet(tmp_path / "mixed.parquet")
    mixed.save_to_disk(tmp_path / "mixed")
    for name in ("mixed.parquet", "mixed"):
        assert_same(encoded(path=str(tmp_path / name)), encoded(path=str(root / "openai_reference.parquet")))


@pytest.mark.parametrize(
    "image", [picture(0), {"bytes": picture(0), "path": None}, Image.open(io.BytesIO(picture(0))), "pictures/0.png"]
)
def test_images_are_bytes_paths_or_pil(root, image):
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction", "image_root": str(root)}]).datasets
    row = {"prompt": "What?", "completion": "a room", "image": image}
    sample = read_sample(row, source, np.random.default_rng(0))
    assert np.array_equal(sample["images"][0], np.asarray(Image.open(io.BytesIO(picture(0)))))


def test_images_stand_where_the_text_places_them():
    """The second picture in the second question, the first, which has no size of its own, before the text."""
    row = {
        "images": [{"bytes": picture(index), "path": None} for index in range(2)],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is <image> here?"},
            {"from": "gpt", "value": "<image> is what you wrote"},
            {"from": "human", "value": "And this?<image>"},
            {"from": "gpt", "value": "a wall"},
        ],
    }
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction"}]).datasets
    sample = read_sample(row, source, np.random.default_rng(0))
    assert [image.size for image in sample["images"]] == [(70, 60), (90, 60)]
    contents = [[part.get("text", "*") for part in turn["content"]] for turn in sample["messages"]]
    assert contents[1:] == [["What is", "*", "here?"], ["<image> is what you wrote"], ["And this?", "*"], ["a wall"]]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [{"role": "user", "content": "1+1?"}]}, "without an answer of the assistant"),
        ({"text": "It was a dark night."}, "holds text but no messages, conversations or prompt and completion"),
        ({"prompt": "1+1?", "completion": 2}, "completion is 2; it must be text or a list of messages"),
        ({"prompt": "<image>?", "completion": "no"}, "1 images are placed in the messages but 0 are given"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "role is 'tool'; it must be system, user or assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "part of type 'video'; text and images are trained on",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 9}]}]},
            "an image in a message has max_pixels",
        ),
        ({"image": "http://a.b/c.png", "prompt": "?", "completion": "no"}, "URL 'http://a.b/c.png'; download it"),
        ({"image": "data:image/png,xyz", "prompt": "?", "completion": "no"}, "it must be base64"),
    ],
)
def test_rows_that_teach_nothing_are_refused(row, reason):
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction", "image_root": "."}]).datasets
    with pytest.raises(ValueError, match=reason):
        read_sample(row, source, np.random.default_rng(0))


def test_nothing_is_read_outside_image_root(tmp_path):
    folder = write_pictures(tmp_path / "root")
    (tmp_path / "secret.png").write_bytes(picture(0))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction", "image_root": str(folder)}]).datasets
    for image in ("../secret.png", "pictures/../../secret.png", str(tmp_path / "secret.png"), "link.png"):
        for form in ({"image": image}, {"images": [{"bytes": None, "path": image}]}):
            with pytest.raises(ValueError, match="leads out of .*; only files below it are read"):
                open_sample(form | {"prompt": "?", "completion": "no"}, source, np.random.default_rng(0))
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction"}]).datasets
    with pytest.raises(ValueError, match="is the path 'pictures/0.png', but the data set states no image_root"):
        open_sample({"image": "pictures/0.png", "prompt": "?", "completion": "no"}, source, np.random.default_rng(0))


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"a": 1}\n{"a": 2', "holds neither one JSON object per line nor a list of them"),
        ('["a", "b"]', "every row must be a JSON object"),
        ('{"data": [{"a": 1}]}', "has no column messages or conversations or completion, prompt"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, content, reason):
    (tmp_path / "rows.json").write_text(content)
    (source,) = DataArguments(datasets=[{"path": str(tmp_path / "rows.json"), "kind": "instruction"}]).datasets
    with pytest.raises(ValueError, match=reason):
        list(source.open().take(2))


def test_paths_and_splits_that_are_not_there(tmp_path, root):
    (tmp_path / "rows.txt").write_text("")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([llava(0)])}).save_to_disk(tmp_path / "splits")
    for entry, reason in (
        ({"path": str(tmp_path / "rows.txt")}, "is neither .json, .jsonl nor .parquet"),
        ({"path": str(tmp_path / "splits"), "split": "test"}, "has no split 'test'; it has train"),
        ({"path": str(root), "data_files": "llava.jsonl", "split": "val"}, "has no split 'val'; it has train"),
    ):
        (source,) = DataArguments(datasets=[entry | {"kind": "instruction"}]).datasets
        with pytest.raises(ValueError, match=reason):
            source.open()


# A plain RGB-D folder


def write_folder(path: Path, rows: list[dict], **camera) -> Path:
    for name in ("rgb", "depth"):
        (path / name).mkdir(parents=True)
    for index, row in enumerate(rows):
        (path / "rgb" / f"{index:03d}.png").write_bytes(row["image"]["bytes"])
        (path / "depth" / f"{index:03d}.png").write_bytes(row["depth"]["bytes"])
    (path / "camera.json").write_text(json.dumps({"depth_scale": 1000, "focal_length": 200.0} | camera))
    return path


def folder_focal_lengths(path: Path) -> list:
    folder = RGBDFolder(path)
    return [folder.focal_length(name) for name in folder.names]


def test_plain_folder_is_what_the_benchmarks_rows_are(tmp_path):
    rows = [make_row(index, fx=180.0 + index) for index in range(ROWS)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    folder = write_folder(tmp_path / "own", rows, focal_length={f"{i:03d}": 180.0 + i for i in range(ROWS)})
    expected = encoded(path=str(tmp_path / "rows.parquet"), kind="depth")
    assert_same(encoded(path=str(folder), kind="depth"), expected)
    assert all(label.any() for row in expected for label in row["depth_labels"])
    (source,) = DataArguments(datasets=[{"path": str(folder)}]).datasets
    sizes = source.open().sizes
    assert (sizes.sum(), len(sizes)) == (ROWS, 1) and source.label == "own"


def test_focal_lengths_of_a_folder(tmp_path):
    per_name = {"000": 150.0, "001": 160.0}
    rows = [make_row(index) for index in range(2)]
    assert folder_focal_lengths(write_folder(tmp_path / "one", rows, focal_length=170)) == [170, 170]
    for name in ("file.json", "file.csv"):
        folder = write_folder(tmp_path / name, rows, focal_length=f"lengths{Path(name).suffix}")
        with open(folder / f"lengths{Path(name).suffix}", "w", newline="") as file:
            if name == "file.json":
                json.dump(per_name, file)
            else:
                csv.writer(file).writerows([("focal_length", "name"), *((px, key) for key, px in per_name.items())])
        assert folder_focal_lengths(folder) == [150.0, 160.0]


def test_focal_lengths_from_exif(tmp_path):
    """27 mm on a film of 36 x 24 mm: 64 px wide, 48 high, 80 px of diagonal."""
    folder = write_folder(tmp_path / "own", [make_row(0), make_row(1)], focal_length="exif")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[41989] = 27
    Image.open(folder / "rgb" / "000.png").save(folder / "rgb" / "000.jpg", exif=exif)
    (folder / "rgb" / "000.png").unlink()
    (source,) = DataArguments(datasets=[{"path": str(folder)}]).datasets
    first, second = source.open().take(2)
    sample = read_sample(first, source, np.random.default_rng(0))
    assert sample["focal_lengths"] == [pytest.approx(27 / np.hypot(36, 24) * 80)]
    with pytest.raises(ValueError, match="EXIF data state no focal length; give px in camera.json"):
        read_sample(second, source, np.random.default_rng(0))


def test_frames_that_lack_a_file_are_refused_one_by_one(tmp_path):
    folder = write_folder(tmp_path / "own", [make_row(index) for index in range(3)])
    (folder / "rgb" / "000.png").unlink()
    (folder / "depth" / "001.png").unlink()
    (folder / "rgb" / ".DS_Store").write_bytes(b"")
    (source,) = DataArguments(datasets=[{"path": str(folder)}]).datasets
    rows = list(source.open().take(9))
    assert [row["id"] for row in rows] == ["000", "001", "002"]
    for row, file in zip(rows, ("rgb/000", "depth/001.png"), strict=False):
        with pytest.raises(FileNotFoundError, match=file):
            read_sample(row, source, np.random.default_rng(0))
    read_sample(rows[2], source, np.random.default_rng(0))


def test_a_turned_image_is_not_paired_with_its_depth(tmp_path):
    folder = write_folder(tmp_path / "own", [make_row(0)])
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(folder / "rgb" / "000.png").save(folder / "rgb" / "000.png", exif=exif)
    (source,) = DataArguments(datasets=[{"path": str(folder)}]).datasets
    (row,) = source.open().take(1)
    with pytest.raises(ValueError, match="save both upright"):
        read_sample(row, source, np.random.default_rng(0))


@pytest.mark.parametrize(
    "camera, reason",
    [
        (None, "has no camera.json; see the README"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ('{"depth_scale": 1000}', "lacks focal_length"),
        ('{"depth_scale": 0, "focal_length": 9}', "depth_scale in .* is 0; give the values per metre"),
        ('{"depth_scale": 1000, "focal_length": -1}', "focal_length in .* is -1; give px"),
    ],
)
def test_a_folder_without_its_facts_is_refused(tmp_path, camera, reason):
    folder = write_folder(tmp_path / "own", [make_row(0)])
    (folder / "camera.json").unlink()
    if camera is not None:
        (folder / "camera.json").write_text(camera)
    with pytest.raises(ValueError, match=reason):
        DataArguments(datasets=[{"path": str(folder)}]).datasets[0].open()


# Runs


def losses(output: Path) -> list[dict]:
    """What was logged of each step, but for times."""
    states = sorted(
        output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    history = json.loads(states[-1].read_text())["log_history"]
    return [{name: entry[name] for name in entry if "loss" in name} for entry in history if "loss" in entry]


def settings(output: Path, **entry) -> dict:
    return {
        "model_name_or_path": str(ROOT),
        "output_dir": str(output),
        "trains": ["language_model", "lm_head", "depth_head"],
        "datasets": [entry | {"label": "own"}],
        "max_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_every_form_is_the_run_of_its_reference(root, form, tmp_path):
    """From the tiny checkpoint at the root: the losses of each step, to the bit."""
    entry = {"path": str(root / f"{form.__name__}.jsonl"), "kind": "instruction", "image_root": str(root)}
    run_here(settings(tmp_path / "form", **entry))
    run_here(
        settings(tmp_path / "reference", path=str(root / f"{form.__name__}_reference.parquet"), kind="instruction")
    )
    assert losses(tmp_path / "form") == losses(tmp_path / "reference") and len(losses(tmp_path / "form")) == 3


def test_a_run_of_a_plain_folder_is_the_run_of_its_reference(tmp_path):
    rows = [make_row(index, size=(96, 64)) for index in range(ROWS)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    run_here(settings(tmp_path / "form", path=str(write_folder(tmp_path / "own", rows))))
    run_here(settings(tmp_path / "reference", path=str(tmp_path / "rows.parquet")))
    assert losses(tmp_path / "form") == losses(tmp_path / "reference") and len(losses(tmp_path / "form")) == 3


def test_the_readmes_section_runs(tmp_path):
    """Its files are made as it says, of rendered frames; its commands are run as they stand, at a copy of the root."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own data")[1].split("\n## ")[0]
    (camera,), (recipe,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("json", "yaml"))
    table = re.findall(r"^\| (\w+) \| `(\{.*\})` \|$", section, re.MULTILINE)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "results", "tests"):
            (tmp_path / path.name).symlink_to(path)
    for folder, split in (("own", "train"), ("own-held-out", "test")):
        for name in ("rgb", "depth"):
            (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / "camera.json").write_text(camera)
        for index, name in enumerate(("a", "b", "c")):
            frame = render(split, index)
            Image.fromarray(frame.image).save(tmp_path / folder / "rgb" / f"{name}.jpg")
            (tmp_path / folder / "depth" / f"{name}.png").write_bytes(
                png((frame.depth * 1000).astype(np.uint16))["bytes"]
            )
    url = base64.b64encode((tmp_path / "own" / "rgb" / "a.jpg").read_bytes()).decode()
    rows = [json.loads(row.replace("data:image/png;base64,...", f"data:image/jpeg;base64,{url}")) for _, row in table]
    assert len(rows) == 4 and "`" + json.dumps({"type": "image", "image": "rgb/a.jpg"}) + "`" in section
    (tmp_path / "own" / "chats.json").write_text(json.dumps(rows))
    (tmp_path / "own.yaml").write_text(recipe)
    commands = re.findall(r"^    python (.*)$", section, re.MULTILINE)
    assert len(commands) == 3 and set(yaml.safe_load(recipe)["datasets"][1]) == {
        "path",
        "kind",
        "image_root",
        "max_pixels",
    }
    for command in commands:
        run = subprocess.run(
            [sys.executable, *command.split()],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    assert not (tmp_path / "output" / "own" / "unreadable.jsonl").exists()
    assert "delta1" in (tmp_path / "output" / "own-scores" / "summary.json").read_text()
