"""Splatting and the removal of hidden points, against a scene cast ray by ray."""

import time

import numpy as np
import pytest
from PIL import Image

from bench.sources._base import BadFrame
from bench.sources._lidar import NEARER, LidarSource, pose, running_minimum, splat

WALL = 20.0
BOX = np.array([[-1.0, -0.5, 5.0], [1.0, 1.5, 7.0]])


def first_hit(origin, direction):
    """Distance along rays to the box or the wall, whichever comes first, and whether it is the wall."""
    with np.errstate(divide="ignore"):
        t = (BOX - origin)[:, None] / direction
        enter, leave = t.min(0).max(1), t.max(0).min(1)
        box = np.where((enter <= leave) & (enter > 0), enter, np.inf)
        wall = (WALL - origin[2]) / direction[:, 2]
    return np.minimum(box, wall), wall < box


def sweep(lidar, spacing=0.4):
    """Points of a lidar at `lidar` in the camera frame; which the camera, at 0, sees; which lie on the wall."""
    azimuth, elevation = (
        np.radians(a).ravel() for a in np.meshgrid(np.arange(-40, 40, spacing / 2), np.arange(-20, 20, spacing))
    )
    direction = np.stack(
        [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=1
    )
    t, wall = first_hit(np.asarray(lidar), direction)
    points = lidar + t[:, None] * direction
    seen_at, _ = first_hit(np.zeros(3), points)  # in units of the point's own distance
    return points, seen_at > 1 - 1e-9, wall


def project(points, focal_length, size):
    u, v = (focal_length * points[:, i] / points[:, 2] + (size[i] - 1) / 2 for i in (0, 1))
    inside = (u >= 0) & (v >= 0) & (u <= size[0] - 1) & (v <= size[1] - 1)
    return u, v, inside


@pytest.mark.parametrize("focal_length", [1000, 1700])
def test_hidden_points_go_and_visible_points_stay(focal_length):
    size = (1200, 900)
    gone, stay = [], []
    for lidar in ((0, -0.8, -0.6), (0, -1.0, 0), (0.7, -0.5, 0), (0.2, -0.5, 0)):
        points, visible, wall = sweep(np.array(lidar))
        u, v, inside = project(points, focal_length, size)
        depth = splat(u[inside], v[inside], points[inside, 2], size, focal_length)
        kept = depth[np.rint(v[inside]).astype(int), np.rint(u[inside]).astype(int)] == points[inside, 2].astype("f4")
        gone.append(~kept[(~visible & wall)[inside]])
        stay.append(kept[visible[inside]])
        assert kept[(visible & wall)[inside]].mean() >= 0.95
    assert min(len(hidden) for hidden in gone) > 500
    assert np.concatenate(gone).mean() >= 0.95
    assert np.concatenate(stay).mean() >= 0.95


def test_background_beside_an_objects_border_stays():
    near_u, near_v = (a.ravel() for a in np.meshgrid(np.arange(50, 80, 3), np.arange(20, 80, 3)))
    far_u, far_v = (a.ravel() for a in np.meshgrid(np.arange(10, 47, 3), np.arange(20, 80, 3)))
    u, v = np.concatenate([near_u, far_u]), np.concatenate([near_v, far_v])
    z = np.concatenate([np.full(near_u.size, 5.0), np.full(far_u.size, 20.0)])
    depth = splat(u, v, z, (100, 100), 600)
    assert (depth[far_v, far_u] == 20).all() and (depth[near_v, near_u] == 5).all()


@pytest.mark.parametrize("roll", [0, 3, 10])
def test_a_plane_at_a_grazing_angle_is_not_hidden_by_itself(roll):
    u, v = (a.ravel() for a in np.meshgrid(np.arange(0, 400, 2), np.arange(0, 400, 8)))
    above = np.sin(np.radians(roll)) * (u - 200) + np.cos(np.radians(roll)) * (v - 200)
    ground = above > 11
    u, v, z = u[ground], v[ground], 1.5 * 1000 / above[ground]
    assert z.max() > 90
    assert (splat(u, v, z, (400, 400), 1000)[v, u] > 0).all()


def test_points_behind_by_less_than_the_ratio_stay():
    u, v = (a.ravel() for a in np.meshgrid(np.arange(0, 40), np.arange(0, 40)))
    z = np.where((u == 20) & (v == 20), 10.0, 10 * NEARER + 0.01)
    assert splat(u, v, z, (40, 40), 500)[20, 20] == 10
    z = np.where((u == 20) & (v == 20), 10.0, 10 * NEARER - 0.01)
    assert splat(u, v, z, (40, 40), 500)[20, 20] == 0


def test_points_outside_the_image_tell_what_is_hidden_at_its_border():
    u, v = (a.ravel() for a in np.meshgrid(np.arange(-5, 20), np.arange(-5, 20)))
    z = np.where((u == 0) & (v == 0), 20.0, 5.0)
    assert splat(u, v, z, (20, 20), 500)[0, 0] == 0


def test_remove_hidden_can_be_switched_off():
    u, v = (a.ravel() for a in np.meshgrid(np.arange(0, 40), np.arange(0, 40)))
    z = np.where((u == 20) & (v == 20), 20.0, 5.0)
    assert splat(u, v, z, (40, 40), 500, remove_hidden=False)[20, 20] == 20


@pytest.mark.parametrize("remove_hidden", [True, False])
def test_two_points_on_one_pixel_nearest_wins(remove_hidden):
    for z in ([4.0, 9.0], [9.0, 4.0]):
        depth = splat([3.2, 2.9], [1.0, 1.1], z, (8, 4), 10, remove_hidden)
        assert depth.dtype == np.float32 and depth.shape == (4, 8)
        assert depth[1, 3] == 4 and np.count_nonzero(depth) == 1


def test_pixels_are_centred_at_whole_numbers_and_ties_go_right_and_down():
    size = (4, 3)
    assert splat([-0.5, 3.49], [2.49, -0.5], [1, 2], size, 10)[[2, 0], [0, 3]].tolist() == [1, 2]
    assert splat([0.5, 1.5, 2.5], [0.5, 0.5, 1.5], [1, 1, 1], size, 10)[[1, 1, 2], [1, 2, 3]].tolist() == [1, 1, 1]
    assert not splat([3.5, -0.51, 0, 0], [0, 0, 2.5, -0.51], [1, 1, 1, 1], size, 10).any()


def test_points_that_are_not_finite_or_not_in_front_are_dropped():
    nan, inf = np.nan, np.inf
    depth = splat([0, 1, 2, 3, nan, inf, 1e300], [0] * 7, [nan, inf, -1, 0, 1, 1, 1], (4, 3), 10)
    assert not depth.any()
    assert not splat([], [], [], (4, 3), 10).any()


def test_running_minimum():
    a = np.random.default_rng(0).random((50, 3))
    for n in range(1, 12):
        assert np.array_equal(running_minimum(a, n), np.stack([a[i : i + n].min(0) for i in range(51 - n)]))


def test_projection_gives_z_not_ray_distance(tmp_path):
    u, v, z = 90, 5, 10.0
    intrinsics, size = (50.0, 60.0, 49.5, 29.5), (100, 60)
    point = [(u - 49.5) / 50 * z, (v - 29.5) / 60 * z, z]
    depth = LidarSource(tmp_path).depth_from_points([point, [0, 0, -3], [1, 1, 0]], intrinsics, size)
    assert depth[v, u] == 10 and np.count_nonzero(depth) == 1


@pytest.mark.parametrize(
    ("quaternion", "translation"),
    [
        ([0, 0, 0, 0], [0, 0, 0]),
        ([np.nan, 0, 0, 0], [0, 0, 0]),
        ([1, 0, 0, 0], [0, 0, np.inf]),
        ([1, 0, 0], [0, 0, 0]),
        ([2, 0, 0, 0], [0, 0, 0]),
        ([1, 0, 0, "x"], [0, 0, 0]),
        (None, [0, 0, 0]),
    ],
)
def test_impossible_poses_are_refused(quaternion, translation):
    with pytest.raises(BadFrame, match="pose of car"):
        pose(quaternion, translation, "car")


def test_an_image_of_another_size_than_its_intrinsics_is_refused(tmp_path):
    Image.new("RGB", (10, 20)).save(tmp_path / "a.jpg")
    source = LidarSource(tmp_path)
    assert source.read_image("a.jpg", size=(10, 20))[1] == source.read_image("a.jpg")[1] == (10, 20)
    with pytest.raises(BadFrame, match="a.jpg is 10x20, but its intrinsics are of 20x10 px"):
        source.read_image("a.jpg", size=(20, 10))


def test_a_full_sweep_in_a_large_image_is_fast():
    rng = np.random.default_rng(0)
    u, v, z = rng.uniform(0, 1920, 100_000), rng.uniform(0, 1216, 100_000), rng.uniform(2, 100, 100_000)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        splat(u, v, z, (1920, 1216), 1000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
