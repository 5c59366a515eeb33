"""Prediction over many photos on one machine: inputs, plans, rows and resuming; without Ray."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster import __main__ as command_line
from cluster import inputs, plan
from cluster.inputs import Input, list_photos, read_photos
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

ROOT = Path(__file__).resolve().parent.parent
FOCAL = 200.0


def jpeg(seed, size=(96, 64), exif=None):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    options = {} if exif is None else {"exif": exif}
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "jpeg", **options)
    return file.getvalue()


def write_folder(folder, count=10, broken=()):
    for number in range(count):
        content = b"no image" if number in broken else jpeg(number, [(96, 64), (64, 96)][number % 2])
        path = folder / f"{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "notes.txt").write_text("not a photo")
    (folder / ".hidden.jpg").write_bytes(jpeg(99))
    return folder


def predict(photos, out, *arguments):
    """The command's exit code, in this process."""
    options = ["--model", str(ROOT), "--out", str(out), "--shard-size", "4", *map(str, arguments)]
    return command_line.main(["predict", str(photos), *options])


def rows_of(out):
    return pq.read_table(out / "shards").to_pylist()


def metres(row):
    return np.asarray(Image.open(io.BytesIO(row["depth"]["bytes"]))) / row["depth_scale"]


@pytest.fixture(autouse=True)
def threads_of_other_tests():
    """A plan's number of threads holds for the process, here that of the tests that follow too."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected():
    """Depth of a photo at a focal length, by the model and the processor alone."""
    processor = DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)
    model = DepthVLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()

    def depth(content, focal_length=FOCAL):
        batch = processor(images=[content], focal_lengths=focal_length, return_tensors="pt")
        with torch.inference_mode():
            return processor.post_process_depth_estimation(model(**batch))[0]["predicted_depth"].numpy()

    return depth


def test_rows_of_a_folder(tmp_path, capsys, expected):
    photos = write_folder(tmp_path / "photos", broken=(4,))
    assert predict(photos, tmp_path / "out", "--focal-length", FOCAL, "--dtype", "float32") == 0
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == sorted(f"{number % 3}/{number:02d}.jpg" for number in range(10))
    for row in rows:
        if row["id"] == "1/04.jpg":
            assert row["status"] == "failed" and row["reason"].startswith("cannot be read as an image")
            assert {row[name] for name in row if name not in ("id", "status", "reason")} == {None}
            continue
        depth = expected((photos / row["id"]).read_bytes())
        assert (row["status"], row["reason"], row["answer"]) == ("ok", None, None)
        assert (row["height"], row["width"]) == depth.shape == metres(row).shape
        np.testing.assert_allclose(metres(row), depth, rtol=1e-4, atol=0.51 / row["depth_scale"])
        assert (row["fx"], row["fy"], row["focal_length_source"]) == (FOCAL, FOCAL, "given")
        assert (row["cx"], row["cy"]) == ((row["width"] - 1) / 2, (row["height"] - 1) / 2)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["photos"], summary["failed"], summary["shards"]) == (10, 1, 3)
    printed = capsys.readouterr().out
    assert "10 photos in 3 shards" in printed and "failed 1/04.jpg" in printed and "images/s" in printed


def test_load_dataset_decodes_the_depth(tmp_path):
    photos = write_folder(tmp_path / "photos", count=3)
    predict(photos, tmp_path / "out", "--focal-length", FOCAL)
    files = str(tmp_path / "out" / "shards" / "*.parquet")
    opened = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, raw in zip(opened, rows_of(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(np.asarray(row["depth"]) / row["depth_scale"], metres(raw))


def test_the_farthest_pixel_is_not_cut_off():
    from cluster.predict import encode_depth

    depth = np.geomspace(0.001, 900, 64, dtype=np.float32).reshape(8, 8)
    stored = encode_depth(depth)
    decoded = metres({"depth": stored["depth"], "depth_scale": stored["depth_scale"]})
    assert decoded.min() > 0 and decoded.max() == pytest.approx(900)
    np.testing.assert_allclose(decoded, depth, atol=1.01 * 900 / 65535)


def test_maps_at_the_size_that_the_network_works_at(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.jpg").write_bytes(jpeg(0, (480, 320)))
    predict(tmp_path / "photos", tmp_path / "out", "--focal-length", 1000, "--depth-size", "processed")
    (row,) = rows_of(tmp_path / "out")
    assert (row["width"], row["height"], row["fx"]) == (480, 320, 1000)
    assert metres(row).shape == (64, 96)


def test_an_answer_comes_with_the_map(tmp_path):
    photos = write_folder(tmp_path / "photos", count=2, broken=(1,))
    question = ["--ask", "How many posts are there?", "--max-new-tokens", 4]
    assert predict(photos, tmp_path / "out", "--focal-length", FOCAL, *question) == 0
    good, bad = rows_of(tmp_path / "out")
    assert isinstance(good["answer"], str) and good["answer"] == good["answer"].strip() and bad["answer"] is None


def test_focal_lengths_are_given_from_exif_or_assumed(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {41989: 50}  # 35 mm equivalent
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "photos" / "b.jpg").write_bytes(jpeg(1, exif=exif))
    predict(tmp_path / "photos", tmp_path / "out")
    a, b = rows_of(tmp_path / "out")
    assert a["focal_length_source"] == "assumed" and b["focal_length_source"] == "exif"
    assert b["fx"] == pytest.approx(50 / np.hypot(36, 24) * np.hypot(96, 64))


# The same bytes, however the work is cut


def files_of(out):
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def test_jobs_of_an_array_write_what_one_process_writes(tmp_path):
    photos = write_folder(tmp_path / "photos", broken=(2,))
    predict(photos, tmp_path / "one", "--focal-length", FOCAL)
    for job in (2, 0, 1):
        assert not (tmp_path / "three" / "summary.json").exists()
        assert predict(photos, tmp_path / "three", "--focal-length", FOCAL, "--shard-range", f"{job}/3") == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three") and len(files_of(tmp_path / "one")) == 3
    one, three = ((tmp_path / name / "summary.json").read_bytes() for name in ("one", "three"))
    assert one == three


def test_a_second_run_goes_on_and_a_third_does_nothing(tmp_path, monkeypatch, capsys):
    from cluster import predict as module

    photos = write_folder(tmp_path / "photos")
    predict(photos, tmp_path / "out", "--focal-length", FOCAL)
    before = files_of(tmp_path / "out")
    removed = sorted((tmp_path / "out" / "shards").iterdir())[1]
    removed.unlink()
    capsys.readouterr()
    predict(photos, tmp_path / "out", "--focal-length", FOCAL)
    assert files_of(tmp_path / "out") == before
    assert " 4 photos, " in capsys.readouterr().out
    monkeypatch.setattr(module, "Predictor", None)  # no model is loaded
    assert predict(photos, tmp_path / "out", "--focal-length", FOCAL) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--focal-length", 150], "focal_length 200.0 (now 150.0)"),
        (["--focal-length", FOCAL, "--ask", "How far?"], "question"),
        (["--focal-length", FOCAL, "--threads", 2], "threads 1 (now 2)"),
        (["--focal-length", FOCAL, "--batch-size", 3], "batch_size 4 (now 3)"),
    ],
)
def test_another_plan_is_refused(tmp_path, capsys, change, named):
    photos = write_folder(tmp_path / "photos", count=1)
    predict(photos, tmp_path / "out", "--focal-length", FOCAL)
    assert predict(photos, tmp_path / "out", *change) == 2
    assert named in capsys.readouterr().err


def test_other_photos_under_the_same_plan_are_refused(tmp_path, capsys):
    photos = write_folder(tmp_path / "photos", count=2)
    predict(photos, tmp_path / "out")
    (photos / "new.jpg").write_bytes(jpeg(7))
    assert predict(photos, tmp_path / "out") == 2
    assert "photos 2 (now 3)" in capsys.readouterr().err
    (photos / "0" / "00.jpg").unlink()  # as many as before, but not the same
    assert predict(photos, tmp_path / "out") == 2
    assert "listing" in capsys.readouterr().err


def test_other_versions_are_refused(tmp_path, monkeypatch, capsys):
    photos = write_folder(tmp_path / "photos", count=1)
    predict(photos, tmp_path / "out")
    monkeypatch.setattr(plan, "version", lambda name: "0.1")
    assert predict(photos, tmp_path / "out") == 2
    assert "now {'torch': '0.1'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="install the same versions on all nodes"):
        plan.open_plan(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-pixels", 10], "max_pixels is 10"),
        (["--ask", "See <|image_pad|>?"], "2 <|image_pad|> placeholders"),
    ],
)
def test_what_would_fail_for_every_photo_is_refused_before_the_plan(tmp_path, capsys, arguments, named):
    photos = write_folder(tmp_path / "photos", count=1)
    assert predict(photos, tmp_path / "out", *arguments) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_input_without_photos_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict(tmp_path / "empty", tmp_path / "out") == 2
    assert "has no photos of format images" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_plan_of_many_photos_reads_rows_across_its_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LISTED_TOGETHER", 3)
    photos = write_folder(tmp_path / "photos", count=8)
    settings = plan.Settings(Input(str(photos)), "m", "", "cpu", "auto", shard_size=5)
    begun = plan.begin(settings, tmp_path / "out")
    listed = list_photos(settings.source).to_pylist()
    assert begun.inputs(0) + begun.inputs(1) == listed and begun.shards == 2
    assert plan.open_plan(tmp_path / "out") == begun


# Inputs


def test_parquet_of_several_files_and_row_groups(tmp_path):
    folder, contents = tmp_path / "data", [jpeg(seed) for seed in range(7)]
    folder.mkdir()
    for name, part in (("a", contents[:5]), ("b", contents[5:])):
        images = [{"bytes": content, "path": None} for content in part]
        table = pa.table({"image": images, "f": [150.0 + len(content) % 7 for content in part]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    source = Input(str(folder), "parquet", focal_length_columns=("f",))
    listing = list_photos(source)
    names = [f"a.parquet#{row}" for row in range(5)] + ["b.parquet#0", "b.parquet#1"]
    assert listing["id"].to_pylist() == names
    rows = listing.to_pylist()
    assert [row["fx"] for row in rows] == [row["fy"] for row in rows] == [150.0 + len(c) % 7 for c in contents]
    assert read_photos(source, rows[3:6]) == contents[3:6] and read_photos(source, rows) == contents


def test_parquet_with_ids_pairs_of_focal_lengths_and_an_image_that_is_missing(tmp_path):
    images = pa.array([jpeg(0), None], pa.binary())
    table = pa.table({"photo": images, "name": ["x", "y"], "k": [[100.0, 120.0], None]})
    pq.write_table(table, tmp_path / "one.parquet")
    source = Input(str(tmp_path / "one.parquet"), "parquet", "photo", "name", ("k",))
    rows = list_photos(source).to_pylist()
    assert [(row["id"], row["fx"], row["fy"]) for row in rows] == [("x", 100.0, 120.0), ("y", None, None)]
    good, missing = read_photos(source, rows)
    assert good == jpeg(0) and isinstance(missing, ValueError) and "None" in str(missing)


def test_paths_within_parquet_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    images = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}]
    pq.write_table(pa.table({"image": images}), tmp_path / "one.parquet")
    assert predict(tmp_path / "one.parquet", tmp_path / "out", "--format", "parquet") == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["status"] == "failed" and "not an image's bytes" in row["reason"]


def test_webdataset_with_focal_lengths_in_json(tmp_path):
    def write(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    write("0.tar", {"a.jpg": jpeg(0), "a.json": b'{"fx": 120, "fy": 130}', "b.jpg": jpeg(1), "b.cls": b"3"})
    write("1.tar", {"a.json": b'{"fx": 90, "fy": 95}', "a.jpg": jpeg(2)})
    source = Input(str(tmp_path), "webdataset", focal_length_columns=("fx", "fy"))
    rows = list_photos(source).to_pylist()
    assert [row["id"] for row in rows] == ["0.tar/a.jpg", "0.tar/b.jpg", "1.tar/a.jpg"]
    assert [(row["fx"], row["fy"]) for row in rows] == [(120, 130), (None, None), (90, 95)]
    assert read_photos(source, rows) == [jpeg(0), jpeg(1), jpeg(2)]


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"x\.tar cannot be read as a tar"):
        list_photos(Input(str(tmp_path), "webdataset"))


def test_a_data_set_of_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"image": datasets.Image(), "f": datasets.Value("float64")})
    rows = {"image": [{"bytes": jpeg(seed), "path": None} for seed in range(5)], "f": [100.0 + k for k in range(5)]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "test.parquet")
    source = Input(str(tmp_path / "data"), "dataset", focal_length_columns=("f",), split="test")
    listed = list_photos(source).to_pylist()
    assert [(row["id"], row["fx"]) for row in listed] == [(str(k), 100.0 + k) for k in range(5)]
    assert [photo["bytes"] for photo in read_photos(source, listed[2:4])] == [jpeg(2), jpeg(3)]


def test_a_bucket(tmp_path):
    """Any file system of fsspec; this one lies in memory."""
    import fsspec

    bucket = fsspec.filesystem("memory")
    for number in range(3):
        bucket.pipe(f"/bucket/photos/{number}.jpg", jpeg(number))
    try:
        assert predict("memory://bucket/photos", tmp_path / "out", "--focal-length", FOCAL) == 0
        assert [row["id"] for row in rows_of(tmp_path / "out")] == ["0.jpg", "1.jpg", "2.jpg"]
        source = Input("memory://bucket/photos")
        rows = list_photos(source).to_pylist()
        bucket.rm("/bucket/photos/1.jpg")
        first, missing, last = read_photos(source, rows)
        assert (first, last) == (jpeg(0), jpeg(2)) and isinstance(missing, FileNotFoundError)
    finally:
        bucket.rm("/bucket", recursive=True)


def test_a_fault_of_the_file_system_is_no_fault_of_the_photo(tmp_path, monkeypatch):
    photos = write_folder(tmp_path / "photos", count=2)
    source = Input(str(photos))
    rows = list_photos(source).to_pylist()

    def fail(paths, on_error):
        return {path: OSError("the network is down") for path in paths}

    opened = inputs._file_system(source)
    monkeypatch.setattr(type(opened), "cat", lambda self, paths, on_error: fail(paths, on_error))
    with pytest.raises(OSError, match="network is down"):
        read_photos(source, rows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image-column", "photo"], "has no column photo; it has image, f"),
        (["--id-column", "f"], "1 ids of"),
        (["--focal-length-column", "g"], "has no column g"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, capsys, arguments, named):
    rows = {"image": [jpeg(0), jpeg(1)], "f": [1.0, 1.0]}
    pq.write_table(pa.table(rows), tmp_path / "one.parquet")
    assert predict(tmp_path / "one.parquet", tmp_path / "out", "--format", "parquet", *arguments) == 2
    assert named in capsys.readouterr().err


# Without Ray


def test_without_ray_one_sentence_names_the_line_to_install_it(tmp_path):
    """Neither command imports Ray where it is not asked for; where it is, its absence is an error of one line."""
    photos = write_folder(tmp_path / "photos", count=1)
    options = ["--model", str(ROOT), "--out", str(tmp_path / "out")]
    commands = [["predict", str(photos), *options], ["predict", str(photos), *options, "--shard-size", "9", "--ray"]]
    commands[1][5] += "-new"
    code = f"""
import sys
sys.modules["ray"] = None
from cluster.__main__ import main
for command in {[*commands, ["serve", "--model", str(ROOT)]]}:
    print(main(command), file=sys.stderr)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    line = "error: Ray is missing: pip install 'depthvlm[ray]'"
    assert [text for text in run.stderr.splitlines() if text == line or text.isdecimal()] == ["0", line, "2", line, "2"]
    assert "Traceback" not in run.stderr


# Costs


def test_the_cost_of_a_build_is_of_its_files():
    from cluster.efficiency import build_cost

    cost = build_cost(4, (96, 64), (48, 32), valid=0.5)
    assert cost["frames"] == 4 and cost["core_seconds_per_frame"] > 0
    assert cost["of_which_photo"] < cost["bytes_per_frame"] < cost["of_which_photo"] + 2 * 48 * 32 + 20_000  # Parquet's
