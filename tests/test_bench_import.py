import json
import math
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
from bench_fixtures_toy import Toy, encoded, picture
from PIL import Image

from bench import build, released
from bench.annotations import AnnotationReader, import_annotations

SHARED = Path(__file__).parents[2] / "shared" / "data"
W, H, w, h = 40, 24, 20, 12  # image and depth map


class Waymo(Toy):
    name = "waymo"
    depth_range = (0.5, 50.0)


class Nyu(Toy):
    name = "nyuv2"
    depth_range = (0.5, 10.0)


class Ibims(Toy):
    name = "ibims1"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    (tmp_path / "depths").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(picture(0), "PNG"))
    (tmp_path / "depths" / "a.png").write_bytes(encoded(WORDS, "PNG"))
    return tmp_path


WORDS = (1000 + 100 * np.arange(w)[None, :] + 17 * np.arange(h)[:, None]).astype(np.uint16)
COORDINATES = [[0, 0], [19, 11], [7, 3]]
RECORD = {
    "image": "a.png",
    "depth_path": "a.png",
    "depth_scale": 1000.0,
    "original_rgb_size": [W, H],
    "original_depth_size": [w, h],
    "original_fx": 30.0,
    "canonical_fx": 1000.0,
    "canonical_size": [1333, 800],
    "scene": "s",
    "pixel_coords": COORDINATES,
    "depth": [float(WORDS[v, u]) / 1000 for u, v in COORDINATES],
    "depth_type": "z_depth",
}


def run(folder, *records, source=Toy, split="test", as_released=False, depths="depths", **options):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    depths = folder / depths if depths else None
    reader = AnnotationReader(source, split, folder / "images", depths, as_released)
    summary = import_annotations(folder / "annotations.jsonl", reader, folder / "out", **options)
    return summary, datasets.load_dataset(str(folder / "out"), source.name, split=split)


def test_points_of_the_depth_grid_become_px_of_the_image(folder):
    _, rows = run(folder, RECORD)
    row = rows[0]
    # Twice as many columns and rows: a depth pixel's centre lies between two of the image's.
    assert row["points_u"] == [0.5, 38.5, 14.5] and row["points_v"] == [0.5, 22.5, 6.5]
    assert row["points_depth"] == RECORD["depth"] and row["depth_type"] == "z"
    np.testing.assert_array_equal(np.asarray(row["depth"]), WORDS)
    assert (row["fx"], row["fy"], row["cx"], row["cy"]) == (30.0, 30.0, 19.5, 11.5)
    assert (row["id"], row["scene"], row["source"]) == ("line-1/a", "s", "toy")


def test_as_released_takes_the_coordinates_for_px_of_the_image_and_reads_the_depth_there(folder):
    _, rows = run(folder, RECORD, as_released=True)
    row = rows[0]
    assert list(zip(row["points_u"], row["points_v"], strict=True)) == [tuple(pair) for pair in COORDINATES]
    # The scorer looks at canonical round(u * 1333 / 40), which shows depth column floor(that * 20 / 1333).
    for (u, v), metres in zip(COORDINATES, row["points_depth"], strict=True):
        column, line = math.floor(round(u * 1333 / W) * w / 1333), math.floor(round(v * 800 / H) * h / 800)
        assert metres == pytest.approx(WORDS[line, column] / 1000, abs=1e-6)
    assert row["points_depth"][1] != RECORD["depth"][1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"canonical_size": [W, H]}, "is not (40, 24) at a focal length of 30.0 px made 1000 px"),
        ({"original_fx": 100.0, "canonical_size": [400, 240]}, None),
        (
            {"original_fx": 2500.0, "canonical_size": [16, 10], "pixel_coords": [[39, 0]], "depth": [1.0]}
            | {"original_depth_size": [W, H], "depth_path": "wide.png"},
            "all points fall outside",
        ),
    ],
)
def test_as_released_lists_what_the_released_scorer_could_not_score(folder, change, reason):
    (folder / "depths" / "wide.png").write_bytes(encoded(np.full((H, W), 1000, np.uint16), "PNG"))
    summary, _ = run(folder, RECORD, RECORD | change, as_released=True)
    reasons = [skipped["reason"] for skipped in summary["skipped"]]
    assert len(reasons) == (reason is not None) and all(reason in text for text in reasons)


def test_as_released_falls_back_on_the_record_where_the_map_is_empty(folder):
    words = WORDS.copy()
    words[5, 9] = 0  # where [19, 11] of the image lies
    (folder / "depths" / "a.png").write_bytes(encoded(words, "PNG"))
    _, rows = run(folder, RECORD, as_released=True)
    assert rows[0]["points_depth"][1] == RECORD["depth"][1]


# Sizes (W, H) of depth maps, and canonical sizes.
SIZES = {
    "argoverse2": ((1550, 2048), (921, 1217)),
    "argoverse2, front": ((2048, 1550), (1216, 920)),
    "waymo": ((1920, 1280), (934, 623)),
    "ddad": ((1936, 1216), (888, 558)),
    "ddad, side": ((1936, 1216), (1905, 1197)),
    "nuscenes": ((1600, 900), (1263, 711)),
    "nuscenes, back": ((1600, 900), (1973, 1110)),
    "scannetpp": ((256, 192), (1341, 1006)),
    "scannetpp, another camera": ((256, 192), (1342, 1006)),
    "sunrgbd kv2": ((730, 530), (1379, 1001)),
    "sunrgbd xtion": ((640, 480), (1120, 840)),
    "nyuv2": ((561, 427), (1081, 823)),
    "ibims1": ((640, 480), (1144, 858)),
    "eth3d": ((6048, 4032), (1819, 1212)),
    "matterport3d": ((1280, 1024), (1189, 951)),
    "hm3d": ((512, 512), (3842, 3842)),
}


@pytest.mark.parametrize("name", SIZES)
def test_nearest_is_opencv_s(name):
    """The map is stretched as cv2 stretches it, column by column and row by row."""
    (width, height), canonical = SIZES[name]
    columns = np.broadcast_to(np.arange(width, dtype=np.float32), (2, width))
    rows = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None], (height, 2))
    stretched = cv2.resize(columns, (canonical[0], 2), interpolation=cv2.INTER_NEAREST)[0]
    np.testing.assert_array_equal(released.nearest(np.arange(canonical[0]), width, canonical[0]), stretched)
    stretched = cv2.resize(rows, (2, canonical[1]), interpolation=cv2.INTER_NEAREST)[:, 0]
    np.testing.assert_array_equal(released.nearest(np.arange(canonical[1]), height, canonical[1]), stretched)


def test_as_released_keeps_the_canonical_size_of_a_rounded_focal_length(folder):
    size, focal = (640, 480), 548.25636  # the record says 548.26, and a canonical height of 480 * 1000 / 548.25636
    (folder / "images" / "b.png").write_bytes(encoded(np.zeros((*size[::-1], 3), np.uint8), "PNG"))
    record = RECORD | {"image": "b.png", "original_rgb_size": list(size), "original_fx": 548.26}
    record["canonical_size"] = [round(side * 1000 / focal) for side in size]
    assert record["canonical_size"][1] != round(size[1] * 1000 / 548.26)
    _, rows = run(folder, record, as_released=True)
    assert [round(side * 1000 / rows[0]["fx"]) for side in size] == record["canonical_size"]
    assert abs(rows[0]["fx"] - 548.26) <= 0.005


def test_ray_distance_becomes_z_for_map_and_points(folder):
    _, rows = run(folder, RECORD, source=Waymo)
    row = rows[0]
    depth = np.asarray(row["depth"]) / row["depth_scale"]
    for (column, line), u, v, metres in zip(
        COORDINATES, row["points_u"], row["points_v"], row["points_depth"], strict=True
    ):
        ray = WORDS[line, column] / 1000
        x, y = (2 * column + 0.5 - 19.5) / 30, (2 * line + 0.5 - 11.5) / 30
        assert metres == pytest.approx(ray / math.sqrt(1 + x * x + y * y), abs=1e-6) and metres < ray
        assert (u, v) == (2 * column + 0.5, 2 * line + 0.5)
        assert depth[line, column] == pytest.approx(metres, abs=0.00051)
    assert row["depth_type"] == "z"


def test_as_released_keeps_ray_distance_and_says_so(folder):
    _, rows = run(folder, RECORD, source=Waymo, as_released=True)
    np.testing.assert_array_equal(np.asarray(rows[0]["depth"]), WORDS)
    assert rows[0]["depth_type"] == "ray"


def rotated(millimetres):
    return ((millimetres << 3) | (millimetres >> 13)) & 0xFFFF


@pytest.mark.parametrize("as_released", [False, True])
def test_rotated_words_of_sun_and_nyu(folder, as_released):
    true = np.full((h, w), 3000)
    true[0, :3] = 8191, 9000, 12000  # right, aliased within the range, aliased beyond it
    (folder / "depths" / "a.png").write_bytes(encoded(rotated(true).astype(np.uint16), "PNG"))
    pixels = [[0, 0], [1, 0], [2, 0], [5, 5]]
    read = [round(float(rotated(int(true[v, u]))) / 8000, 4) for u, v in pixels]
    assert read[:2] == [8.191, 0.8081]
    record = RECORD | {"depth_scale": 8000.0, "pixel_coords": pixels, "depth": read}
    record |= {"original_fx": 1000.0, "canonical_size": [W, H]}
    _, rows = run(folder, record, source=Nyu, as_released=as_released)
    depth = np.asarray(rows[0]["depth"])
    if as_released:
        assert depth[0, 1] == 808
    else:
        assert rows[0]["points_depth"] == pytest.approx([8.191, 9.0, 3.0], abs=1e-6)  # the point at 12 m is left out
        assert depth[0, :4].tolist() == [8191, 9000, 0, 3000]


def test_masks_reject_where_they_are_0(folder):
    mask = np.ones((h, w), bool)
    mask[2] = False
    for key in ("mask_valid_path", "mask_transp_path"):
        (folder / "depths" / "mask.png").write_bytes(encoded(mask, "PNG"))  # 1 bit
        _, rows = run(folder, RECORD | {key: "mask.png"})
        depth = np.asarray(rows[0]["depth"])
        assert (depth[2] == 0).all() and (np.delete(depth, 2, 0) == np.delete(WORDS, 2, 0)).all()
        for path in sorted((folder / "out").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_binary_float32_depth(folder):
    depth = (WORDS / 1000).astype("<f4")
    depth[5, 5], depth[6, 6] = np.inf, 99.0  # no measurement, out of range
    (folder / "depths" / "a.JPG").write_bytes(depth.tobytes())
    record = RECORD | {"depth_path": "a.JPG", "depth_scale": 1.0, "depth_format": "binary_float32"}
    record["depth"] = [round(float(depth[v, u]), 4) for u, v in COORDINATES]
    _, rows = run(folder, record)
    words = WORDS.copy()
    words[5, 5] = words[6, 6] = 0
    np.testing.assert_array_equal(np.asarray(rows[0]["depth"]), words)


def test_train_records_have_no_points(folder):
    record = {key: value for key, value in RECORD.items() if key not in ("pixel_coords", "depth")}
    _, rows = run(folder, record, split="train")
    assert rows[0]["points_u"] == [] and rows[0]["split"] == "train"


def test_depthlm_records(folder):
    record = {
        "image": "/a.png",
        "intrinsics": [30.0, 31.0, 20.1, 11.9, W, H],
        "pixel_coords": [[39, 23], [0, 5]],
        "depth": [2.5, 1.6],
    }
    _, rows = run(folder, record, source=Ibims, depths=None)
    row, depth = rows[0], np.asarray(rows[0]["depth"])
    assert (row["points_u"], row["points_v"], row["points_depth"]) == ([39.0, 0.0], [23.0, 5.0], [2.5, 1.6])
    assert (row["fx"], row["fy"], row["cx"], row["cy"]) == (30.0, 31.0, 20.1, 11.9)
    assert depth.shape == (H, W) and (depth > 0).sum() == 2 and depth[5, 0] == 1600
    with pytest.raises(ValueError, match="ibims1 only"):
        run(folder, record, source=Toy)


HOSTILE = {
    "image out of the folder": ({"image": "../secret.png"}, "leads out of"),
    "depth out of the folder": ({"depth_path": "x/../../secret.png"}, "leads out of"),
    "image through a link": ({"image": "link.png"}, "through a link"),
    "absolute path is taken below the folder": ({"image": "/etc/passwd"}, "No such file"),
    "mask out of the folder": ({"mask_valid_path": "../images/a.png"}, "leads out of"),
    "null byte": ({"image": "a\0.png"}, "leads out of"),
    "path that is no text": ({"image": "\ud800.png"}, "can't encode character '\\ud800'"),
    "path that moves the cursor": ({"image": "\x1b[2J\n.png"}, "\\x1b[2J\\n.png"),
    "scene that is no text": ({"scene": "\ud800"}, "not printable"),
    "missing file": ({"depth_path": "b.png"}, "b.png"),
    "image is a number": ({"image": 3}, "must be a string"),
    "no image": ({"image": None}, "no image"),
    "absurd size": ({"original_depth_size": [10**9, 10**9]}, "pixels"),
    "absurd binary size": ({"original_depth_size": [6000, 4000], "depth_format": "binary_float32"}, "bytes, not"),
    "negative size": ({"original_depth_size": [-20, -12]}, "pixels"),
    "size of floats": ({"original_depth_size": [20.0, 12]}, "must be"),
    "another depth size": ({"original_depth_size": [12, 20]}, "other files"),
    "another image size": ({"original_rgb_size": [80, 48]}, "other files"),
    "null focal length": ({"original_fx": None}, "is null"),
    "null canonical size": ({"canonical_size": None}, "is null"),
    "negative focal length": ({"original_fx": -3}, "above 0"),
    "scale is text": ({"depth_scale": "1000"}, "above 0"),
    "scale 0": ({"depth_scale": 0}, "above 0"),
    "point outside": ({"pixel_coords": [[20, 0], [0, 0], [0, 0]]}, "outside the 20x12 grid"),
    "negative point": ({"pixel_coords": [[-1, 0], [0, 0], [0, 0]]}, "outside the 20x12 grid"),
    "point of floats": ({"pixel_coords": [[0.5, 0], [0, 0], [0, 0]]}, "whole numbers"),
    "fewer depths": ({"depth": [1.0]}, "one length"),
    "depth 0": ({"depth": [0.0, 1.0, 1.0]}, "above 0"),
    "depth is text": ({"depth": ["a", 1, 1]}, "list of numbers"),
    "no points": ({"pixel_coords": [], "depth": []}, "a point at least"),
    "another depth than the map's": ({"depth": [1.0, 3.087, 9.0]}, "where the record says 9.0000 m"),
    "huge number": ({"depth": [10**400, 1, 1]}, "absurd"),
    "unknown format": ({"depth_format": "npy"}, "not known"),
    "image is not one": ({"image": "text.png"}, "not a readable"),
    "depth of 8 bits": ({"depth_path": "8bit.png"}, "16-bit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_record_is_listed_by_its_line(folder, name):
    change, reason = HOSTILE[name]
    (folder / "secret.png").write_bytes(encoded(picture(0), "PNG"))
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "text.png").write_text("hello")
    (folder / "depths" / "8bit.png").write_bytes(encoded(WORDS.astype(np.uint8), "PNG"))
    summary, rows = run(folder, RECORD, "", RECORD | change)
    assert len(rows) == 1
    (skipped,) = summary["skipped"]
    assert skipped["id"] == "line-3" and reason in skipped["reason"], skipped


@pytest.mark.parametrize(
    "line", ["nonsense", "[1, 2]", "[" * 100_000, json.dumps(RECORD | {"depth": [math.nan, 1, 1]})]
)
def test_line_that_is_not_a_json_record_is_listed(folder, line):
    summary, rows = run(folder, line, RECORD)
    assert len(rows) == 1 and [skipped["id"] for skipped in summary["skipped"]] == ["line-1"]
    assert "JSON" in summary["skipped"][0]["reason"]


def test_nan_in_a_binary_depth_is_refused(folder):
    depth = (WORDS / 1000).astype("<f4")
    depth[4, 4] = np.nan
    (folder / "depths" / "a.bin").write_bytes(depth.tobytes())
    record = RECORD | {"depth_path": "a.bin", "depth_scale": 1.0, "depth_format": "binary_float32"}
    summary, _ = run(folder, RECORD, record)
    assert "NaN" in summary["skipped"][0]["reason"]


def test_strict_makes_a_bad_record_an_error(folder):
    with pytest.raises(build.Skipped, match="line-2: not a JSON record"):
        run(folder, RECORD, "nonsense", strict=True)


def test_record_without_a_depth_folder_says_what_to_give(folder):
    with pytest.raises(ValueError, match="give --depths"):
        run(folder, RECORD, depths=None)


def test_other_annotations_into_the_same_folder_are_refused(folder):
    run(folder, RECORD)
    with pytest.raises(ValueError, match="annotations"):
        run(folder, RECORD | {"scene": "other"})


def delta1_of_two_metres(rows):
    metres = np.concatenate(rows["points_depth"])
    return len(metres), round(float(np.mean(np.maximum(metres / 2, 2 / metres) < 1.25)), 4)


def test_released_scannetpp_sample(tmp_path, monkeypatch):
    from bench import sources

    data = SHARED / "scannetpp"
    if not data.is_dir():
        pytest.skip("../shared/data/scannetpp is not there")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = sources.get("scannetpp")
    reader = AnnotationReader(source, "test", data / "rgb", data / "depth")
    assert import_annotations(data / "annotations.jsonl", reader, tmp_path / "out")["skipped"] == []
    rows = datasets.load_dataset(str(tmp_path / "out"), "scannetpp", split="test")
    assert delta1_of_two_metres(rows) == (200, 0.285)
    for row in rows:
        assert row["image"].size == (1920, 1440) and row["depth"].size == (256, 192)
        columns, lines = (np.rint((np.array(row[key]) + 0.5) / 7.5 - 0.5) for key in ("points_u", "points_v"))
        depth = np.asarray(row["depth"])[lines.astype(int), columns.astype(int)] / row["depth_scale"]
        np.testing.assert_allclose(depth, row["points_depth"], atol=1e-9)


def test_depthlm_ibims1_sample(tmp_path, monkeypatch):
    from bench import sources

    data = SHARED / "ibims1"
    if not data.is_dir():
        pytest.skip("../shared/data/ibims1 is not there")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reader = AnnotationReader(sources.get("ibims1"), "test", data, None)
    assert import_annotations(data / "annotations.jsonl", reader, tmp_path / "out")["skipped"] == []
    rows = datasets.load_dataset(str(tmp_path / "out"), "ibims1", split="test")
    assert delta1_of_two_metres(rows) == (5000, 0.2648)
    assert Image.open(data / "rgb" / "corridor_01.png").tobytes() == rows[0]["image"].tobytes()
