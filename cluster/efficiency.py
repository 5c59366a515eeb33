"""What a built frame costs, what Ray adds and what a service serves: `python -m cluster.efficiency COMMAND --help`."""

import argparse
import base64
import io
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench import build, sources
from bench.arguments import positive
from bench.build import png
from bench.efficiency import config_4b, random_inputs, random_model
from bench.evaluate import checkpoint_version
from bench.remote import connected

from . import inputs, plan, predict

QUESTION = "How far is the nearest thing from the camera, in meters?"


def photo(seed: int, width: int, height: int, noise: float = 0.0) -> bytes:
    """A JPEG of smooth blobs. noise: its standard deviation, of 255; with 4 files have a camera's size."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    if noise:
        pixels = np.clip(pixels + generator.normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return file.getvalue()


def build_cost(frames: int, size: tuple[int, int], depth_size: tuple[int, int], valid: float) -> dict:
    """
    Core seconds and bytes per frame of a build from a folder of photos and depth maps, in one process.

    valid: share of the depth maps' pixels that hold a measurement: 1 for a rendered set, 0.05 for a lidar.
    """
    with tempfile.TemporaryDirectory() as folder:
        raw, (width, height) = Path(folder) / "raw", depth_size
        for name in ("rgb", "depth"):
            (raw / name).mkdir(parents=True)
        generator = np.random.default_rng(0)
        slope = np.linspace(2000, 6000, height)[:, None] + np.linspace(0, 500, width)
        for number in range(frames):
            (raw / "rgb" / f"{number:06d}.jpg").write_bytes(photo(number, *size, noise=4))
            depth = (slope + generator.normal(0, 3, slope.shape)) * (generator.random(slope.shape) < valid)
            (raw / "depth" / f"{number:06d}.png").write_bytes(png(depth.astype(np.uint16)))
        (raw / "camera.json").write_text(json.dumps({"depth_scale": 1000, "focal_length": size[0]}))
        source, out = sources.get("folder"), Path(folder) / "out"
        reader = build.SourceReader(source, str(raw), "test")
        parameters, items = reader.plan(frames)
        start, cpu = time.perf_counter(), time.process_time()
        record = build.write_split(out, source, "test", reader, parameters, items)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stored = sum(file["bytes"] for file in record["files"])
        photos = sum(path.stat().st_size for path in (raw / "rgb").iterdir())
    return {
        "frames": record["written"],
        "core_seconds_per_frame": cpu / frames,
        "seconds_per_frame": seconds / frames,
        "bytes_per_frame": stored / frames,
        "of_which_photo": photos / frames,
    }


def photo_cost(grid: tuple[int, int]) -> dict:
    """
    Floating-point operations of one photo of `grid` tokens (rows, columns) through the 4B model with depth, as PyTorch
    counts them, and what one core of this CPU does. Of the layers, which are all alike, a few are run.
    """
    config, whole = config_4b(layers=3, vision_layers=4), config_4b()
    model = random_model(config, torch.bfloat16, "cpu")
    inputs = random_inputs(config, grid, torch.bfloat16, "cpu")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        start = time.process_time()
        model(**inputs, logits_to_keep=1)
        core_seconds = time.process_time() - start
    counted = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    missing = {
        "language_model.layers.0": whole.text_config.num_hidden_layers - config.text_config.num_hidden_layers,
        "visual.blocks.0": whole.vision_config.depth - config.vision_config.depth,
    }
    flops = counted["Global"] + sum(
        number * counted[name] for end, number in missing.items() for name in counted if name.endswith(end)
    )
    tokens, per_core = inputs["input_ids"].shape[1], counted["Global"] / core_seconds
    report = {"tokens": tokens, "teraflop": flops / 1e12, "core_gigaflop_per_second": per_core / 1e9}
    return report | {"core_tokens_per_second": tokens * per_core / flops}


def steady(reports: Iterator[dict]) -> dict:
    """Images/s from the first finished shard to the last: without the start of processes and models."""
    times, photos = [], []
    for report in reports:
        times.append(time.perf_counter())
        photos.append(int(report["photos"]))
    return {"images_per_second": sum(photos[1:]) / (times[-1] - times[0]), "shards": len(photos)}


def ray_overhead(model: str, photos: int, width: int, height: int, shard_size: int, rounds: int) -> dict:
    """
    The plain loop against Ray Data with one model and one reader, over the same photos, in turns; and per photo what
    reading and preprocessing takes of a core, and the bytes of its row.
    """
    ways = {"plain loop": [], "Ray Data": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "photos"
        source.mkdir()
        for number in range(photos):
            (source / f"{number:06d}.jpg").write_bytes(photo(number, width, height))
        for number in range(rounds):
            for name, samples in ways.items():
                settings = plan.Settings(
                    source=inputs.Input(str(source)),
                    model=model,
                    checkpoint=checkpoint_version(model),
                    device="cpu",
                    dtype="auto",
                    shard_size=shard_size,
                )
                begun = plan.begin(settings, Path(folder) / f"{name} {number}")
                shards = begun.unfinished()
                if name == "plain loop":
                    samples.append(steady(predict.in_this_process(begun, shards)))
                else:
                    with connected("local"):
                        samples.append(steady(predict.on_ray(begun, shards, actors=1, readers=1)))
        read, start = predict.Reader(begun), time.process_time()
        loaded = [read(shard) for shard in shards[:4]]
        reading = (time.process_time() - start) / sum(len(shard.rows) for shard in loaded)
        stored = sum(begun.path(shard).stat().st_size for shard in shards) / photos
    speeds = {name: [sample["images_per_second"] for sample in samples] for name, samples in ways.items()}
    ratios = [plain / ray for plain, ray in zip(*speeds.values(), strict=True)]
    report = {"photos": photos, "images_per_second": speeds, "overhead": statistics.median(ratios) - 1}
    return report | {"reader_core_seconds_per_photo": reading, "bytes_per_photo": stored}


def load(url: str, clients: int, requests: int, make: Callable[[int], tuple[str, dict]]) -> dict:
    """Requests/s and seconds per request of so many clients, each of which waits for its answer before the next."""

    def work(client: int) -> list[float]:
        seconds = []
        for number in range(requests):
            route, body = make(client * requests + number)
            request = urllib.request.Request(url + route, json.dumps(body).encode())
            start = time.perf_counter()
            with urllib.request.urlopen(request) as reply:
                reply.read()
            seconds.append(time.perf_counter() - start)
        return seconds

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = sorted(second for seconds in pool.map(work, range(clients)) for second in seconds)
    whole = time.perf_counter() - start
    p50, p95 = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.95))
    return {"clients": clients, "requests_per_second": len(seconds) / whole, "p50": p50, "p95": p95}


def service_load(url: str, name: str, clients: list[int], requests: int, tokens: int, width: int, height: int) -> dict:
    """Depth alone, and an answer with depth, for each number of clients; one client asks one at a time."""

    def url_of(number: int) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(photo(number, width, height)).decode()}"

    def depth(number: int) -> tuple[str, dict]:
        return "/depth", {"image": url_of(number)}

    def chat(number: int) -> tuple[str, dict]:
        content = [{"type": "image_url", "image_url": {"url": url_of(number)}}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        return "/chat/completions", {"model": name, "messages": messages, "max_tokens": tokens, "depth": "png"}

    report = {}
    for kind, make in (("depth", depth), ("answer with depth", chat)):
        load(url, max(clients), 1, make)  # a warm-up
        report[kind] = [load(url, count, requests, make) for count in clients]
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m cluster.efficiency", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    built = commands.add_parser("build", help="core seconds and bytes per frame of `bench build`")
    built.add_argument("--frames", type=positive, default=100)
    built.add_argument("--depth-size", type=positive, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    built.add_argument("--valid", type=float, default=1.0, help="share of measured pixels; default: 1")
    counted = commands.add_parser("photo", help="operations of one photo through the 4B model")
    counted.add_argument("--grid", type=positive, nargs=2, default=(29, 39), metavar=("ROWS", "COLUMNS"), help="tokens")
    predicted = commands.add_parser("predict", help="what Ray Data adds to the plain loop, on one machine")
    predicted.add_argument("--model", default=".")
    predicted.add_argument("--photos", type=positive, default=2000)
    predicted.add_argument("--shard-size", type=positive, default=50)
    predicted.add_argument("--rounds", type=positive, default=3)
    served = commands.add_parser("serve", help="requests/s, p50 and p95 of a running service")
    served.add_argument("url", help="http://127.0.0.1:8000/v1")
    served.add_argument("--name", default="depthvlm", help="of the model")
    served.add_argument("--clients", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    served.add_argument("--requests", type=positive, default=20, help="of each client")
    served.add_argument("--tokens", type=positive, default=24, help="of an answer, at most")
    for command in (built, predicted, served):
        command.add_argument("--size", type=positive, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    options = parser.parse_args(arguments)
    if options.command == "build":
        report = build_cost(options.frames, options.size, options.depth_size, options.valid)
    elif options.command == "photo":
        report = photo_cost(tuple(options.grid))
    elif options.command == "predict":
        report = ray_overhead(options.model, options.photos, *options.size, options.shard_size, options.rounds)
    else:
        report = service_load(
            options.url, options.name, options.clients, options.requests, options.tokens, *options.size
        )
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
