"""Prediction on a real Ray cluster of three nodes, with processes killed in mid-work."""

import hashlib
import io
import os
import signal

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import rays
from PIL import Image

pytest.importorskip("ray", reason="Ray is missing: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow
PHOTOS = 2000
BROKEN = 33  # one in so many


@pytest.fixture(scope="module")
def environment():
    with rays.ray_environment() as environment, pytest.MonkeyPatch.context() as patched:
        for name in set(os.environ) - set(environment):
            patched.delenv(name)
        for name, value in environment.items():
            patched.setenv(name, value)
        yield environment


@pytest.fixture(scope="module")
def cluster(environment):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    for _ in range(2):
        nodes.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Small photos of three sizes in folders of a hundred; some are cut off, some are no images, one is a folder."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(PHOTOS):
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


@pytest.fixture(scope="module")
def command(photos):
    return ["predict", photos, "--model", rays.ROOT, "--focal-length", 200, "--shard-size", 50, "--batch-size", 8]


@pytest.fixture(scope="module")
def plain(environment, command, tmp_path_factory):
    """Digests of the files that the plain loop makes."""
    out = tmp_path_factory.mktemp("plain")
    rays.run(environment, *command, "--out", out)
    return digests(out)


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "shards").iterdir()}


def test_files_are_the_plain_loops_though_actor_raylet_and_driver_are_killed(
    environment, cluster, command, plain, photos, tmp_path
):
    out = tmp_path / "out"
    on_ray = [*command, "--out", out, "--ray", cluster.address, "--actors", 2, "--readers", 2]

    def finished():
        return len(list((out / "shards").glob("part-*")))

    def actors():
        """Processes that hold a model, with their raylets' pids."""
        found = []
        for process in psutil.process_iter(["name", "cmdline", "ppid"]):
            if "MapBatches(RayPredictor)" in " ".join(process.info["cmdline"] or ()):
                found.append((process, process.info["ppid"]))
        return found

    driver = rays.start(environment, *on_ray)
    rays.wait_for(lambda: finished() >= 3 and len(actors()) == 2, "two models at work")
    victim = actors()[0][0]
    victim.kill()
    at_kill = finished()
    rays.wait_for(lambda: finished() >= at_kill + 4, "work after an actor's death")
    workers = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    raylet = rays.wait_for(lambda: next((p for _, p in actors() if p in workers), None), "a model on a worker node")
    os.kill(raylet, signal.SIGKILL)
    at_kill = finished()
    rays.wait_for(lambda: finished() >= at_kill + 4, "work after a raylet's death")
    driver.kill()
    driver.wait()
    rays.wait_for(lambda: not actors(), "the end of the driver's actors")
    assert 11 <= finished() < 40, "all was done before the driver was killed"
    printed = rays.run(environment, *on_ray)

    assert digests(out) == plain
    rows = pq.read_table(out / "shards").to_pylist()
    expected = {f"{number // 100:02d}/{number:04d}.jpg": number % BROKEN > 0 for number in range(PHOTOS)}
    assert len(rows) == PHOTOS and {row["id"]: row["status"] == "ok" for row in rows} == expected
    assert all((row["depth"] is not None) == (row["reason"] is None) == expected[row["id"]] for row in rows)
    assert f"{PHOTOS} photos in 40 shards" in printed and "images/s" in printed
    cluster.remove_node(workers[raylet], allow_graceful=False)


def test_a_finished_plan_ends_before_ray_is_asked(environment, cluster, command, plain, tmp_path):
    out = tmp_path / "out"
    rays.run(environment, *command, "--out", out, "--shard-range", "0/2")
    rays.run(environment, *command, "--out", out, "--shard-range", "1/2")
    assert digests(out) == plain
    rays.run(environment, *command, "--out", out, "--ray", "127.0.0.1:1")  # where nobody listens
