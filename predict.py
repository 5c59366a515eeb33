"""Depth of photos and videos, from the command line.

    python predict.py photo.jpg folder https://example.org/p.jpg --focal-length 1430 --ask "How far is the chair?"

For each photo, in --output: NAME_depth.png (16-bit, millimetres, 0 = none, 65535 = that or farther), NAME_color.png (to
look at, with a scale in metres) and NAME.ply (coloured point cloud; x right, y down, z forward, in metres). A video
NAME.mp4 gives a folder NAME of such files per frame, and NAME_color.mp4. Files that exist are never replaced without
--overwrite.
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the imports, which take seconds, without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# torch and what imports it come in `main`: the writing processes, which import this file, need none of it
from depthvlm.predictions import outputs, videos  # noqa: E402
from depthvlm.predictions.files import check_free  # noqa: E402
from depthvlm.predictions.sources import PHOTO_SUFFIXES, find_sources, is_video  # noqa: E402

PHOTO_FILES = ["png", "color", "ply"]
VIDEO_FILES = ["png", "color"]
READERS = 2  # threads that open photos and make batches of them
AHEAD = 2  # batches that are made before the model asks for them
WRITERS = 2
BEHIND = 8  # photos that wait to be written, at most


@dataclass(frozen=True)
class Shot:
    """
    One photo, or one frame of a video.

    name: in messages. photo: what the processor opens. stem, formats: of its files. focal_length: px, (fx, fy), or
    `None`.
    """

    name: str
    photo: object
    stem: Path
    formats: list[str]
    focal_length: float | tuple[float, float] | None = None


@dataclass(frozen=True)
class Batch:
    """inputs: `handler.encode_inputs`'s. colors, textures: per photo, what clouds need (see `outputs.Prediction`)."""

    inputs: object
    colors: list
    textures: list


@dataclass
class Run:
    """What all photos share."""

    args: argparse.Namespace
    model: object
    processor: object
    estimate: Callable | None
    settings: dict
    failed: list[str] = field(default_factory=list)
    done: int = 0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A photo whose name begins with a dash is written ./-x.jpg",
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, folders, URLs, video files")
    parser.add_argument("--recursive", action="store_true", help="folders within folders too")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent), help="folder or hub id; default: here")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: an accelerator, if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights but the depth head's (bitsandbytes)")
    camera = parser.add_mutually_exclusive_group()
    camera.add_argument(
        "--focal-length",
        type=focal_length,
        action="append",
        metavar="PX",
        help="or FX,FY, at the photos' own size; once for all, or given again for each photo and video in their order",
    )
    camera.add_argument("--focal-length-35mm", type=positive, metavar="MM", help="35 mm equivalent, of all photos")
    camera.add_argument("--fov", type=degrees, metavar="DEGREES", help="field of view over the longer side")
    parser.add_argument("--principal-point", type=pair, metavar="CX,CY", help="px; default: the middle")
    parser.add_argument(
        "--camera-from",
        metavar="MODEL",
        help="estimates focal lengths that are neither given nor in EXIF: depth_pro:ID or moge:ID",
    )
    parser.add_argument("--ask", metavar="QUESTION", help="a question about each photo, answered by the same pass")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="budget for the processed photo")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="photos per forward pass; default: 4")
    parser.add_argument(
        "--fps", type=positive, default=2.0, metavar="N", help="frames per second of videos; default: 2"
    )
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="default: output")
    parser.add_argument("--overwrite", action="store_true", help="replace files of earlier predictions")
    parser.add_argument(
        "--save",
        type=formats,
        metavar="A,B",
        help=f"of {', '.join(outputs.SUFFIXES)}; npz and npy hold float32 metres; default: {','.join(PHOTO_FILES)}, "
        f"of videos {','.join(VIDEO_FILES)}, where color is one MP4",
    )
    parser.add_argument("--points", type=int, default=100_000, metavar="N", help="of a cloud, at most; default: 100000")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per photo instead of text")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = list(itertools.takewhile("--".__ne__, arguments))
    for option in options:
        if option.startswith("-") and Path(option).suffix.lower() in PHOTO_SUFFIXES | videos.SUFFIXES:
            raise ValueError(f"{option} begins with a dash, as options do; write ./{option}")
    photos = [f"./{photo}" if photo.startswith("-") else photo for photo in arguments[len(options) + 1 :]]
    args = parser.parse_intermixed_args([*options, *photos])
    for name, value in (("--batch-size", args.batch_size), ("--points", args.points)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if args.ask is not None and not args.ask.strip():
        raise ValueError("--ask is empty; write a question, or leave it out")
    return args


def positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def degrees(text: str) -> float:
    value = float(text)
    if not 1 < value < 160:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 1 and 160 degrees")
    return value


def pair(text: str) -> tuple[float, float]:
    first, second = (float(part) for part in text.split(","))
    if not (math.isfinite(first) and math.isfinite(second)):
        raise argparse.ArgumentTypeError(f"{text} is no pair of numbers")
    return first, second


def formats(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in outputs.SUFFIXES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(outputs.SUFFIXES)}")
    return names


def focal_length(text: str) -> float | tuple[float, float]:
    return pair(text) if "," in text else float(text)


def check_outputs(sources: list[tuple[str, Path]], args: argparse.Namespace) -> None:
    """Raise before anything is loaded where a file would be replaced, without --overwrite or a photo in any case."""
    photos = {os.path.realpath(photo) for photo, _ in sources if os.path.isfile(photo)}
    formats = args.save or VIDEO_FILES
    if any(is_video(photo) for photo, _ in sources) and "color" in formats and "png" not in formats:
        raise ValueError("a depth video is made of its frames' PNGs; add png to --save")
    for photo, stem in sources:
        if is_video(photo):
            targets = [stem, video_path(stem)]
        else:
            targets = [Path(f"{stem}{outputs.SUFFIXES[name]}") for name in args.save or PHOTO_FILES]
        for path in targets:
            if os.path.realpath(path) in photos:
                raise ValueError(f"{path} is one of the photos; name another folder with --output")
            if not args.overwrite:
                try:
                    check_free(path)
                except FileExistsError as error:
                    raise ValueError(f"{path} exists; name another --output, or replace it with --overwrite") from error


def video_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_color.mp4")


def take_focal_lengths(args: argparse.Namespace, count: int) -> list:
    """One focal length per photo or video, or `None`, from none, one or as many --focal-length."""
    given = args.focal_length or [None]
    if len(given) not in (1, count):
        raise ValueError(f"got {len(given)} times --focal-length for {count} photos; give it once, or once per photo")
    return given * count if len(given) == 1 else given


# Model


def usable_device(name: str | None) -> str:
    """`name`, or by default an accelerator if there is one; `ValueError` for one that is missing."""
    import torch

    if name is None:
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name} cannot be used ({str(error).splitlines()[0]})") from error
    return name


def load(model: str, device: str, dtype: str = "auto", quantize: str | None = None) -> tuple:
    """
    (model, processor) of a folder or a hub id, ready to predict.

    quantize: "int8" or "int4", by bitsandbytes; the depth head and the LM head stay in `dtype`. Raises `ValueError`
    where that package is missing, or `model` is a file.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
    from depthvlm.processing_depthvlm import DepthVLMProcessor

    if os.path.isfile(model):
        raise ValueError(f"model {model} is a file; pass a checkpoint's folder, or a hub id")
    options = {"dtype": dtype}
    if quantize:
        getLogger("bitsandbytes").setLevel("ERROR")  # it warns of the same cast at each layer of each pass
        kept = {"llm_int8_skip_modules": ["depth_head", "lm_head"]}
        if quantize == "int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, **kept)
        else:
            compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
            settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **settings, **kept)
        options["device_map"] = {"": device}
    processor = DepthVLMProcessor.from_pretrained(model, trust_remote_code=False)
    try:
        model = DepthVLMForConditionalGeneration.from_pretrained(model, **options).eval()
    except ImportError as error:
        raise ValueError(f"a package is missing ({str(error).splitlines()[0]}): pip install bitsandbytes") from error
    return (model if quantize else model.to(device)), processor


def load_estimator(name: str, device: str) -> Callable:
    """A function from a photo to its focal length in px, by one of the benchmark's contestants."""
    from bench import contestants

    kind, _, checkpoint = name.partition(":")
    contestant = contestants.get(kind)
    if not contestant.estimates_camera or not checkpoint:
        raise ValueError(
            f"--camera-from {name} estimates no focal length; pass depth_pro:apple/DepthPro-hf or "
            "moge:Ruicheng/moge-2-vitl"
        )
    return contestant(checkpoint, device=device).focal_length


# From photos to predictions


def prepare(shots: list[Shot], run: Run) -> Batch:
    """Open photos and make a batch of them; raises what the processor raises."""
    import numpy as np

    from depthvlm.handler import encode_inputs
    from depthvlm.photos_depthvlm import focal_of_35mm, focal_of_view, open_photo

    args, photos, focal_lengths, known_from = run.args, [], [], []
    for shot in shots:
        photo, from_exif = open_photo(shot.photo, "the photo")
        source, focal = "given", shot.focal_length
        if args.fov is not None:
            focal = focal_of_view(args.fov, max(photo.size))
        elif args.focal_length_35mm is not None:
            focal = focal_of_35mm(args.focal_length_35mm, photo.size)
        elif focal is None and from_exif is not None:
            source, focal = "exif", from_exif
        elif focal is None and run.estimate is not None:
            source, focal = f"estimated by {args.camera_from}", run.estimate(photo)
        photos.append(photo)
        focal_lengths.append(focal)
        known_from.append("assumed" if focal is None else source)
    inputs = encode_inputs(run.processor, photos, args.ask, focal_lengths, args.max_pixels)
    for camera, source in zip(inputs["cameras"], known_from, strict=True):
        camera["focal_length_source"] = source
    steps = [outputs.cloud_step(photo.height, photo.width, args.points) for photo in photos]
    formats = shots[0].formats  # the same for a whole batch
    return Batch(
        inputs=inputs,
        colors=[
            np.asarray(photo)[::step, ::step].copy() if "ply" in formats else None
            for photo, step in zip(photos, steps, strict=True)
        ],
        textures=[outputs.jpeg_texture(photo) if "glb" in formats else None for photo in photos],
    )


def predict(shots: list[Shot], batch: Batch, run: Run) -> list[outputs.Prediction]:
    """One pass over a batch."""
    from depthvlm import handler

    start = time.perf_counter()
    results = handler.predict(run.model, run.processor, batch.inputs, run.args.ask is not None)
    seconds = (time.perf_counter() - start) / len(shots)
    return [
        outputs.Prediction(
            photo=shot.name,
            depth=depth,
            camera=handler.describe_camera(camera, run.args.principal_point),
            answer=answer,
            seconds=seconds,
            colors=colors,
            texture=texture,
            settings=run.settings,
        )
        for shot, (camera, depth, answer), colors, texture in zip(
            shots, results, batch.colors, batch.textures, strict=True
        )
    ]


def read_ahead(groups: Iterable[list[Shot]], pool: Executor, run: Run) -> Iterator[tuple[list[Shot], Future]]:
    """Groups of photos with their batches, which are made in other threads, a few ahead."""
    groups, pending = iter(groups), deque()
    while True:
        while len(pending) < AHEAD and (group := next(groups, None)):
            pending.append((group, pool.submit(prepare, group, run)))
        if not pending:
            return
        yield pending.popleft()


def attempt(shots: list[Shot], batch: Callable[[], Batch], run: Run) -> list[tuple[Shot, outputs.Prediction]]:
    """Predictions of a batch, one by one where one of its photos is bad, which is reported and left out."""
    import torch

    try:
        return list(zip(shots, predict(shots, batch(), run), strict=True))
    except (ValueError, TypeError, MemoryError, torch.OutOfMemoryError) as error:
        if len(shots) == 1:
            report_failure(shots[0].name, error, run)
            return []
    return [pair for shot in shots for pair in attempt([shot], partial(prepare, [shot], run), run)]


def predict_all(groups: Iterable[list[Shot]], run: Run, readers: Executor, writers: Executor) -> Iterator[dict]:
    """Records of written predictions, in order; what cannot be predicted is reported and kept in `run.failed`."""
    args, writing = run.args, deque()
    for group, future in read_ahead(groups, readers, run):
        for shot, prediction in attempt(group, future.result, run):
            writing.append(
                writers.submit(outputs.write, prediction, shot.stem, shot.formats, args.points, args.overwrite)
            )
        while writing and (len(writing) > BEHIND or writing[0].done()):
            yield writing.popleft().result()
    while writing:
        yield writing.popleft().result()


def report_failure(name: str, error: Exception, run: Run) -> None:
    reason = str(error).replace("images[0]", "the photo")
    if not isinstance(error, (ValueError, TypeError)):
        reason = "not enough memory; lower --max-pixels"
    run.failed.append(name)
    if run.args.json:
        print(json.dumps({"photo": name, "error": reason}, ensure_ascii=False), flush=True)
    say(f"{name}: {reason}", sys.stderr)


def say(text: str, file=None) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=file or sys.stdout)
    (file or sys.stdout).flush()


def describe(record: dict) -> str:
    """A prediction in a few lines."""
    camera, depth = record["camera"], record["depth"]
    focal = f"{camera['fx']:.1f}" if camera["fx"] == camera["fy"] else f"{camera['fx']:.1f}, {camera['fy']:.1f}"
    lines = [
        f"{record['photo']}: {camera['width']}x{camera['height']} px, focal length {focal} px "
        f"({camera['focal_length_source']})",
        f"  depth {depth['min']:.2f} / {depth['median']:.2f} / {depth['max']:.2f} m (min / median / max)",
        f"  {', '.join(record['files'])}",
    ]
    if record["too_far_for_png"] and any(name.endswith(outputs.SUFFIXES["png"]) for name in record["files"]):
        farthest = outputs.MAX_MILLIMETRES
        lines.append(
            f"  {record['too_far_for_png']} pixels lie beyond {farthest / 1000} m and are written as {farthest}"
        )
    if record["answer"] is not None:
        lines.append(f"  answer: {record['answer']}")
    return "\n".join(lines)


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def in_background(items: Iterator, pool: Executor) -> Iterator:
    """The same items, each drawn in another thread while the one before is used."""
    future = pool.submit(next, items, None)
    while (item := future.result()) is not None:
        future = pool.submit(next, items, None)
        yield item


def frames(photo: str, stem: Path, focal: object, run: Run) -> Iterator[Shot]:
    """The frames of a video; where it breaks off is reported."""
    formats = [name for name in run.args.save or VIDEO_FILES if name != "color"]
    try:
        for seconds, image in videos.read_frames(photo, run.args.fps):
            yield Shot(f"{photo} at {seconds:.3f} s", image, stem / f"{seconds:09.3f}s", formats, focal)
    except (ValueError, OSError) as error:
        report_failure(photo, error, run)


def start_writers() -> ProcessPoolExecutor:
    """Processes that finish the file they are at when Ctrl-C, which reaches all processes, ends the first one."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit
    writers = ProcessPoolExecutor(WRITERS, get_context("spawn"))
    for _ in range(WRITERS):
        writers.submit(int)  # starts one
    signal.signal(signal.SIGINT, interrupt)
    return writers


def print_records(records: Iterable[dict], run: Run, progress) -> list[dict]:
    """Print each record as it comes; returns all."""
    printed = []
    for record in records:
        if run.args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            say(describe(record))
        printed.append(record)
        run.done += 1
        progress.update()
    return printed


def run_all(run: Run, sources: list[tuple[str, Path]], focal_lengths: list) -> None:
    """Predict, write and print everything: photos first, then videos."""
    from tqdm import tqdm

    args = run.args
    given = [(photo, stem, focal) for (photo, stem), focal in zip(sources, focal_lengths, strict=True)]
    films = [one for one in given if is_video(one[0])]
    formats = args.save or PHOTO_FILES
    shots = [Shot(photo, photo, stem, formats, focal) for photo, stem, focal in given if not is_video(photo)]
    progress = tqdm(unit="photo", total=None if films else len(shots), disable=len(sources) < 2 and not films)
    readers, decoder = ThreadPoolExecutor(READERS), ThreadPoolExecutor(1)
    writers = start_writers()
    try:
        print_records(predict_all(batched(shots, args.batch_size), run, readers, writers), run, progress)
        for photo, stem, focal in films:
            groups = in_background(batched(frames(photo, stem, focal, run), args.batch_size), decoder)
            records = print_records(predict_all(groups, run, readers, writers), run, progress)
            if records and "color" in (args.save or VIDEO_FILES):
                maps = [Path(f) for r in records for f in r["files"] if f.endswith(outputs.SUFFIXES["png"])]
                videos.write_depth_video(video_path(stem), maps, args.fps, args.overwrite)
                say(f"{photo}: {len(maps)} frames, {video_path(stem)}", sys.stderr if args.json else None)
    finally:
        progress.close()
        readers.shutdown(wait=False, cancel_futures=True)
        decoder.shutdown(wait=False, cancel_futures=True)
        writers.shutdown(cancel_futures=True)


def start(args: argparse.Namespace) -> int:
    sources, left_out = find_sources(args.photos, args.output, args.recursive)
    for line in left_out:
        print(line, file=sys.stderr)
    if not sources:
        raise ValueError(f"no photo or video lies in {', '.join(args.photos)}")
    check_outputs(sources, args)
    focal_lengths = take_focal_lengths(args, len(sources))

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = usable_device(args.device)
    estimate = load_estimator(args.camera_from, device) if args.camera_from else None
    model, processor = load(args.model, device, args.dtype, args.quantize)
    settings = {"model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "quantize": args.quantize}
    settings |= {"max_pixels": args.max_pixels, "question": args.ask}
    run = Run(args, model, processor, estimate, settings)
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with torch.inference_mode():
        run_all(run, sources, focal_lengths)
    if run.failed:
        total = len(run.failed) + run.done
        print(f"{len(run.failed)} of {total} photos failed: {', '.join(run.failed)}", file=sys.stderr)
    return 1 if run.failed else 0


def main(arguments: list[str] | None = None) -> int:
    try:
        return start(parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
    except BrokenExecutor:
        print("predict.py: a writing process was killed, most often for its memory", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)  # not sys.exit: that would wait for a reader's download
