"""Prediction and builds on a real Ray cluster of three nodes, with processes killed in mid-work."""

import hashlib
import io
import os
import signal
import threading

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import rays
from bench_fixtures_toy import SlowToy, Toy, write_ibims1, write_toy
from PIL import Image

from bench import build, sources
from bench.__main__ import main

pytest.importorskip("ray", reason="Ray is missing: pip install -e '.[ray]'")
PHOTOS, SHARDS = 2000, 80
BROKEN = 33  # one in so many


@pytest.fixture(scope="module")
def environment():
    with rays.ray_environment() as environment, pytest.MonkeyPatch.context() as patched:
        for name in set(os.environ) - set(environment):
            patched.delenv(name)
        for name, value in environment.items():
            patched.setenv(name, value)
        patched.setenv("PYTHONPATH", str(rays.ROOT / "tests"))  # of workers, for the toy's sources
        yield environment


@pytest.fixture(scope="module")
def cluster(environment):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    for _ in range(2):
        nodes.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield nodes
    nodes.shutdown()


def write_photos(folder, count):
    """Small photos of three sizes in folders of a hundred; some are cut off, some are no images."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        size = [(96, 64), (64, 96), (96, 96)][number % 3]
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "jpeg")
        content = file.getvalue()
        if number % BROKEN == 0:
            content = content[: len(content) // 2] if number % 2 else b"no image"
        path = folder / f"{number // 100:02d}" / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return folder


def predict(photos, shard_size):
    options = ["--focal-length", 200, "--shard-size", shard_size, "--batch-size", 8]
    return ["predict", photos, "--model", rays.ROOT, *options]


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files_are_the_plain_loops_and_a_finished_plan_ends_before_ray_is_asked(environment, cluster, tmp_path):
    (tmp_path / "photos").mkdir()
    command = predict(write_photos(tmp_path / "photos", 70), 9)
    rays.run(environment, *command, "--out", tmp_path / "plain")
    on_ray = ["--ray", cluster.address, "--actors", 2]
    printed = rays.run(environment, *command, "--out", tmp_path / "ray", *on_ray)
    assert digests(tmp_path / "ray") == digests(tmp_path / "plain") and len(digests(tmp_path / "ray" / "shards")) == 8
    assert "70 photos in 8 shards" in printed and "3 failed" in printed and "images/s" in printed
    rays.run(environment, *command, "--out", tmp_path / "ray", "--ray", "127.0.0.1:1")  # where nobody listens


# Builds


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A function that builds the toy or iBims-1, with shards of four images; `source` stands for the toy."""
    raw = {"toy": write_toy(tmp_path / "toy", {"a/x": 30, "b/x": 10})}
    raw["ibims1"] = write_ibims1(tmp_path / "ibims1", [f"room_{number:02d}" for number in range(9)])
    (raw["toy"] / "test" / "a" / "x" / "004.jpg").write_bytes(b"broken")
    monkeypatch.setattr(build, "SHARD_IMAGES", 4)
    get = sources.get

    def run(name, out, *arguments, source=Toy):
        with monkeypatch.context() as patched:
            patched.setattr(sources, "get", lambda name: source if name == "toy" else get(name))
            command = ["build", name, "--raw", raw[name], "--split", "test", "--out", tmp_path / out, *arguments]
            assert main([str(part) for part in command]) == 0

    return run


def test_builds_on_ray_by_jobs_of_an_array_and_here_are_the_same(environment, cluster, toys, tmp_path, capsys):
    for name in ("toy", "ibims1"):
        toys(name, "here")
        toys(name, "ray", "--ray", cluster.address)
        for job in (2, 0, 1):
            toys(name, "array", "--shard-range", f"{job}/3")
        toys(name, "array", "--finish")
    expected = digests(tmp_path / "here")
    assert expected == digests(tmp_path / "ray") == digests(tmp_path / "array")
    assert len([name for name in expected if name.endswith(".parquet")]) == 10 + 3
    assert capsys.readouterr().out.count("skipped a/x/004") == 3  # with its reason, each time


def test_a_killed_worker_changes_nothing_of_a_build(environment, cluster, toys, tmp_path):
    toys("toy", "here")
    killed = []

    def kill():
        """A worker that writes a shard, as soon as one is finished."""
        rays.wait_for(lambda: list(tmp_path.glob("ray/toy/*.parquet")), "a shard")
        killed.append(rays.wait_for(lambda: next(workers("ray::_call"), None), "a worker"))
        killed[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    toys("toy", "ray", "--ray", cluster.address, source=SlowToy)
    killer.join()
    left = [path for path in tmp_path.glob("ray/toy/.*.tmp") if path.unlink() is None]  # of the killed worker
    assert killed and len(left) <= 1 and digests(tmp_path / "here") == digests(tmp_path / "ray")


def test_refusals_of_a_build_are_those_of_a_local_one(environment, cluster, toys, tmp_path, capsys):
    arguments = ["--raw", str(tmp_path / "toy"), "--split", "test", "--strict"]
    messages = []
    for number, where in enumerate(([], ["--ray", cluster.address], ["--finish"])):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sources, "get", lambda name: Toy)
            assert main(["build", "toy", "--out", str(tmp_path / f"out{number}"), *arguments, *where]) in (1, 2)
        messages.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert messages[0] == messages[1] and messages[0].startswith("error: a/x/004: ")
    assert "lacks test-00000-of-00010.parquet, the first of 10 shards" in messages[2]


def workers(title):
    """Processes of this user whose title begins so."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith(title):
            yield process


# Kills


@pytest.mark.slow
def test_files_are_the_plain_loops_though_actor_raylet_and_driver_are_killed(environment, cluster, tmp_path):
    (tmp_path / "photos").mkdir()
    command = predict(write_photos(tmp_path / "photos", PHOTOS), PHOTOS // SHARDS)
    rays.run(environment, *command, "--out", tmp_path / "plain", seconds=4 * rays.PATIENCE)
    plain, out = digests(tmp_path / "plain"), tmp_path / "out"
    on_ray = [*command, "--out", out, "--ray", cluster.address, "--actors", 2, "--readers", 2]

    def finished():
        return len(list((out / "shards").glob("part-*")))

    def actors():
        """Processes that hold a model, with their raylets' pids."""
        return [(process, process.ppid()) for process in workers("ray::MapWorker(MapBatches(RayPredictor)")]

    driver = rays.start(environment, *on_ray)
    rays.wait_for(lambda: finished() >= 3 and actors(), "a model at work")
    victim = actors()[0][0]
    victim.kill()
    at_kill = finished()
    rays.wait_for(lambda: finished() >= at_kill + 4, "work after an actor's death")
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    raylet = rays.wait_for(lambda: next((p for _, p in actors() if p in raylets), None), "a model on a worker node")
    os.kill(raylet, signal.SIGKILL)
    at_kill = finished()
    rays.wait_for(lambda: finished() >= at_kill + 4, "work after a raylet's death")
    driver.kill()
    driver.wait()
    rays.wait_for(lambda: not actors(), "the end of the driver's actors")
    assert 11 <= finished() < SHARDS, "all was done before the driver was killed"
    printed = rays.run(environment, *on_ray, seconds=4 * rays.PATIENCE)

    assert digests(out) == plain
    rows = pq.read_table(out / "shards").to_pylist()
    expected = {f"{number // 100:02d}/{number:04d}.jpg": number % BROKEN > 0 for number in range(PHOTOS)}
    assert len(rows) == PHOTOS and {row["id"]: row["status"] == "ok" for row in rows} == expected
    assert all((row["depth"] is not None) == (row["reason"] is None) == expected[row["id"]] for row in rows)
    assert f"{PHOTOS} photos in {SHARDS} shards" in printed and "images/s" in printed
    cluster.remove_node(raylets[raylet], allow_graceful=False)
