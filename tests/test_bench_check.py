"""`bench check` over partial downloads: what is there is tried, what was not downloaded is said."""

import shutil

import numpy as np
import pytest
import test_bench_argoverse2 as argoverse2
import test_bench_nuscenes as nuscenes
import test_bench_scannetpp as scannetpp
import test_bench_taskonomy as taskonomy
import test_bench_waymo as waymo
from bench_fixtures_indoor import png16, put, write_omnidata_view

from bench.__main__ import main


def check(capsys, source, raw, *options):
    code = main(["check", source, "--raw", str(raw), *options])
    return code, capsys.readouterr().out


def write_nuscenes(raw, split):
    nuscenes.write_scenes(raw, {"train": "v1.0-trainval", "test": "v1.0-test"}[split], {"scene-0077": nuscenes.START})


def write_argoverse2(raw, split):
    argoverse2.write_log(raw, split)
    for camera in argoverse2.CAMERAS:  # the fixture's log has two of them
        assert (raw / split / argoverse2.LOG / "sensors/cameras" / camera).is_dir() == (camera in argoverse2.SIZES)


def write_waymo(raw, split):
    waymo.write_v2(raw, [waymo.make_frame()], {"train": "training", "test": "testing"}[split])


@pytest.mark.parametrize("source, write", [
    ("nuscenes", write_nuscenes), ("argoverse2", write_argoverse2), ("waymo", write_waymo)
])  # fmt: skip
@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
def test_one_split_is_a_correct_download(tmp_path, capsys, source, write, split, other):
    write(tmp_path, split)
    code, output = check(capsys, source, tmp_path)
    assert code == 0 and f"{source} looks right" in output and f"{other}: not in this folder (" in output
    code, output = check(capsys, source, tmp_path, "--split", split)
    assert code == 0 and other not in output.replace(str(tmp_path), "")
    code, output = check(capsys, source, tmp_path, "--split", other)
    assert code == 1 and f"{other}: not in this folder (" in output and "1 problems; expected:" in output


def test_neither_split_is_a_problem(tmp_path, capsys):
    write_nuscenes(tmp_path, "test")
    (tmp_path / "v1.0-test").rename(tmp_path / "v1.0-mini")
    code, output = check(capsys, "nuscenes", tmp_path)
    assert code == 1 and "1 problems" in output


@pytest.mark.parametrize("part, split_file, rows", [
    ("taskonomy", taskonomy.SPLIT_FILE, ["id,train", "ant,1", "bee,1", "cow,1"]),
    ("hm3d", "metadata.csv", ["scene,split", "ant,train", "bee,train", "cow,train"]),
])  # fmt: skip
def test_the_first_building_that_is_there_is_tried(tmp_path, capsys, part, split_file, rows):
    put(tmp_path / split_file, "\n".join(rows))
    write_omnidata_view(tmp_path, part, "bee", "point_0_view_0", 1.0, depth=False)  # unpacked in part
    write_omnidata_view(tmp_path, part, "cow", "point_0_view_0", 1.0)
    code, output = check(capsys, part, tmp_path)
    assert code == 0 and "train: cow/point_0_view_0: image 64x64" in output
    assert "before it, 2 not complete: [Errno 2]" in output and f"rgb/{part}/ant" in output
    shutil.rmtree(tmp_path / "rgb" / part / "cow")
    code, output = check(capsys, part, tmp_path)
    assert code == 1 and "train: [Errno 2]" in output


def test_a_scene_that_was_not_downloaded_is_passed_over_and_a_damaged_one_is_not(tmp_path, capsys):
    first, second = scannetpp.PNG, scannetpp.VAL
    put(tmp_path / "splits/nvs_sem_train.txt", f"{first}\n{second}\n")
    put(tmp_path / "splits/nvs_sem_val.txt", f"{second}\n")
    depth = scannetpp.write_scene(tmp_path, second, (0,)) / "depth/frame_000000.png"
    put(depth, png16(scannetpp.millimetres(0)))
    code, output = check(capsys, "scannetpp", tmp_path)
    assert code == 0 and f"train: {second}/frame_000000: image 1920x1440" in output and first in output
    put(depth, png16(np.zeros((192, 256))))
    code, output = check(capsys, "scannetpp", tmp_path)
    assert code == 1 and f"train: frame {second}/frame_000000: {second}/frame_000000: no depth within" in output
    put(depth, b"damaged")
    code, output = check(capsys, "scannetpp", tmp_path, "--split", "test")
    assert code == 1 and "is not a readable JPEG or PNG" in output
