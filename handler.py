"""Depth and answers as a service: Inference Endpoints' custom handler, and what it shares with predict.py and app.py.

It lies in every saved checkpoint. A server calls it as `EndpointHandler(folder)(request)`.
"""

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

# torch and transformers are imported where a model runs: predict.py's writing processes need the formats alone

MAX_MILLIMETRES = 65535  # the farthest that a 16-bit PNG can store
MAX_NEW_TOKENS = 128
PARAMETERS = {"focal_length", "question", "max_pixels", "outputs"}
ENCODINGS = ("png", "npz")


class EndpointHandler:
    """
    Photo in, metric depth, camera and answer out.

    Call it with `{"inputs": photo, "parameters": {...}}`: the photo as the bytes of a file, as base64 of these, as a
    data URL, or as the PIL image that the toolkit makes of an image body. Nothing is read from a path or a URL.

    focal_length (`float` or `[fx, fy]`, *optional*): px at the photo's own size; default: from EXIF, else assumed.
    question (`str`, *optional*): answered by the pass that makes the map.
    max_pixels (`int`, *optional*): budget for the processed photo.
    outputs (`str` or list of `str`, defaults to `"png"`): `"png"`, a 16-bit PNG in millimetres (0 = none, 65535 = that
        or farther), `"npz"`, float16 metres with the camera.

    Returns `{"png": base64, "npz": base64, "camera": {...}, "answer": text or None}`, with the encodings asked for.
    Raises `ValueError`, which the toolkit answers with status 400, for anything else.
    """

    def __init__(self, path: str = ""):
        import torch
        from transformers import AutoModel, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())

    def __call__(self, data: dict) -> dict:
        import torch

        parameters = data.get("parameters") or {}
        if unknown := set(parameters) - PARAMETERS:
            raise ValueError(
                f"unknown parameters {', '.join(sorted(unknown))}; known are {', '.join(sorted(PARAMETERS))}"
            )
        outputs = parameters.get("outputs", "png")
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not (isinstance(outputs, list) and all(encoding in ENCODINGS for encoding in outputs)):
            raise ValueError(f"outputs is {outputs!r}; name png, npz or both")
        question = parameters.get("question")
        if question is not None and not (isinstance(question, str) and question.strip()):
            raise ValueError(f"question is {question!r}; pass text, or leave it out")
        inputs = encode_inputs(
            self.processor,
            [read_photo(data.get("inputs"))],
            question,
            [read_focal_length(parameters.get("focal_length"))],
            parameters.get("max_pixels"),
        )
        with torch.inference_mode():
            camera, depth, answer = predict(self.model, self.processor, inputs, question is not None)[0]
        camera = describe_camera(camera)
        files = {}
        if "png" in outputs:
            files["png"] = depth_png(depth)
        if "npz" in outputs:
            files["npz"] = depth_npz(depth.astype(np.float16), camera, compress=True)
        encoded = {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}
        return encoded | {"camera": camera, "answer": answer}


def read_photo(photo) -> bytes | Image.Image:
    """What a request holds -> what the processor takes, without a path or a URL ever being followed."""
    if isinstance(photo, (bytes, Image.Image)):
        return photo
    if not isinstance(photo, str):
        raise ValueError(f"inputs is a {type(photo).__name__}; send the photo's bytes, base64 of them, or a data URL")
    content = photo.partition(";base64,")[2] if photo.startswith("data:") else photo
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise ValueError(
            f"inputs is text, {photo[:40]!r}, that is no base64 of a file; paths and URLs are not read, send the photo"
        ) from error


def read_focal_length(value) -> float | tuple[float, ...] | None:
    """A number, its text (as a query gives it), `[fx, fy]` or `None`."""
    try:
        if isinstance(value, list):
            return tuple(float(part) for part in value)
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"focal_length is {value!r}; pass px at the photo's own size, or [fx, fy]") from error


def encode_inputs(
    processor, photos: list, question: str | None, focal_lengths: list, max_pixels: int | None
) -> Mapping:
    """The batch for `predict`: the depth prompt or a question, after the same system message."""
    text = processor.depth_text() if question is None else processor.depth_text(question)
    return processor(
        images=photos,
        text=[text] * len(photos),
        focal_lengths=focal_lengths,
        max_pixels=max_pixels,
        uint8_patches=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def predict(
    model, processor, inputs, answers: bool, max_new_tokens: int = MAX_NEW_TOKENS, processed_size: bool = False
) -> list[tuple[dict, np.ndarray, str | None]]:
    """
    (camera, z-depth in metres `(height, width)`, answer) of each photo of a batch of `encode_inputs`, from one pass.

    answers: whether the batch asks a question; without one there is no answer, and only the prefill runs.
    processed_size: leave maps at the size that the network works at; default: at the photo's.
    """
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = processor.normalize_patches(inputs["pixel_values"])
    if answers:
        outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
        new_tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    else:
        outputs = model(**inputs, logits_to_keep=1)
        texts = [None] * len(outputs.cameras)
    sizes = [camera["processed_size"] for camera in outputs.cameras] if processed_size else None
    depths = processor.post_process_depth_estimation(outputs, sizes)
    return [
        (camera, depth["predicted_depth"].cpu().numpy(), text)
        for camera, depth, text in zip(outputs.cameras, depths, texts, strict=True)
    ]


def describe_camera(camera: dict, principal_point: tuple[float, float] | None = None) -> dict:
    """
    A processor's camera for files and replies.

    Returns `width`, `height`, `fx`, `fy`, `cx`, `cy` in px of the photo, the centre of its first pixel being (0, 0),
    `focal_length_source`, and `processed_size` (height, width). principal_point: (cx, cy); default: the photo's middle.
    """
    height, width = camera["size"]
    fx, fy = np.broadcast_to(camera["focal_length"], 2).tolist()
    cx, cy = ((width - 1) / 2, (height - 1) / 2) if principal_point is None else principal_point
    return {
        "width": width,
        "height": height,
        "fx": fx,
        "fy": fy,
        "cx": cx,
        "cy": cy,
        "focal_length_source": camera["focal_length_source"],
        "processed_size": list(camera["processed_size"]),
    }


def depth_png(depth: np.ndarray) -> bytes:
    """A 16-bit PNG in millimetres; what lies beyond 65.535 m becomes 65535."""
    millimetres = np.minimum(np.rint(depth * 1000), MAX_MILLIMETRES).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(millimetres).save(file, "png", compress_level=1)  # the default takes six times as long for 6 %
    return file.getvalue()


def depth_npz(depth: np.ndarray, camera: dict, compress: bool = False, **fields) -> bytes:
    """`depth` as it is, `camera`'s entries and `fields`, each an array, in a file for `numpy.load`."""
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, depth=depth, **camera, **fields)
    return file.getvalue()
