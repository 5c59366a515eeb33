"""A plain RGB-D folder as a source: what is built of it is what training reads of it."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from test_own_data import write_folder
from test_train_data import make_row, png

from bench.__main__ import main
from training.data import DataArguments, read_sample


def built(out) -> dict:
    (file,) = (out / "folder").glob("test-*.parquet")
    return datasets.load_dataset("parquet", data_files=str(file), split="train")[0]


@pytest.mark.parametrize("depth_scale", [1000, 256.0, 5000])
def test_a_built_folder_has_its_depth_to_the_value(tmp_path, depth_scale):
    """At any scale, from the least value to 65534; 65535, where 16 bits end, and 0 are no measurement."""
    values = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)
    values[:2] = np.linspace(65406, 65535, 128).reshape(2, 64)
    raw = write_folder(tmp_path / "own", [make_row(0, words=values)], depth_scale=depth_scale, focal_length=150.5)
    assert main(["build", "folder", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    row = built(tmp_path / "out")
    assert row["id"] == "000" and row["depth_scale"] == depth_scale
    assert [row[name] for name in ("fx", "fy", "cx", "cy")] == [150.5, 150.5, 31.5, 23.5]
    assert np.array_equal(np.asarray(row["depth"]), np.where(values == 65535, 0, values))
    assert len(row["points_depth"]) and set(row["points_depth"]) <= set((values / depth_scale).ravel().tolist())
    (source,) = DataArguments(datasets=[{"path": str(raw)}]).datasets
    (stored,) = source.open().take(1)
    sample = read_sample(stored, source, np.random.default_rng(0))
    assert np.array_equal(sample["images"][0], row["image"]) and sample["focal_lengths"] == [150.5]
    known = (values > 0) & (values < 65535)
    assert np.array_equal(
        sample["depth_maps"][0][known], (np.asarray(row["depth"]) / depth_scale).astype(np.float32)[known]
    )


def test_a_frame_that_lacks_something_is_listed(tmp_path, capsys):
    raw = write_folder(
        tmp_path / "own", [make_row(i) for i in range(4)], focal_length={"000": 200.0, "002": 200.0, "003": 4}
    )
    (raw / "depth" / "002.png").unlink()
    (raw / "depth" / "003.png").write_bytes(png(np.zeros((48, 64), np.uint8))["bytes"])
    assert main(["build", "folder", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    skipped = {
        one["id"]: one["reason"] for one in json.loads((tmp_path / "out/folder/test.json").read_text())["skipped"]
    }
    assert "neither camera.json nor EXIF data state its focal length" in skipped["001"]
    assert "depth/002.png" in skipped["002"] and "16-bit" in skipped["003"]


def test_focal_lengths_of_exif_are_built(tmp_path):
    raw = write_folder(tmp_path / "own", [make_row(0)], focal_length="exif")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[41989] = 27
    Image.open(raw / "rgb" / "000.png").save(raw / "rgb" / "000.jpg", exif=exif)
    (raw / "rgb" / "000.png").unlink()
    assert main(["build", "folder", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    row = built(tmp_path / "out")
    assert row["fx"] == pytest.approx(27 / np.hypot(36, 24) * 80)


def test_check_says_what_a_folder_lacks(tmp_path, capsys):
    raw = write_folder(tmp_path / "own", [make_row(0)])
    assert main(["check", "folder", "--raw", str(raw)]) == 0 and "folder looks right" in capsys.readouterr().out
    (raw / "camera.json").unlink()
    assert main(["check", "folder", "--raw", str(raw)]) == 2
    assert "has no camera.json" in capsys.readouterr().err
