"""predict.py from end to end, as a person runs it, with the checkpoint at the repository's root."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def predict(*arguments, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "predict.py"), *map(str, arguments), "--output", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def read_ply(path):
    """Vertices of a binary PLY as `(N, 6)`, read by its own header."""
    data = path.read_bytes()
    header, body = data.split(b"end_header\n", 1)
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    record = struct.Struct("<fffBBB")
    assert len(body) == count * record.size
    return np.array(list(record.iter_unpack(body)))


def test_files_of_a_photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    run = predict(tmp_path / "photo.png", "--focal-length", 80, tmp_path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "90x60 px, focal length 80.0 px (given)" in run.stdout
    depth = np.asarray(Image.open(tmp_path / "out" / "photo_depth.png"))
    assert depth.dtype == np.uint16 and depth.shape == (60, 90) and depth.min() > 0
    low, middle, high = (float(word) for word in run.stdout.split("depth ")[1].split(" m ")[0].split(" / "))
    assert [low, middle, high] == pytest.approx(
        [depth.min() / 1e3, np.median(depth) / 1e3, depth.max() / 1e3], abs=0.006
    )
    cloud = read_ply(tmp_path / "out" / "photo.ply")
    np.testing.assert_array_equal(cloud[:, 3:], pixels.reshape(-1, 3))
    np.testing.assert_allclose(cloud[:, 2], depth.ravel() / 1e3, atol=0.00051)
    # a point projects to the pixel that it came from
    columns = np.tile(np.arange(90), 60)
    np.testing.assert_allclose(cloud[:, 0] / cloud[:, 2] * 80 + 44.5, columns, atol=1e-3)
    assert Image.open(tmp_path / "out" / "photo_color.png").mode in ("RGB", "RGBA")


def test_orientation_is_honoured_in_every_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: stored rows are columns
    Image.new("RGB", (96, 64), "red").save(tmp_path / "photo.jpg", exif=exif)
    run = predict(tmp_path / "photo.jpg", tmp_path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "64x96 px" in run.stdout and "(assumed)" in run.stdout
    assert Image.open(tmp_path / "out" / "photo_depth.png").size == (64, 96)


def test_answer_comes_with_the_map(tmp_path):
    Image.new("RGB", (96, 64), "blue").save(tmp_path / "photo.png")
    run = predict(tmp_path / "photo.png", "--ask", "How many posts are there?", tmp_path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "answer:" in run.stdout


def test_one_bad_photo_is_named_and_the_rest_goes_on(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 48), "green").save(tmp_path / folder / "same.png")
    (tmp_path / "bad.jpg").write_text("no image")
    photos = [tmp_path / "a" / "same.png", tmp_path / "bad.jpg", tmp_path / "b" / "same.png"]
    run = predict(*photos, tmp_path=tmp_path)
    assert run.returncode == 1
    assert "1 of 3 photos failed" in run.stderr and "bad.jpg" in run.stderr and "Traceback" not in run.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.ply")} == {"same.ply", "same-2.ply"}


def test_photos_that_are_too_much_for_memory_together_are_taken_one_by_one(tmp_path, monkeypatch, capsys):
    import predict as script

    def limited(model, processor, group, args):
        if len(group) > 1 or group[0].stem == "large":
            raise torch.OutOfMemoryError("out of memory, tried to allocate 900 GiB")
        return whole(model, processor, group, args)

    for name in ("small", "large", "other"):
        Image.new("RGB", (64, 48), "green").save(tmp_path / f"{name}.png")
    whole = script.predict
    monkeypatch.setattr(script, "predict", limited)
    photos = [str(tmp_path / f"{name}.png") for name in ("small", "large", "other")]
    monkeypatch.setattr(sys, "argv", ["predict.py", *photos, "--output", str(tmp_path / "out")])
    assert script.main() == 1
    assert "large.png: not enough memory; lower --max-pixels" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").glob("*.ply")} == {"small.ply", "other.ply"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--focal-length", "-3"], "focal_lengths[0] is -3.0"),
        (["--max-pixels", "10"], "max_pixels is 10"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, said, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    run = predict(tmp_path / "photo.png", *arguments, tmp_path=tmp_path)
    assert run.returncode in (1, 2)
    assert said in run.stderr and "Traceback" not in run.stderr
