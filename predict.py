"""Depth of photos, from the command line.

    python predict.py photo.jpg another.png --focal-length 1430 --ask "How far is the chair?"

For each photo, in --output: NAME_depth.png (16-bit, millimetres, 0 = none), NAME_color.png (to look at, with a scale in
metres) and NAME.ply (coloured point cloud; x right, y down, z forward, in metres).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

MAX_MILLIMETRES = 65535  # the farthest that a 16-bit PNG can say
MAX_NEW_TOKENS = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent), help="folder or hub id; default: here")
    parser.add_argument("--focal-length", type=float, metavar="PX", help="of all photos, in px at their own size")
    parser.add_argument("--ask", metavar="QUESTION", help="a question about each photo, answered by the same pass")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="budget for the processed photo")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="photos a forward pass; default: 4")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="default: output")
    return parser.parse_args()


def predict(model, processor, photos: list[Path], args) -> list[tuple[dict, np.ndarray, str | None]]:
    """(camera, z-depth in metres `(height, width)`, answer) of each photo, from one pass over all of them."""
    if args.ask is None:
        inputs = processor(
            images=photos, focal_lengths=args.focal_length, max_pixels=args.max_pixels, return_tensors="pt"
        )
        outputs = model(**inputs.to(model.device), logits_to_keep=1)
        answers = [None] * len(photos)
    else:
        content = [{"type": "image"}, {"type": "text", "text": args.ask}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            images=photos,
            text=[text] * len(photos),
            focal_lengths=args.focal_length,
            max_pixels=args.max_pixels,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        outputs = model.generate(
            **inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        new_tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(new_tokens, skip_special_tokens=True)
    depths = processor.post_process_depth_estimation(outputs)
    return [
        (camera, depth["predicted_depth"].cpu().numpy(), answer)
        for camera, depth, answer in zip(outputs.cameras, depths, answers, strict=True)
    ]


def write_depth(path: Path, depth: np.ndarray) -> int:
    """16-bit PNG in millimetres; returns how many pixels lie farther than it can say (written as 65535)."""
    millimetres = np.rint(depth * 1000.0)
    Image.fromarray(np.minimum(millimetres, MAX_MILLIMETRES).astype(np.uint16)).save(path)
    return int((millimetres > MAX_MILLIMETRES).sum())


def write_picture(path: Path, depth: np.ndarray):
    """The map in colours, near to far, with a scale in metres."""
    height, width = depth.shape
    figure = Figure(figsize=(8, 8 * height / width + 0.2), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    near, far = np.percentile(depth, [1, 99])
    shown = axes.imshow(depth, cmap="turbo_r", vmin=near, vmax=far, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="depth (metres)", fraction=0.05, pad=0.02)
    figure.savefig(path)


def write_point_cloud(path: Path, points: np.ndarray, colours: np.ndarray):
    """Binary PLY of `(..., 3)` float metres and `(..., 3)` 8-bit colours."""
    names = ["x", "y", "z", "red", "green", "blue"]
    vertices = np.empty(points[..., 0].size, dtype=[(name, "<f4" if name in "xyz" else "u1") for name in names])
    for axis, name in enumerate(names[:3]):
        vertices[name] = points[..., axis].ravel()
    for channel, name in enumerate(names[3:]):
        vertices[name] = colours[..., channel].ravel()
    kinds = "\n".join(f"property {'float' if name in 'xyz' else 'uchar'} {name}" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n{kinds}\nend_header\n"
    with path.open("wb") as file:
        file.write(header.encode("ascii"))
        vertices.tofile(file)


def report(photo: Path, stem: Path, processor, camera: dict, depth: np.ndarray, answer: str | None) -> str:
    """Write a photo's three files and tell, in a few lines, what is in them."""
    too_far = write_depth(stem.with_name(f"{stem.name}_depth.png"), depth)
    write_picture(stem.with_name(f"{stem.name}_color.png"), depth)
    colours = np.asarray(processor.load_photo(photo))
    points = processor.to_point_cloud(depth, camera["focal_length"]).numpy()
    write_point_cloud(stem.with_name(f"{stem.name}.ply"), points, colours)
    height, width = depth.shape
    lines = [
        f"{photo}: {width}x{height} px, focal length {camera['focal_length']:.1f} px ({camera['focal_length_source']})",
        f"  depth {depth.min():.2f} / {np.median(depth):.2f} / {depth.max():.2f} m (min / median / max)",
        f"  {stem}_depth.png, {stem}_color.png, {stem}.ply",
    ]
    if too_far:
        lines.append(f"  {too_far} pixels lie beyond {MAX_MILLIMETRES / 1000} m and are written as {MAX_MILLIMETRES}")
    if answer is not None:
        lines.append(f"  answer: {answer.strip()}")
    return "\n".join(lines)


def stems(photos: list[Path], folder: Path) -> dict[Path, Path]:
    """Where each photo's files go: by its name, numbered where two photos have the same."""
    result, taken = {}, set()
    for photo in photos:
        name, number = photo.stem, 1
        while name in taken:
            number += 1
            name = f"{photo.stem}-{number}"
        taken.add(name)
        result[photo] = folder / name
    return result


@torch.inference_mode()
def main() -> int:
    args = parse_args()
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1")
    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    args.output.mkdir(parents=True, exist_ok=True)
    photos = list(dict.fromkeys(map(Path, args.photos)))
    names, failed = stems(photos, args.output), []
    groups = [photos[start : start + args.batch_size] for start in range(0, len(photos), args.batch_size)]
    with tqdm(total=len(photos), unit="photo", disable=len(photos) < 2) as progress:
        while groups:
            group = groups.pop(0)
            try:
                for photo, found in zip(group, predict(model, processor, group, args), strict=True):
                    progress.write(report(photo, names[photo], processor, *found))
            except (ValueError, TypeError, torch.OutOfMemoryError) as error:
                if len(group) > 1:  # one of them is bad: take them one by one, to name it
                    groups[:0] = [[photo] for photo in group]
                    continue
                failed.append(group[0])
                is_too_large = isinstance(error, torch.OutOfMemoryError)
                reason = "not enough memory; lower --max-pixels" if is_too_large else error
                progress.write(f"{group[0]}: {reason}", file=sys.stderr)
            progress.update(len(group))
    if failed:
        print(f"{len(failed)} of {len(photos)} photos failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
