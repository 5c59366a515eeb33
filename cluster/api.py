"""Requests and replies of the service: OpenAI's chat completions with depth beside the answer, and depth alone."""

import base64
import io
import time
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from transformers import BatchFeature

from depthvlm.handler import depth_npz, depth_png, describe_camera
from depthvlm.photos_depthvlm import open_image_file
from depthvlm.processing_depthvlm import SYSTEM_PROMPT, DepthVLMProcessor

from .photos import encode
from .settings import Settings
from .waves import Depth, Sampling

FocalLength = float | tuple[float, float]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, {"Retry-After": str(retry_after)} if retry_after else {}
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


# Requests


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # OpenAI's; the budget here is max_pixels


class ImagePart(StrictModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(StrictModel):
    include_usage: bool = False


class DepthOptions(StrictModel):
    """
    Of depth, in both requests. The client's `extra_body` sends them with a chat completion.

    depth: "png", 16 bits in millimetres (0 = none, 65535 = that or farther), or "npz", float16 metres; both in base64.
        Of a chat completion, `None` leaves depth out.
    max_pixels: budget for each processed photo.
    """

    depth: Literal["png", "npz"] | None = None
    max_pixels: PositiveInt | None = None


class ChatRequest(DepthOptions):
    """
    POST /v1/chat/completions: OpenAI's, as far as this model can follow, and `DepthOptions`.

    focal_lengths: px at the photos' own size or [fx, fy], one for all photos or one per photo in their order; `None`:
        from EXIF, else assumed.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Literal[1] = 1
    user: str | None = None
    focal_lengths: FocalLength | list[FocalLength | None] | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p if self.temperature else 1.0)


class DepthRequest(DepthOptions):
    """POST /v1/depth. image: a data URL. focal_length: px at the photo's own size, or [fx, fy]."""

    image: str
    depth: Literal["png", "npz"] = "png"
    focal_length: FocalLength | None = None


def encode_chat(processor: DepthVLMProcessor, request: ChatRequest, limits: Settings) -> BatchFeature:
    """A request's conversation as a row of a wave. Without a system message it begins with the project's."""
    photos, conversation = [], []
    for message in request.messages:
        parts = message.content
        if isinstance(parts, str):
            parts = [TextPart(type="text", text=parts)]
        photos += [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        content = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in parts
        ]
        conversation.append({"role": message.role, "content": content})
    if conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return encode_row(processor, photos, text, request.focal_lengths, request.max_pixels, limits)


def encode_depth_request(processor: DepthVLMProcessor, request: DepthRequest, limits: Settings) -> BatchFeature:
    focal_lengths = None if request.focal_length is None else [request.focal_length]
    return encode_row(processor, [request.image], processor.depth_text(), focal_lengths, request.max_pixels, limits)


def encode_row(processor, urls: list[str], text: str, focal_lengths, max_pixels, limits: Settings) -> BatchFeature:
    if len(urls) > limits.max_images:
        raise ApiError(413, f"the request has {len(urls)} images; send at most {limits.max_images}")
    photos = [read_photo(url, limits.max_image_pixels) for url in urls]
    try:
        row = encode(processor, photos, text, focal_lengths, max_pixels)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error)) from error
    tokens = row["input_ids"].shape[1]
    if tokens > limits.max_prompt_tokens:
        raise ApiError(
            413,
            f"the prompt has {tokens} tokens with its images; send at most {limits.max_prompt_tokens}, with fewer "
            "images, a smaller max_pixels or less text",
        )
    return row


def read_photo(url: str, max_pixels: int) -> bytes:
    """The bytes of a data URL; nothing else is opened: no address, no file."""
    head, comma, content = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise ApiError(
            400, f"an image is {url[:40]!r}; send data:image/...;base64,...: no address and no file is opened here"
        )
    try:
        photo = base64.b64decode(content, validate=True)
    except ValueError as error:
        raise ApiError(400, f"an image's base64 cannot be decoded: {error}") from error
    try:
        with open_image_file(io.BytesIO(photo)) as image:
            width, height = image.size
    except Exception:  # the processor says what is wrong with it
        return photo
    if width * height > max_pixels:
        raise ApiError(413, f"an image has {width}x{height} pixels; send at most {max_pixels}")
    return photo


# Replies


def depth_reply(depth: Depth, encoding: str) -> list[dict]:
    """Per photo its map, in base64 under the name of its encoding, and its camera."""
    replies = []
    for metres, camera in zip(depth.maps, depth.cameras, strict=True):
        camera = describe_camera(camera)
        if encoding == "png":
            file = depth_png(metres)
        else:
            file = depth_npz(metres.astype(np.float16), camera, compress=True)
        replies.append({encoding: base64.b64encode(file).decode("ascii"), "camera": camera})
    return replies


def usage(prompt_tokens: int, answer_tokens: int) -> dict:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def completion(request_id: str, model: str, text: str, reason: str, used: dict, depth: list[dict] | None) -> dict:
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": used,
    } | ({} if depth is None else {"depth": depth})


def chunk(request_id: str, model: str, delta: dict | None, reason: str | None = None, **fields) -> dict:
    """One event of a stream; without `delta` it has no choices, as OpenAI's last one with `usage`."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
    } | fields
