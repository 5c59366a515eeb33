"""The procedural source: depth against formulas of its own, the picture against the depth, the answers against both."""

import collections
import hashlib
import pickle
import re
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench import build
from bench.sources import get
from bench.sources._base import Frame
from bench.sources.procedural import render as caster
from bench.sources.procedural.scenes import COLORS, Draw, Scene, tilt, unit
from bench.sources.procedural.source import CLEAR, COUNTS, KEYS, SEEN, SIZES, Procedural, aim, begin, picture, render

GREY, FLAT = (0.5, 0.5, 0.5), (1.0, 0.0)
SMALL = (160, 120)
PLACES = (
    "point_distance",
    "nearer_point",
    "nearer_half",
    "nearest_distance",
    "farthest_distance",
    "camera_height",
)
NOUNS = {"boxes": "box", "people": "person", "shelves": "shelf"}


def camera(position=(0.0, 0.0, 1.5), yaw=FLAT, pitch=FLAT, roll=FLAT, size=(120, 90), focal=80.0, cx=61.0, cy=43.5):
    return caster.look(position, yaw, pitch, roll, size, focal, cx, cy)


def grid(cam):
    """Camera x / z and y / z of every pixel, by the pinhole formula."""
    u, v = np.meshgrid(np.arange(cam.width), np.arange(cam.height))
    fx, fy, cx, cy = cam.intrinsics
    return (u - cx) / fx, (v - cy) / fy


# Depth by independent formulas


def test_floor_depth_follows_from_camera_height_and_pitch():
    pitch = tilt(-0.13)
    cam = camera(pitch=pitch)
    depth, part, _ = caster.trace(cam, [caster.Part("ground", (0, 0, -1.0), (9, 9, 1.0), GREY)])
    _, y = grid(cam)
    below = y * pitch[0] - pitch[1] > 1e-6
    assert (part >= 0).tolist() == below.tolist()
    np.testing.assert_allclose(depth[below], 1.5 / (y * pitch[0] - pitch[1])[below], rtol=1e-12)
    assert np.isinf(depth[~below]).all()


def test_box_face_seen_straight_on_has_one_depth():
    cam = camera()
    depth, part, covered = caster.trace(cam, [caster.Part("box", (0, 5.0, 1.5), (1.0, 0.5, 0.7), GREY)])
    np.testing.assert_allclose(depth[part == 0], 4.5, rtol=1e-12)
    # Its outline is where the front corners project: fx X / Z + cx and fy Y / Z + cy.
    rows, columns = np.nonzero(part == 0)
    assert (columns.min(), columns.max()) == (np.ceil(61 - 80 / 4.5), np.floor(61 + 80 / 4.5))
    assert (rows.min(), rows.max()) == (np.ceil(43.5 - 56 / 4.5), np.floor(43.5 + 56 / 4.5))
    assert covered[0] == (part == 0).sum()


def test_box_face_seen_by_a_turned_camera_is_a_slanted_plane():
    yaw = unit(5.0, 2.0)
    cam = camera(yaw=yaw)
    depth, part, _ = caster.trace(cam, [caster.Part("box", (0, 6.0, 1.5), (30.0, 1.0, 30.0), GREY)])
    x, _ = grid(cam)
    assert (part == 0).all()
    np.testing.assert_allclose(depth, 5.0 / (yaw[0] - x * yaw[1]), rtol=1e-12)


def test_roll_moves_the_horizon_clockwise():
    roll = tilt(0.1)
    cam = camera(roll=roll)
    _, part, _ = caster.trace(cam, [caster.Part("ground", (0, 0, -1.0), (9, 9, 1.0), GREY)])
    x, y = grid(cam)  # a camera turned clockwise sees the ground rise on its right
    assert (part >= 0).tolist() == (y * roll[0] + x * roll[1] > 0).tolist()


@pytest.mark.parametrize("shape", ["ellipsoid", "cylinder"])
def test_round_solids_against_a_quadratic_in_the_camera_frame(shape):
    cam, radius = camera(), 0.6
    half = (radius, radius, 0.5 if shape == "cylinder" else radius)
    depth, part, _ = caster.trace(cam, [caster.Part(shape, (0.4, 4.0, 1.7), half, GREY)])
    x, y = grid(cam)
    center = np.array([0.4, -0.2, 4.0])  # camera frame
    seen = 0
    for v, u in zip(*np.nonzero(part == 0), strict=True):
        d = np.array([x[v, u], y[v, u], 1.0])
        keep = [0, 2] if shape == "cylinder" else [0, 1, 2]
        d, c = d[keep], center[keep]
        roots = np.roots([(d**2).sum(), -2 * (d * c).sum(), (c**2).sum() - radius**2])
        assert depth[v, u] == pytest.approx(roots.real.min(), abs=1e-6)
        seen += 1
    assert seen > 200


def test_a_post_does_not_reach_past_its_ends():
    cam = camera()
    depth, part, _ = caster.trace(cam, [caster.Part("cylinder", (0, 4.0, 1.5), (0.2, 0.2, 0.5), GREY)])
    rows = np.nonzero(part == 0)[0]
    assert rows.min() == np.ceil(43.5 - 80 * 0.5 / 3.8) and rows.max() == np.floor(43.5 + 80 * 0.5 / 3.8)


def test_a_tapered_box_has_the_slope_of_a_roof():
    cam = camera(position=(0.0, 0.0, 1.0))
    roof = caster.Part("box", (0, 6.0, 2.0), (3.0, 2.0, 1.0), GREY, taper=(0.0, 0.75))
    depth, part, _ = caster.trace(cam, [roof])
    x, y = grid(cam)
    z = depth[part == 0]
    world_y, world_z = z, 1.0 - y[part == 0] * z
    # The front slope rises from (y, z) = (4, 1) to (5.5, 3): y - 4 = 0.75 (z - 1).
    np.testing.assert_allclose(world_y - 4.0, 0.75 * (world_z - 1.0), atol=1e-9)
    assert world_z.max() <= 3.0 + 1e-9 and world_z.max() > 2.9


def test_a_turned_box_turns_its_own_x_to_the_left_by_a_positive_sine():
    turn = unit(4.0, 3.0)
    part = caster.Part("box", (1.0, 5.0, 1.5), (1.0, 0.4, 0.5), GREY, turn)
    cam = camera()
    depth, index, _ = caster.trace(cam, [part])
    x, y = grid(cam)
    z = depth[index == 0]
    dx, dy, dz = x[index == 0] * z - 1.0, z - 5.0, -y[index == 0] * z
    own = np.stack(
        [np.abs(dx * turn[0] + dy * turn[1]) / 1.0, np.abs(dy * turn[0] - dx * turn[1]) / 0.4, abs(dz) / 0.5]
    )
    np.testing.assert_allclose(own.max(0), 1.0, atol=1e-9)


def test_the_nearer_solid_hides_the_other_in_either_order():
    near, far = (caster.Part("box", (0, y, 1.5), (1, 0.5, 1), GREY) for y in (3.0, 6.0))
    for parts in ((near, far), (far, near)):
        depth, index, covered = caster.trace(camera(), list(parts))
        assert depth.min() == depth[44, 61] == pytest.approx(2.5)
        assert index[44, 61] == parts.index(near)
        assert covered[parts.index(far)] > (index == parts.index(far)).sum()


def test_solids_that_reach_behind_the_camera_are_cut_not_lost():
    wall = caster.Part("box", (2.0, 0.0, 1.5), (0.5, 40.0, 3.0), GREY)
    depth, part, _ = caster.trace(camera(), [wall])
    x, _ = grid(camera())
    right = x[44] > 1.5 / 39
    np.testing.assert_allclose(depth[44][right], 1.5 / x[44][right], rtol=1e-12)


# Whole frames


@pytest.fixture(scope="module")
def pictures():
    return [picture("test", i, SMALL) for i in range(24)]


@pytest.fixture(scope="module")
def train_pictures():
    return [picture("train", i, SMALL) for i in range(40)]


@pytest.fixture(scope="module")
def easy_pictures():
    return [picture("easy_train", i, SMALL) for i in range(40)]


def back_project(sample, cam):
    """World x, y, z of every pixel, from its depth and the intrinsics."""
    h, w = sample.depth.shape
    fx, fy, cx, cy = sample.intrinsics
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    in_camera = np.stack([(u - cx) / fx * sample.depth, (v - cy) / fy * sample.depth, sample.depth])
    return np.einsum("ij,ihw->jhw", np.array([cam.right, cam.down, cam.forward]), in_camera) + np.reshape(
        cam.position, (3, 1, 1)
    )


def test_camera_axes_are_a_right_handed_rotation(pictures):
    for _, _, _, cam in pictures:
        axes = np.array([cam.right, cam.down, cam.forward])
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(axes) == pytest.approx(1.0)


def test_rooms_back_project_into_their_walls_and_things_onto_what_they_are(pictures):
    rooms = 0
    for sample, things, scene, cam in pictures:
        valid = sample.depth > 0
        x, y, z = back_project(sample, cam)
        if scene.walls:
            hx, hy, height = scene.walls
            outside = np.maximum(np.abs(x) - hx, np.maximum(np.abs(y) - hy, np.maximum(-z, z - height)))
            assert outside[valid].max() < 1e-4
            on_room = (things == 0) & valid & (outside > -0.001)
            assert on_room.sum() > 0.3 * ((things == 0) & valid).sum()
            rooms += 1
        else:
            assert z[valid].min() > -1e-3
        for i in range(1, len(scene.things)):
            own = (things == i) & valid
            parts = [p for p in scene.parts if p.thing == i]
            reach = [np.sqrt(sum((q - c) ** 2 for q, c in zip((x, y, z), p.center, strict=True))) for p in parts]
            bound = [np.sqrt(sum(h * h for h in p.half)) for p in parts]
            assert (np.min([r - b for r, b in zip(reach, bound, strict=True)], 0)[own] < 1e-4).all()
    assert 5 < rooms < 19


def test_depth_is_float32_metres_within_the_range_and_0_in_the_sky(pictures):
    lo, hi = Procedural.depth_range
    skies = 0
    for sample, things, scene, _ in pictures:
        assert sample.depth.dtype == np.float32 and sample.image.dtype == np.uint8
        assert sample.image.shape == (*sample.depth.shape, 3) == (120, 160, 3)
        valid = sample.depth > 0
        assert ((sample.depth[valid] >= lo) & (sample.depth[valid] <= hi)).all() and valid.mean() > 0.2
        skies += scene.sun and bool((~valid[0] & (things[0] == 0)).any())
    assert skies > 4
    assert round(hi * Procedural.depth_scale) < 65536


def hue(rgb):
    rgb = np.sqrt(rgb) if np.max(rgb) <= 1 else np.asarray(rgb) / 255
    chroma = rgb - np.mean(rgb)
    return chroma / np.linalg.norm(chroma)


def test_image_shows_each_thing_where_the_depth_has_it(pictures, train_pictures):
    names = ["red", "orange", "yellow", "green", "blue", "purple"]
    palette = np.array([hue(COLORS[n]) for n in names])
    right = checked = 0
    for sample, things, scene, _ in pictures + train_pictures:
        for k, thing in enumerate(scene.things):
            own = things == k
            if thing.kind in ("ball", "box") and thing.color in names and own.sum() > 150:
                checked += 1
                pixel = np.median(sample.image[own], axis=0)
                right += names[np.argmax(palette @ hue(pixel + [0, 0, 1e-3]))] == thing.color
                # Moved aside by half its width, the same mask shows other things.
                width = np.ptp(np.nonzero(own)[1]) + 1
                assert (things[np.roll(own, width // 2 + 1, axis=1)] != k).any()
    assert checked > 20 and right >= 0.95 * checked


def test_edges_of_the_image_lie_on_edges_of_the_depth(pictures):
    for sample, things, _, _ in pictures[:8]:
        gradient = np.abs(np.diff(sample.image.astype(int), axis=1)).sum(2)
        border = things[:, 1:] != things[:, :-1]
        if border.sum() > 100:
            assert gradient[border].mean() > 1.5 * gradient[~border].mean()


def test_focal_lengths_vary_widely_and_name_the_lens():
    fields = {}
    for i in range(200):
        draw, kind, lens = begin("train", i)
        cam = aim(Scene(()), kind, lens, (320, 240), [draw.uniform() for _ in range(5)])
        fields.setdefault(lens, []).append(np.degrees(2 * np.arctan(160 / cam.focal)))
        assert abs(cam.cx - 159.5) <= 9.6 and abs(cam.cy - 119.5) <= 7.2
    assert min(fields["wide"]) > 69.9 > max(fields["normal"]) and min(fields["normal"]) > 49.9 > max(fields["tele"])
    assert 95 < max(fields["wide"]) < 101 and 34 < min(fields["tele"]) < 37


def test_portrait_is_no_wider_than_the_widest_lens():
    cam = aim(Scene(()), "room", "wide", (240, 320), [0.0] * 5)
    assert cam.focal == pytest.approx(0.42 * 320)


def test_sizes_vary_and_size_replaces_them():
    shapes = {render("train", i).depth.shape[::-1] for i in range(5)}
    assert len(shapes) >= 2 and shapes <= set(SIZES)
    assert render("train", 3, (96, 64)).depth.shape == (64, 96)


# Questions


def test_answers_agree_with_depth_and_things(pictures, train_pictures):
    asked = {"distance": 0, "nearer": 0, "count": 0, "left": 0}
    for sample, things, scene, _ in pictures + train_pictures:
        qa = [pair for pair in sample.qa if pair[0] in asked]
        assert 3 <= len(qa) <= 6 and len(set(qa)) == len(qa) and sample.qa[: len(qa)] == qa
        pixels = np.bincount(things.ravel(), minlength=len(scene.things))
        seen = [i for i in range(1, len(scene.things)) if pixels[i] > SEEN * things.size]
        names = {i: scene.things[i].name for i in seen}

        def find(name, names=names, pixels=pixels, size=things.size):
            found = [i for i in names if names[i] == name]
            assert len(found) == 1, f"{name} fits {len(found)} things"
            assert pixels[found[0]] >= CLEAR * size
            return found[0]

        def depth_of(i, sample=sample, things=things):
            return np.percentile(sample.depth[things == i], 50, method="lower")

        for kind, question, answer in qa:
            asked[kind] += 1
            if kind == "distance":
                (name,) = re.fullmatch(r"How far is (.+) from the camera, in meters\?", question).groups()
                if name == "the middle of the picture":
                    u, v = (things.shape[1] - 1) // 2, (things.shape[0] - 1) // 2
                    assert float(answer) == pytest.approx(sample.depth[v, u], rel=0.11)
                else:
                    assert answer == f"{depth_of(find(name)):.1f}"
            elif kind == "nearer":
                pair = re.fullmatch(r"Which is nearer, (.+) or (.+)\?", question).groups()
                depths = {name: depth_of(find(name)) for name in pair}
                assert answer == min(depths, key=depths.get) and max(depths.values()) >= 1.15 * min(depths.values())
            elif kind == "count":
                (noun,) = re.fullmatch(r"How many (\w+) are there\?", question).groups()
                same = [i for i in seen if scene.things[i].kind == NOUNS.get(noun, noun[:-1])]
                assert answer == str(len(same)) and all(pixels[i] >= CLEAR * things.size for i in same)
            else:
                noun, name = re.fullmatch(r"Which color is the (\w+) left of (.+)\?", question).groups()
                reference = find(name)
                left_edge = np.nonzero(things == reference)[1].min()
                left = [
                    i
                    for i in seen
                    if scene.things[i].kind == noun and i != reference and np.nonzero(things == i)[1].min() < left_edge
                ]
                assert [scene.things[i].color for i in left] == [answer]
                assert np.nonzero(things == left[0])[1].max() < left_edge
    assert min(asked.values()) > 15, asked


POINT = r"at (\d+) % from the left and (\d+) % from the top"


def stated(depth):
    """Metres as answers state them: 0.1 m steps below 10 m, whole ones above."""
    return f"{depth:.0f}" if float(f"{depth:.1f}") >= 10 else f"{depth:.1f}"


def test_answers_about_places_agree_with_the_depth_map(pictures, train_pictures, easy_pictures):
    asked = collections.Counter()
    for sample, _, scene, _ in pictures + train_pictures + easy_pictures:
        depth, (height, width) = sample.depth, sample.depth.shape
        labelled = depth[depth > 0]

        def at(x, y, depth=depth, height=height, width=width):
            """Depth of the point that lies x % from the left edge and y % from the top one."""
            assert 2 <= int(x) <= 98 and 2 <= int(y) <= 98
            value = depth[int(int(y) / 100 * height), int(int(x) / 100 * width)]
            assert value > 0
            return value

        places = [pair for pair in sample.qa if pair[0] in PLACES]
        after = [pair for pair in sample.qa if pair[0] == "thing"]
        assert len(set(places)) == len(places) and sample.qa[-len(places + after) :] == places + after
        for kind, question, answer in places:
            asked[kind] += 1
            if kind == "point_distance":
                point = re.fullmatch(rf"How far is the point {POINT}\?", question).groups()
                assert answer == stated(at(*point))
            elif kind == "nearer_point":
                points = re.fullmatch(rf"Which is nearer, point A {POINT}, or point B {POINT}\?", question).groups()
                a, b = at(*points[:2]), at(*points[2:])
                assert answer == ("A" if a < b else "B") and max(a, b) >= 1.15 * min(a, b)
            elif kind == "nearer_half":
                left, right = depth[:, : width // 2], depth[:, width // 2 :]
                left, right = (np.percentile(half[half > 0], 50, method="lower") for half in (left, right))
                assert answer == ("left" if left < right else "right") and max(left, right) >= 1.15 * min(left, right)
            elif kind == "camera_height":
                assert scene.walls and answer == stated(scene.eye[2])
            else:
                assert answer == stated(labelled.min() if kind == "nearest_distance" else labelled.max())
                assert kind == "nearest_distance" or (depth > 0).all()
    assert asked["point_distance"] > 20 * len(pictures + train_pictures + easy_pictures)
    assert min(asked[kind] for kind in PLACES) > 10, asked


def test_a_place_shows_the_thing_that_is_named(pictures, train_pictures, easy_pictures):
    asked, names = collections.Counter(), collections.Counter()
    for sample, things, scene, _ in pictures + train_pictures + easy_pictures:
        height, width = things.shape
        shown = [pair for pair in sample.qa if pair[0] == "thing"]
        assert len(shown) <= 12 and len(set(shown)) == len(shown)
        assert max(collections.Counter(answer for _, _, answer in shown).values(), default=0) <= 4
        for _, question, answer in shown:
            x, y = map(int, re.fullmatch(rf"Which thing is {POINT}\?", question).groups())
            v, u = int(y / 100 * height), int(x / 100 * width)
            thing = scene.things[things[v, u]]
            assert answer == thing.name and thing.color in answer and thing.kind in answer
            assert (things[max(v - 3, 0) : v + 4, max(u - 3, 0) : u + 4] == things[v, u]).all()
            asked[scene.walls is not None, bool(scene.kinds)] += 1
            names[answer] += 1
    assert len(asked) == 3 and min(asked.values()) > 60, asked  # streets, rooms, easy rooms
    assert max(names.values()) < 0.1 * names.total()


def test_of_two_points_neither_is_right_more_often(train_pictures):
    answers = [answer for sample, *_ in train_pictures for kind, _, answer in sample.qa if kind == "nearer_point"]
    assert abs(answers.count("A") / len(answers) - 0.5) < 3 * 0.5 / len(answers) ** 0.5


def test_easy_pictures_show_few_large_things_by_name(easy_pictures):
    kinds = collections.Counter()
    for sample, things, scene, _ in easy_pictures:
        shown = [np.count_nonzero(things == i) for i in range(1, len(scene.things))]
        assert 1 <= len(shown) <= 4 and len({thing.color for thing in scene.things}) == len(scene.things)
        depth_of = {
            thing.name: np.percentile(sample.depth[things == i], 50, method="lower")
            for i, thing in enumerate(scene.things)
            if i and (things == i).any()
        }
        for kind, question, answer in sample.qa:
            if kind in (*PLACES, "thing"):
                assert all(number.endswith("0") for number in re.findall(r"(\d+) %", question))
                continue
            kinds[kind] += 1
            if kind == "nearest":
                assert question == "Which thing is nearest?" and answer == min(depth_of, key=depth_of.get)
            elif kind == "nearer":
                pair = re.fullmatch(r"Which is nearer, (.+) or (.+)\?", question).groups()
                assert answer == min(pair, key=depth_of.get)
            elif "middle of the picture" not in question:
                (name,) = re.fullmatch(r"How far is (.+) from the camera, in meters\?", question).groups()
                assert answer == f"{depth_of[name]:.1f}"
    assert kinds.keys() == {"distance", "nearer", "nearest"} and kinds["nearest"] > 0.6 * len(easy_pictures)


# The same frame everywhere, and never one frame twice

GOLDEN = {
    ("train", 7): "f46b992f7f2ff7cb92d2bf282c77943fc46873b564eed549f2949a975c7eaf85",
    ("test", 2): "826a7c4c067007e195b13e706730c5de3d8a797e0af9a7d1d170c80e6ef78acd",
}


GOLDEN_PLACES = {
    ("train", 7): "edac64244c1fbcf2cd1cf61201907006dc1ed6f0a1e0b50e3d93d5396758b835",
    ("test", 2): "5e9c7aced750427ccd32ac444c407f63e098f389130303bad18e89656092c5d0",
}

GOLDEN_SHOWN = {
    ("train", 7): "685122aeeb96058a43914975597680a3f06404e20e1f865951bf242f2887cb21",
    ("test", 2): "fe605b8c78284a4d68ea7bee656f3f0606f7411284054768e18cd8a27966cba5",
}


@pytest.mark.parametrize("split, index", GOLDEN)
def test_golden_frames(split, index):
    sample = render(split, index)
    digest = hashlib.sha256(sample.image.tobytes())
    digest.update(np.round(sample.depth.astype(np.float64) * 1000).astype("<u4").tobytes())
    named = [pair for pair in sample.qa if pair[0] not in (*PLACES, "thing")]
    digest.update(repr((sample.image.shape, sample.intrinsics, named)).encode())
    assert digest.hexdigest() == GOLDEN[split, index]
    places = [pair for pair in sample.qa if pair[0] in PLACES]
    assert hashlib.sha256(repr(places).encode()).hexdigest() == GOLDEN_PLACES[split, index]
    shown = sample.qa[len(named) + len(places) :]
    assert named + places + shown == sample.qa
    assert hashlib.sha256(repr(shown).encode()).hexdigest() == GOLDEN_SHOWN[split, index]


def test_random_words_are_those_of_philox():
    draw = Draw(1, 0)
    assert [draw.word(), draw.word()] == [15003734204198539638, 13859618513508960101]


def test_a_frame_does_not_depend_on_what_was_drawn_before():
    first = render("train", 5, SMALL)
    render("test", 5, SMALL)
    again = render("train", 5, SMALL)
    assert (first.image == again.image).all() and (first.depth == again.depth).all() and first.qa == again.qa


def test_splits_share_no_frame():
    keys = [(split, i) for split in COUNTS for i in range(1000)]
    starts = [Draw(KEYS[split], i).word() for split, i in keys]
    assert len(set(starts)) == len(keys)
    assert not np.array_equal(render("train", 9, SMALL).image, render("test", 9, SMALL).image)


# The source


def test_source_lists_without_drawing_and_loads_what_render_draws():
    source = get("procedural")()
    frames = list(islice(source.frames("train"), 50))
    assert frames[12] == Frame("train/000000012", frames[12].scene, frames[12].camera, ("train", 12))
    assert [f.id for f in frames] == sorted({f.id for f in frames})
    assert {f.scene.split("-")[0] for f in frames} == {"room", "street"}
    assert {f.camera for f in frames} == {"wide", "normal", "tele"}
    for frame in frames[:3]:
        scene = picture(*frame.data, (16, 12))[2]
        assert frame.scene.startswith("street" if scene.sun else "room")
    small = Procedural(None, size=SMALL)
    frame = pickle.loads(pickle.dumps(frames[4]))
    assert (small.load(frame).image == render("train", 4, SMALL).image).all()


def test_easy_source_draws_frames_of_its_own():
    easy = get("procedural_easy")(size=SMALL)
    frame = next(easy.frames("test"))
    assert frame == Frame("test/000000000", "simple-room-000000000", frame.camera, ("easy_test", 0))
    assert (easy.load(frame).image == render("easy_test", 0, SMALL).image).all()
    assert not np.array_equal(easy.load(frame).image, render("test", 0, SMALL).image)


def test_every_split_ends():
    source = Procedural()
    assert sum(1 for _ in source.frames("test")) == COUNTS["test"] == 1000
    assert list(source.splits) == ["train", "test"]


def test_card_says_what_one_answer_to_all_questions_of_a_kind_scores(tmp_path):
    source = get("procedural")
    reader = build.SourceReader(source, None, "test")
    record = build.write_split(tmp_path, source, "test", reader, *reader.plan(5))
    rows = pq.read_table(tmp_path / "procedural" / "test-00000-of-00001.parquet").column("qa").to_pylist()
    pairs = [pair for row in rows for pair in zip(row["kind"], row["answer"], strict=True)]
    card = (tmp_path / "README.md").read_text()
    assert {kind for kind, _ in pairs} == set(record["questions"])
    for kind, facts in record["questions"].items():
        truths = [answer for name, answer in pairs if name == kind]
        tolerance = 0.1 if kind == "camera_height" else 0.25
        if kind.endswith(("distance", "height")):
            metres = np.array(truths, float)
            shares = [np.mean(np.abs(float(answer) - metres) <= tolerance * metres) for answer in truths]
        else:
            shares = [np.mean([answer == truth for truth in truths]) for answer in truths]
        assert facts["number"] == len(truths) and facts["right"] == pytest.approx(max(shares))
        assert shares[truths.index(facts["constant"])] == max(shares)
        line = f"| procedural | test | {kind} | {len(truths)} | {facts['constant']} | {max(shares):.1%} |"
        assert line in card


def test_unknown_split_frame_and_size_are_refused():
    with pytest.raises(ValueError, match="no split 'val'"):
        render("val", 0)
    with pytest.raises(ValueError, match="no split 'val'"):
        next(Procedural().frames("val"))
    with pytest.raises(ValueError, match="no frame 1000"):
        render("test", 1000)
    with pytest.raises(ValueError, match="size"):
        render("test", 0, (0, 120))
