"""What Ray costs and what a service serves: `python -m cluster.efficiency predict` and `... serve URL`."""

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
from PIL import Image

from bench.arguments import positive
from bench.evaluate import checkpoint_version
from bench.remote import connected

from . import inputs, plan, predict

QUESTION = "How far is the nearest thing from the camera, in meters?"


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG of smooth blobs."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return file.getvalue()


def steady(reports: Iterator[dict]) -> dict:
    """Images/s from the first finished shard to the last: without the start of processes and models."""
    times, photos = [], []
    for report in reports:
        times.append(time.perf_counter())
        photos.append(int(report["photos"]))
    return {"images_per_second": sum(photos[1:]) / (times[-1] - times[0]), "shards": len(photos)}


def ray_overhead(model: str, photos: int, width: int, height: int, shard_size: int, rounds: int) -> dict:
    """The plain loop against Ray Data with one model and one reader, over the same photos, in turns."""
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
    speeds = {name: [sample["images_per_second"] for sample in samples] for name, samples in ways.items()}
    ratios = [plain / ray for plain, ray in zip(*speeds.values(), strict=True)]
    return {"photos": photos, "images_per_second": speeds, "overhead": statistics.median(ratios) - 1}


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


def service_load(url: str, name: str, clients: int, requests: int, tokens: int, width: int, height: int) -> dict:
    """Depth alone, and an answer with depth: one client that asks one at a time, then all at once."""

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
        load(url, clients, 1, make)  # a warm-up
        report[kind] = [load(url, 1, requests, make), load(url, clients, requests, make)]
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m cluster.efficiency", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    predicted = commands.add_parser("predict", help="what Ray Data adds to the plain loop, on one machine")
    predicted.add_argument("--model", default=".")
    predicted.add_argument("--photos", type=positive, default=2000)
    predicted.add_argument("--shard-size", type=positive, default=50)
    predicted.add_argument("--rounds", type=positive, default=3)
    served = commands.add_parser("serve", help="requests/s, p50 and p95 of a running service")
    served.add_argument("url", help="http://127.0.0.1:8000/v1")
    served.add_argument("--name", default="depthvlm", help="of the model")
    served.add_argument("--clients", type=positive, default=16)
    served.add_argument("--requests", type=positive, default=20, help="of each client")
    served.add_argument("--tokens", type=positive, default=24, help="of an answer, at most")
    for command in (predicted, served):
        command.add_argument("--size", type=positive, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    options = parser.parse_args(arguments)
    if options.command == "predict":
        report = ray_overhead(options.model, options.photos, *options.size, options.shard_size, options.rounds)
    else:
        report = service_load(
            options.url, options.name, options.clients, options.requests, options.tokens, *options.size
        )
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
