"""DepthVLMProcessor: focal lengths, the token grid, metres there and back, and what it refuses."""

import base64
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational
from scipy.ndimage import map_coordinates
from tiny import ROOT, SPECIAL_TOKENS, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DEPTH_PROMPT, SYSTEM_PROMPT, DepthVLMPipeline, DepthVLMProcessor

TOKEN = 32  # px
CHAT_TEMPLATE = (ROOT / "chat_template.jinja").read_text()
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
ORIENTATION, EXIF_IFD, FOCAL_35MM = 274, 0x8769, 41989
FOCAL_MM, PLANE_RESOLUTION, PLANE_UNIT, EXIF_WIDTH, EXIF_HEIGHT = 37386, 41486, 41488, 40962, 40963


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny checkpoint's tokenizer, but learnt from a sentence."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [DEPTH_PROMPT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def image_processor(shortest=TOKEN**2, longest=2**21, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """As Qwen3-VL's, with a budget in pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": shortest, "longest_edge": longest},
        image_mean=list(mean),
        image_std=list(std),
    )


@pytest.fixture(scope="module")
def make_processor(tokenizer):
    def make(shortest=TOKEN**2, longest=2**21, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **settings):
        photos = image_processor(shortest, longest, mean, std)
        return DepthVLMProcessor(photos, tokenizer, chat_template=CHAT_TEMPLATE, **settings)

    return make


@pytest.fixture(scope="module")
def processor(make_processor):
    return make_processor()


@pytest.fixture(scope="module")
def small(make_processor):
    """For tests in which the processed size plays no part."""
    return make_processor(longest=16 * TOKEN**2)


@pytest.fixture(scope="module")
def model(tokenizer):
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return tiny_model(**{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()})


class PlainProcessor(Qwen3VLProcessor):
    """Qwen3-VL's own; without a video processor in the signature it needs no torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(width, height, seed=0):
    return Image.fromarray(noise(width, height, seed=seed))


def picture(batch, index=0):
    """The `index`-th processed image, float64 `(H, W, 3)` in 0..255, put together from the patches."""
    grids = np.asarray(batch["image_grid_thw"])
    starts = np.concatenate([[0], np.cumsum(grids.prod(1))])
    patches = np.asarray(batch["pixel_values"], dtype=np.float64)[starts[index] : starts[index + 1]]
    _, rows, columns = grids[index]
    blocks = patches.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 16, 16)[:, :, :, :, :, 0]  # both frames are the photo
    return (blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * 16, columns * 16, 3) * 0.5 + 0.5) * 255


def unchanged(processor, image):
    """What becomes of an image that needs no resize: whole tokens wide and high, and f = f_c."""
    batch = processor(images=[image], focal_lengths=processor.canonical_focal_length, return_tensors="pt")
    assert batch["cameras"][0]["size"] == batch["cameras"][0]["processed_size"]
    return picture(batch)


def camera(processor, image, **arguments):
    (entry,) = processor(images=[image], **arguments)["cameras"]
    return entry


def outputs_of(batch, depth):
    return SimpleNamespace(predicted_depth=tuple(depth), cameras=batch["cameras"])


def refused(call, *words, error=ValueError):
    """It is refused in one sentence with these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and not re.search(r"[.!?] [A-Z]", message), message
    for word in words:
        assert str(word) in message, message


# ---- where the focal length comes from


@pytest.mark.parametrize(
    "given",
    [700.0, 700, np.float32(700), np.array(700), torch.tensor(700.0), np.float64(700)],
    ids=["float", "int", "float32", "0-d array", "0-d tensor", "float64"],
)
def test_one_focal_length_holds_for_all_photos(small, given):
    cameras = small(images=[photo(64, 48), photo(48, 64)], focal_lengths=given)["cameras"]
    assert [(entry["focal_length"], entry["focal_length_source"]) for entry in cameras] == [(700.0, "given")] * 2
    assert [entry["size"] for entry in cameras] == [(48, 64), (64, 48)]
    assert all(type(entry["focal_length"]) is float for entry in cameras)


@pytest.mark.parametrize(
    "given",
    [
        [300.0, 450.0, 60],
        (300, 450.0, 60),
        np.array([300, 450, 60]),
        torch.tensor([300.0, 450, 60]),
        [[300.0], [450, 60]],
    ],
    ids=["list", "tuple", "array", "tensor", "nested"],
)
def test_focal_lengths_follow_the_order_of_the_photos(small, given):
    cameras = small(images=[photo(64, 48), photo(48, 64), photo(64, 64)], focal_lengths=given)["cameras"]
    assert [entry["focal_length"] for entry in cameras] == [300.0, 450.0, 60.0]


def test_none_in_the_list_falls_back_for_that_photo_alone(small):
    exif = {FOCAL_35MM: 26}
    images = [photo(400, 300), with_exif(photo(400, 300), exif), with_exif(photo(400, 300), exif)]
    cameras = small(images=images, focal_lengths=[None, None, 500])["cameras"]
    assert [entry["focal_length_source"] for entry in cameras] == ["assumed", "exif", "given"]
    assert [round(entry["focal_length"], 3) for entry in cameras] == [346.410, 300.463, 500.0]


@pytest.mark.parametrize("fov, width, height, expected", [(60, 640, 480, 554.256), (90, 480, 640, 320.0)])
def test_the_assumed_field_of_view_is_over_the_longer_side(make_processor, fov, width, height, expected):
    entry = camera(make_processor(default_fov=fov), photo(width, height))
    assert entry["focal_length"] == pytest.approx(expected, abs=1e-3)
    assert entry["focal_length_source"] == "assumed"


def exif_of(tags, orientation=None):
    exif = Image.Exif()
    exif[271] = "Maker"  # Pillow writes no EXIF that has nothing in its main directory
    exif.get_ifd(EXIF_IFD).update(tags)
    if orientation is not None:
        exif[ORIENTATION] = orientation
    return exif


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_exif(image, tags=(), orientation=None, form="JPEG"):
    data = encoded(image, form, exif=exif_of(dict(tags), orientation))
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_35_mm_equivalent_is_over_the_diagonal(small, form):
    # 26 mm on a diagonal of 43.26661530556787 mm; the photo's diagonal is 500 px
    entry = camera(small, with_exif(photo(400, 300), {FOCAL_35MM: 26}, form=form))
    assert entry["focal_length"] == pytest.approx(300.4626, abs=1e-4)
    assert entry["focal_length_source"] == "exif"


@pytest.mark.parametrize("orientation", [6, 8])
def test_35_mm_equivalent_of_a_portrait(small, orientation):
    entry = camera(small, with_exif(photo(400, 300), {FOCAL_35MM: 26}, orientation))
    assert entry["size"] == (400, 300)  # upright
    assert entry["focal_length"] == pytest.approx(300.4626, abs=1e-4)


# 4.2 mm lens, 20000 px an inch on a sensor 4000 px wide: 4.2 / 25.4 * 20000 = 3307.087 px there
FOCAL_PLANE = {
    "inch": {PLANE_RESOLUTION: IFDRational(20000, 1), PLANE_UNIT: 2},
    "inch by default": {PLANE_RESOLUTION: IFDRational(20000, 1)},
    "cm": {PLANE_RESOLUTION: IFDRational(2000000, 254), PLANE_UNIT: 3},
    "mm": {PLANE_RESOLUTION: IFDRational(200000, 254), PLANE_UNIT: 4},
    "micrometre": {PLANE_RESOLUTION: IFDRational(200, 254), PLANE_UNIT: 5},
}


@pytest.mark.parametrize("unit", FOCAL_PLANE)
@pytest.mark.parametrize("size", [(400, 300), (1000, 750)])
def test_focal_plane_tags_in_every_unit_for_a_shrunk_photo(small, unit, size):
    tags = {FOCAL_MM: IFDRational(42, 10), EXIF_WIDTH: 4000, **FOCAL_PLANE[unit]}
    entry = camera(small, with_exif(photo(*size), tags))
    assert entry["focal_length"] == pytest.approx(3307.0866 * size[0] / 4000, rel=1e-6)
    assert entry["focal_length_source"] == "exif"


def test_focal_plane_tags_without_the_width_are_for_the_photo_as_it_is(small):
    entry = camera(small, with_exif(photo(400, 300), {FOCAL_MM: IFDRational(5), PLANE_RESOLUTION: IFDRational(2540)}))
    assert entry["focal_length"] == pytest.approx(500)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_focal_plane_tags_of_a_turned_photo(small, orientation):
    tags = {FOCAL_MM: IFDRational(42, 10), EXIF_WIDTH: 4000, EXIF_HEIGHT: 3000, **FOCAL_PLANE["inch"]}
    stored = with_exif(photo(400, 300), tags, orientation)
    upright = ImageOps.exif_transpose(stored)  # as many callers do; the tags for the stored width stay
    for image in (stored, upright):
        assert camera(small, image)["focal_length"] == pytest.approx(330.70866)


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_of_a_crop_is_not_believed(small, orientation):
    tags = {FOCAL_35MM: 26, EXIF_WIDTH: 400, EXIF_HEIGHT: 300}
    stored = with_exif(photo(400, 300), tags, orientation)
    stored.load()
    for whole in (stored, stored.resize((201, 150)), stored.reduce(3)):
        whole.info = stored.info
        assert camera(small, whole)["focal_length_source"] == "exif"
    for box in ((0, 0, 300, 300), (0, 0, 400, 225), (50, 0, 350, 300)):
        crop = stored.crop(box)
        assert crop.getexif()  # Pillow keeps the tags
        assert camera(small, crop)["focal_length_source"] == "assumed"


def test_35_mm_equivalent_of_zero_means_unknown_and_gives_way_to_the_focal_plane(small):
    tags = {FOCAL_35MM: 0, FOCAL_MM: IFDRational(5), PLANE_RESOLUTION: IFDRational(2540)}
    assert camera(small, with_exif(photo(400, 300), tags))["focal_length"] == pytest.approx(500)


BROKEN_EXIF = {
    "zero": {FOCAL_35MM: 0},
    "text": {FOCAL_35MM: "wide"},
    "a pair": {FOCAL_35MM: (26, 27)},
    "wider than any lens": {FOCAL_35MM: 1},
    "longer than any lens": {FOCAL_35MM: 65535},
    "millimetres alone": {FOCAL_MM: IFDRational(42, 10)},
    "no resolution": {FOCAL_MM: IFDRational(42, 10), PLANE_RESOLUTION: IFDRational(0, 0)},
    "lens of zero": {FOCAL_MM: IFDRational(0, 1), PLANE_RESOLUTION: IFDRational(2540)},
    "unit without a size": {FOCAL_MM: IFDRational(5), PLANE_RESOLUTION: IFDRational(2540), PLANE_UNIT: 1},
    "unknown unit": {FOCAL_MM: IFDRational(5), PLANE_RESOLUTION: IFDRational(2540), PLANE_UNIT: 77},
    "width far too large": {FOCAL_MM: IFDRational(5), PLANE_RESOLUTION: IFDRational(2540), EXIF_WIDTH: 10**7},
}


@pytest.mark.parametrize("tags", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_exif_that_says_nothing_sensible_is_no_focal_length(small, tags):
    entry = camera(small, with_exif(photo(400, 300), tags))
    assert entry["focal_length_source"] == "assumed"
    assert entry["focal_length"] == pytest.approx(200 * math.sqrt(3))  # 60 degrees over 400 px


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_never_stops_a_photo(small):
    whole = bytearray(exif_of({FOCAL_35MM: 26, FOCAL_MM: IFDRational(42, 10), **FOCAL_PLANE["cm"]}, 6).tobytes())
    random = np.random.default_rng(0)
    for number in range(40):
        damaged = whole.copy()
        for place in random.integers(6, len(whole), 1 + number % 5):
            damaged[place] = random.integers(256)
        image = Image.open(io.BytesIO(encoded(photo(40, 32), "JPEG", exif=bytes(damaged))))
        assert camera(small, image)["focal_length_source"] in ("exif", "assumed")
    garbage = encoded(photo(40, 32), "JPEG", exif=b"Exif\0\0nothing that TIFF knows")
    assert camera(small, Image.open(io.BytesIO(garbage)))["focal_length_source"] == "assumed"


TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_honoured(processor, orientation):
    stored = noise(96, 64)
    image = with_exif(Image.fromarray(stored), orientation=orientation, form="PNG")
    np.testing.assert_allclose(unchanged(processor, image), TURNS[orientation](stored), atol=1e-3)


# ---- every way to a photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos as files: EXIF with orientation and focal plane, 16-bit gray, transparency."""
    folder = tmp_path_factory.mktemp("photos")
    tags = {FOCAL_MM: IFDRational(42, 10), EXIF_WIDTH: 4000, EXIF_HEIGHT: 2667, **FOCAL_PLANE["inch"]}
    for name, form in (("turned.jpg", "JPEG"), ("turned.png", "PNG")):
        (folder / name).write_bytes(encoded(photo(96, 64), form, exif=exif_of(tags, 6)))
    Image.fromarray(noise(96, 64, 1).astype(np.uint16) * 257).save(folder / "gray16.png")
    Image.fromarray(noise(96, 64, 4)).save(folder / "transparent.png")
    return folder


PHOTO_FILES = ["turned.jpg", "turned.png", "gray16.png", "transparent.png"]


@pytest.fixture
def url(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def assert_same(batch, other):
    assert batch["cameras"] == other["cameras"]
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    assert torch.equal(batch["input_ids"], other["input_ids"])


@pytest.mark.parametrize("name", PHOTO_FILES)
def test_path_url_base64_and_pil_image_are_the_same_photo(processor, folder, url, name):
    path = folder / name
    data = base64.b64encode(path.read_bytes()).decode()
    expected = processor(images=Image.open(path), return_tensors="pt")
    source = "exif" if name.startswith("turned") else "assumed"
    assert expected["cameras"][0]["focal_length_source"] == source
    for image in (path, str(path), f"{url}/{name}", data, f"data:image/png;base64,{data}"):
        assert_same(processor(images=image, return_tensors="pt"), expected)


def test_urls_may_hold_what_people_write(processor, folder, url):
    shutil.copy(folder / "gray16.png", folder / "Küche 1.png")
    expected = processor(images=folder / "gray16.png", return_tensors="pt")
    for name in ("Küche 1.png", "K%C3%BCche%201.png"):
        assert_same(processor(images=f"{url}/{name}", return_tensors="pt"), expected)


def test_what_a_wrong_path_is_is_said(processor, folder):
    for name in ("Küche 2.png", "photos/room1", "abcd"):  # the last two are base64 as well
        refused(lambda name=name: processor(name), name, "no such file")
    refused(lambda: processor(str(folder)), folder.name, "it is a folder")


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_chat_template_keeps_exif(processor, folder, url, key):
    path = folder / "turned.jpg"
    places = {"image": str(path), "path": str(path), "url": f"{url}/{path.name}"}
    place = places.get(key) or base64.b64encode(path.read_bytes()).decode()
    entry = chat(processor, [user({"type": "image", key: place}, "How far?")])["cameras"][0]
    assert entry["size"] == (96, 64)
    assert entry["focal_length_source"] == "exif"
    assert entry["focal_length"] == pytest.approx(3307.0866 * 96 / 4000)


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def image_part(*size, **arguments):
    return {"type": "image", "image": photo(*size, **arguments)}


def chat(processor, messages, **processor_kwargs):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=processor_kwargs
    )


def prompt(processor, messages, **processor_kwargs):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def test_a_focal_length_beside_the_image_is_refused(processor):
    for message in (
        user(image_part(64, 48) | {"focal_length": 700}, "?"),
        user(image_part(64, 48) | {"max_pixels": 4096}),
    ):
        for messages in ([message], [[message], [message]]):
            refused(lambda m=messages: chat(processor, m), "would be ignored there; pass", error=TypeError)
    messages = [user(image_part(64, 48), "?")]
    refused(lambda: processor.apply_chat_template(messages, focal_length=700), "focal_length", error=TypeError)
    refused(lambda: chat(processor, messages, focal_length=700), "focal_length cannot be set", error=TypeError)


def test_chat_template_takes_focal_lengths_depth_maps_and_max_pixels(processor):
    messages = [user(image_part(64, 48), image_part(48, 64), "Compare them.")]
    depth = [np.full((48, 64), 2.0), None]
    batch = chat(processor, messages, focal_lengths=[700, None], depth_maps=depth, max_pixels=4 * TOKEN**2)
    assert [entry["focal_length_source"] for entry in batch["cameras"]] == ["given", "assumed"]
    assert all(math.prod(entry["processed_size"]) <= 4 * TOKEN**2 for entry in batch["cameras"])
    assert len(batch["depth_labels"]) == 2
    text = processor.apply_chat_template(messages)
    images = [part["image"] for part in messages[0]["content"][:2]]
    assert_same(batch, processor(images, text, focal_lengths=[700, None], max_pixels=4 * TOKEN**2, return_tensors="pt"))


def test_chat_template_batch_with_rows_of_zero_one_and_two_photos(processor):
    rows = [
        [user(image_part(64, 48), "a")],
        [user("no photo here")],
        [user(image_part(48, 64, seed=1), image_part(96, 64, seed=2), "b")],
    ]
    batch = chat(processor, rows, focal_lengths=[[500], [], [600, 1000]], padding=True)
    assert [entry["focal_length"] for entry in batch["cameras"]] == [500, 600, 1000]
    tokens = (batch["input_ids"] == processor.image_token_id).sum(1)
    areas = [math.prod(entry["processed_size"]) // TOKEN**2 for entry in batch["cameras"]]
    assert tokens.tolist() == [areas[0], 0, areas[1] + areas[2]]
    np.testing.assert_allclose(picture(batch, 2), noise(96, 64, seed=2), atol=1e-3)  # at f_c as it is
    alone = chat(processor, rows[1])
    assert torch.equal(alone["input_ids"][0], batch["input_ids"][1][batch["attention_mask"][1] == 1])


def test_nested_lists_are_the_photos_of_each_row(processor):
    images, text = [photo(64, 48), photo(48, 64), photo(96, 64)], [PLACEHOLDER, PLACEHOLDER * 2]
    flat = processor(images, text, padding=True, return_tensors="pt")
    assert_same(processor([images[:1], images[1:]], text, padding=True, return_tensors="pt"), flat)
    assert_same(processor((images[0], (images[1], images[2])), text, padding=True, return_tensors="pt"), flat)
    # three in all, but not where they are asked for
    refused(lambda: processor([images[:1], images[1:]], text[::-1], padding=True), "images", "text", "placeholder")


def test_without_text_each_photo_gets_the_depth_prompt(processor):
    batch = processor(images=[photo(64, 32), photo(96, 96)], focal_lengths=1000, return_tensors="pt")
    rows = processor.batch_decode(batch["input_ids"])
    for row, tokens in zip(rows, (2, 9), strict=True):
        assert row.count("<|image_pad|>") == tokens
        asked = row.replace("<|image_pad|>" * tokens, "<|image_pad|>").replace("<|endoftext|>", "")
        assert asked == (
            f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
            f"<|im_start|>user\n{PLACEHOLDER}{DEPTH_PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        )
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[1] - lengths[0] == 7 and lengths[1] == batch["input_ids"].shape[1]


def test_without_images_text_is_qwens(processor, tokenizer):
    text = ["How far is the chair?", "Is 2.5 m less than 3 m?"]
    ours = processor(text=text, padding=True, return_tensors="pt")
    plain = PlainProcessor(image_processor(), tokenizer)(text=text, padding=True, return_tensors="pt")
    assert set(ours) == set(plain) and all(torch.equal(ours[name], plain[name]) for name in plain)
    assert torch.equal(
        processor(text=text[0], return_tensors="pt")["input_ids"][0],
        plain["input_ids"][0, : len(tokenizer(text[0])["input_ids"])],
    )


# ---- every kind of picture, 96x64, unchanged by the resize


def opaque(gray_or_colour, alpha):
    """Alpha blending over white."""
    weight = alpha[..., None] / 255.0
    return gray_or_colour * weight + 255 * (1 - weight)


def gray(values):
    return np.repeat(np.asarray(values, dtype=np.float64)[..., None], 3, axis=-1)


def palette_image(transparency=None):
    image = Image.fromarray(noise(96, 64, 1) % 4, "L").copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0, 5, 5, 250])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def saved_and_opened(image, form="PNG", **options):
    return Image.open(io.BytesIO(encoded(image, form, **options)))


COLOURS = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [5, 5, 250]], dtype=np.float64)
GRAY, RGB, RGBA = noise(96, 64, 1), noise(96, 64, 3), noise(96, 64, 4)
DEEP = np.random.default_rng(1).integers(0, 65536, (64, 96))
INDEX = GRAY % 4
ON_WHITE = np.array([[10, 20, 30], [200, 100, 50], [255, 255, 255], [5, 5, 250]], dtype=np.float64)
LUMA = np.stack([GRAY, np.full_like(GRAY, 128), np.full_like(GRAY, 128)], -1)

PICTURES = {
    "L": (Image.fromarray(GRAY), gray(GRAY)),
    "LA": (Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(RGB[..., 0])]), opaque(gray(GRAY), RGB[..., 0])),
    "P": (palette_image(), COLOURS[INDEX]),
    "P with a transparent colour": (saved_and_opened(palette_image(), transparency=2), ON_WHITE[INDEX]),
    "P with transparency in bytes": (palette_image(bytes([255, 255, 0, 255])), ON_WHITE[INDEX]),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGB with a transparent colour": (
        saved_and_opened(Image.fromarray(COLOURS[INDEX].astype(np.uint8)), transparency=(0, 255, 0)),
        ON_WHITE[INDEX],
    ),
    "RGBA": (Image.fromarray(RGBA), opaque(RGBA[..., :3], RGBA[..., 3])),
    "1": (Image.fromarray(GRAY > 127), gray((GRAY > 127) * 255)),
    "I;16": (Image.fromarray(DEEP.astype(np.uint16)), gray(DEEP / 257)),
    "I;16B": (Image.frombytes("I;16B", (96, 64), DEEP.astype(">u2").tobytes()), gray(DEEP / 257)),
    "I;16 that is dark": (Image.fromarray((DEEP // 512).astype(np.uint16)), gray(DEEP // 512 / 257)),
    "I": (Image.fromarray(DEEP.astype(np.int32)), gray(DEEP / 257)),
    "I of 8 bits": (Image.fromarray(GRAY.astype(np.int32)), gray(GRAY)),
    "F": (Image.fromarray(GRAY.astype(np.float32) / 255), gray(GRAY)),
    "CMYK": (
        Image.fromarray(np.concatenate([RGB, np.zeros_like(RGB[..., :1])], -1), "CMYK"),
        255.0 - RGB,
    ),
    "YCbCr": (Image.fromarray(LUMA, "YCbCr"), gray(GRAY)),
}
ARRAYS = {
    "array (H, W)": (GRAY, gray(GRAY)),
    "array (H, W, 1)": (GRAY[..., None], gray(GRAY)),
    "array (H, W, 3)": (RGB, RGB),
    "array (3, H, W)": (RGB.transpose(2, 0, 1), RGB),
    "array (H, W, 4)": (RGBA, opaque(RGBA[..., :3], RGBA[..., 3])),
    "array (H, W), 16 bits": (DEEP.astype(np.uint16), gray(DEEP / 257)),
    "array (H, W), int64": (GRAY.astype(np.int64), gray(GRAY)),
    "array (H, W), float": (GRAY / 255, gray(GRAY)),
    "array (H, W, 3), float": (RGB / 255, RGB),
    "array (H, W, 3), all white": (np.ones((64, 96, 3), np.float32), np.full((64, 96, 3), 255)),
    "array (H, W), bool": (GRAY > 127, gray((GRAY > 127) * 255)),
    "tensor (H, W)": (torch.from_numpy(GRAY), gray(GRAY)),
    "tensor (3, H, W)": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), RGB),
    "tensor (H, W, 3)": (torch.from_numpy(RGB), RGB),
    "tensor (3, H, W), float": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()) / 255, RGB),
    "tensor that requires grad": ((torch.from_numpy(RGB) / 255).requires_grad_(), RGB),
}


@pytest.mark.parametrize("image, expected", [*PICTURES.values(), *ARRAYS.values()], ids=[*PICTURES, *ARRAYS])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_every_kind_of_picture_becomes_rgb(processor, image, expected):
    np.testing.assert_allclose(unchanged(processor, image), expected, atol=1.001)  # one step of rounding


def test_a_cmyk_jpeg_is_read(processor, tmp_path):
    Image.new("CMYK", (96, 64), (255, 0, 0, 0)).save(tmp_path / "press.jpg")
    np.testing.assert_allclose(
        unchanged(processor, tmp_path / "press.jpg"), np.full((64, 96, 3), (0, 255, 255)), atol=2
    )


# ---- focal normalization and the token grid


@pytest.mark.parametrize(
    "size, focal_length, canonical, processed, scale",
    [
        ((640, 480), 559.62, (1144, 858), (1152, 864), 1.007316),  # iBims-1: both sides by 1.8
        ((561, 427), 518.8579, (1081, 823), (1088, 832), 1.008624),  # NYUv2
        ((1920, 1440), 1430.0, (1343, 1007), (1344, 992), 0.993024),  # ScanNet++
    ],
)
def test_canonical_size_rounded_to_whole_tokens(processor, size, focal_length, canonical, processed, scale):
    entry = camera(processor, Image.new("L", size), focal_lengths=focal_length)
    assert entry["processed_size"] == processed[::-1]
    assert entry["metric_scale"] == pytest.approx(scale, abs=1e-6)
    assert canonical == tuple(round(side * 1000 / focal_length) for side in size)
    assert all(abs(side - ideal) <= TOKEN / 2 for side, ideal in zip(processed, canonical, strict=True))


def test_at_the_canonical_size_the_scale_is_one_up_to_the_rounding(processor):
    random = np.random.default_rng(0)
    for _ in range(20):
        width, height = random.integers(80, 300, 2).tolist()
        focal_length = random.uniform(0.8, 2) * max(width, height)
        entry = camera(processor, Image.new("L", (width, height)), focal_lengths=focal_length)
        canonical = [side * 1000 / focal_length for side in (height, width)]
        worst = math.sqrt(math.prod(1 + TOKEN / 2 / side for side in canonical))
        assert 2 - worst <= entry["metric_scale"] <= worst
        zooms = [side / old for side, old in zip(entry["processed_size"], (height, width), strict=True)]
        assert entry["metric_scale"] == pytest.approx(focal_length * math.sqrt(zooms[0] * zooms[1]) / 1000)


def test_a_canonical_photo_of_whole_tokens_is_not_touched(processor):
    entry = camera(processor, photo(96, 64), focal_lengths=1000)
    assert entry["metric_scale"] == 1 and entry["processed_size"] == (64, 96)
    np.testing.assert_allclose(unchanged(processor, photo(96, 64)), noise(96, 64), atol=1e-3)


def test_one_resize_and_the_image_processors_own_pixels(processor, tokenizer, monkeypatch):
    image, resize, calls = photo(200, 150), Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda *arguments: calls.append(1) or resize(*arguments))
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "resize", lambda *_, **__: pytest.fail("a second resize"))
    batch = processor(images=image, text=PLACEHOLDER, focal_lengths=180, return_tensors="pt")
    assert len(calls) == 1
    height, width = batch["cameras"][0]["processed_size"]
    resized = resize(image, (width, height), Image.Resampling.BILINEAR)
    own = image_processor()(images=resized, do_resize=False, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], own["pixel_values"])
    plain = PlainProcessor(image_processor(), tokenizer)(
        images=resized, text=PLACEHOLDER, do_resize=False, return_tensors="pt"
    )
    assert set(batch) == {*plain, "cameras"}
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


# ---- Qwen3-VL's own sizes, 8-bit patches, pixels that are not square


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (2480, 3508), (33, 1700)], ids=str)
def test_without_focal_normalization_a_photo_is_the_base_models(make_processor, tokenizer, model, size):
    """Ids, pixels and logits of Qwen3-VL's own processor and model, bit for bit; metres by the assumed camera."""
    processor, image = make_processor(), photo(*size)
    question = [user({"type": "image", "image": image}, "What is this?")]
    ours = chat(processor, question, focal_normalization=False)
    plain = PlainProcessor(image_processor(), tokenizer, chat_template=CHAT_TEMPLATE)
    theirs = chat(plain, question)
    (camera,) = ours.pop("cameras")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert camera["focal_length_source"] == "assumed"
    _, rows, columns = theirs["image_grid_thw"][0].tolist()
    assert camera["processed_size"] == (16 * rows, 16 * columns)
    zoom = math.sqrt(16 * rows / size[1] * 16 * columns / size[0])
    assert camera["metric_scale"] == pytest.approx(camera["focal_length"] * zoom / 1000)
    if size[0] * size[1] < 10**6:
        base = Qwen3VLForConditionalGeneration(model.config).eval()
        base.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            assert torch.equal(model(**ours, cameras=[camera]).logits, base(**theirs).logits)


def test_a_processor_may_be_made_without_focal_normalization(make_processor, tokenizer):
    """Then it takes what Qwen3-VL's takes, for programs that size photos by themselves."""
    processor = make_processor(focal_normalization=False)
    plain = PlainProcessor(image_processor(), tokenizer)
    for settings in ({}, {"do_resize": False}, {"size": {"shortest_edge": 1024, "longest_edge": 4096}}):
        arguments = {"images": [photo(96, 64)], "text": PLACEHOLDER, "return_tensors": "pt", "videos": None} | settings
        ours, theirs = processor(**arguments), plain(**arguments)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    refused(lambda: processor(photo(96, 64), focal_length=90.0), "focal_length ", "focal_lengths", error=TypeError)


@pytest.mark.parametrize("normalization", [True, False])
def test_8_bit_patches_are_normalised_to_the_image_processors_bits(make_processor, normalization):
    processor = make_processor(mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28])
    images = [photo(200, 150), photo(90, 70)]
    settings = {"images": images, "focal_normalization": normalization, "return_tensors": "pt"}
    floats, patches = processor(**settings), processor(**settings, uint8_patches=True)
    assert patches["pixel_values"].dtype == torch.uint8
    assert floats["pixel_values"].nbytes == 8 * patches["pixel_values"].nbytes
    assert torch.equal(processor.normalize_patches(patches["pixel_values"]), floats["pixel_values"])
    as_numpy = processor.normalize_patches(patches["pixel_values"].numpy())
    assert as_numpy.dtype == np.float32 and np.array_equal(as_numpy, floats["pixel_values"].numpy())
    for name in ("input_ids", "image_grid_thw"):
        assert torch.equal(patches[name], floats[name])


def test_pixels_that_are_not_square(processor):
    """Each axis is resized by its own focal length, so that the processed photo is one of a canonical camera."""
    (camera,) = processor(photo(640, 480), focal_lengths=[(500.0, 800.0)])["cameras"]
    height, width = camera["processed_size"]
    assert (width, height) == (round(640 * 2 / 32) * 32, round(480 * 1000 / 800 / 32) * 32)
    assert camera["focal_length"] == (500.0, 800.0)
    expected = math.sqrt(500 * width / 640 * 800 * height / 480) / 1000
    assert camera["metric_scale"] == pytest.approx(expected) and 0.97 < expected < 1.03
    depth = torch.full((480, 640), 3.0)
    points = processor.to_point_cloud(depth, camera["focal_length"], (300.0, 200.0))
    assert points[200, 300].tolist() == [0, 0, 3] and points[280, 350].tolist() == pytest.approx([0.3, 0.3, 3])


# ---- a conversation that goes on


@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_follow_up_is_the_conversation_without_encoding_again(processor, model, monkeypatch, max_new_tokens):
    """Against a fresh run over the whole conversation's ids; another photo's prompt runs in between."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    settings["suppress_tokens"] = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[3:]))
    question = [user(image_part(200, 150), "How far is the chair?")]
    inputs = prompt(processor, question)
    first = model.generate(**inputs, **settings)
    other = prompt(processor, [user(image_part(90, 300), "And?")])
    model.generate(**other, **settings)
    calls, encode = [], model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda *a, **k: calls.append(1) or encode(*a, **k))
    following = processor.follow_up(first, "And the table?")
    assert torch.equal(following["input_ids"][:, : first.sequences.shape[1]], first.sequences)
    text = processor.decode(following["input_ids"][0, first.sequences.shape[1] - 1 :])
    assert text.endswith("<|im_end|>\n<|im_start|>user\nAnd the table?<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_end|>") == 2
    second = model.generate(**following, **settings)
    assert not calls and second.predicted_depth == ()
    ids = following["input_ids"]
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1]))
    whole = inputs | {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(second.sequences, model.generate(**whole, **settings).sequences)


def test_follow_up_refuses(processor, model):
    inputs = processor([photo(64, 48)] * 2, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    refused(lambda: processor.follow_up(outputs, "And?"), "2 sequences", "one conversation")


SIZES = [(1, 1), (5, 3), (1, 30), (30, 1), (31, 11), (288, 100), (300, 10), (640, 480), (90, 2700), (3000, 2000)]


@pytest.mark.parametrize("budget", [TOKEN**2, 2 * TOKEN**2 + 5, 50_000, 2**20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixel_budget(make_processor, size, budget):
    floor = 4 * TOKEN**2
    processor, image = make_processor(floor, 2**20), Image.new("L", size)
    ways = [(processor, budget), (make_processor(floor, budget), None)]  # by the call, by the image processor
    for focal_length in (0.3 * max(size), 1.2 * max(size), 40 * max(size)):
        entries = [camera(ours, image, focal_lengths=focal_length, max_pixels=limit) for ours, limit in ways]
        assert entries[0] == entries[1]
        height, width = entries[0]["processed_size"]
        assert height % TOKEN == width % TOKEN == 0 and min(height, width) >= TOKEN
        assert min(floor, budget // TOKEN**2 * TOKEN**2) * 0.49 <= height * width <= budget
        if budget >= 50_000:
            assert height * width >= floor
        if height * width > 16 * TOKEN**2:  # neither side is one token: the shape is the photo's
            assert width / height == pytest.approx(size[0] / size[1], rel=0.5 if max(size) / min(size) > 9 else 0.2)


def test_the_budget_is_used(processor):
    for width, height in ((640, 480), (480, 640), (1000, 333)):
        entry = camera(processor, Image.new("L", (width, height)), focal_lengths=300, max_pixels=200_000)
        assert 0.75 * 200_000 <= math.prod(entry["processed_size"]) <= 200_000


# ---- metres


def plate(width, height, side):
    """White, with a black square of `side` px in the middle, its edges shaded by what they cover."""
    across, down = (
        np.clip(np.minimum(np.arange(n) + 1, (n + side) / 2) - np.maximum(np.arange(n), (n - side) / 2), 0, 1)
        for n in (width, height)
    )
    return Image.fromarray(np.round(255 - 255 * np.outer(down, across)).astype(np.uint8))


@pytest.mark.parametrize("max_pixels", [None, 300_000, 60_000])
@pytest.mark.parametrize(
    "size, focal_length", [((640, 480), 559.62), ((320, 240), 279.81), ((480, 640), 900.0), ((1280, 500), 700.0)]
)
def test_a_network_that_believes_in_f_c_gives_metres(processor, size, focal_length, max_pixels):
    """The fake network knows that the plate is 0.5 m wide and tells its distance by the area that it sees, with f_c."""
    width, z = 0.5, 2.5
    image = plate(*size, width * focal_length / z)
    batch = processor(images=image, focal_lengths=focal_length, max_pixels=max_pixels, return_tensors="pt")
    seen = math.sqrt((255 - picture(batch)[..., 0]).sum() / 255)
    believed = torch.full(batch["cameras"][0]["processed_size"], width * 1000 / seen)
    metres = processor.post_process_depth_estimation(outputs_of(batch, [believed]))[0]["predicted_depth"]
    assert metres.shape == size[::-1]
    np.testing.assert_allclose(metres, z, rtol=3e-3)  # the plate's shaded edges are rounded to 8 bits


@pytest.mark.parametrize("max_pixels", [None, 40_000])
def test_believed_depth_comes_back_as_metres_whatever_the_size(make_processor, max_pixels):
    processor, z = make_processor(canonical_focal_length=500.0), 7.25
    images, focal_lengths = [photo(640, 480), photo(99, 301), photo(33, 32)], [555.5, 220.0, 31.0]
    batch = processor(images=images, focal_lengths=focal_lengths, max_pixels=max_pixels, return_tensors="pt")
    maps = []
    grids = batch["image_grid_thw"].tolist()
    for image, focal_length, (_, rows, columns) in zip(images, focal_lengths, grids, strict=True):
        f_p = focal_length * math.sqrt(rows * 16 / image.height * columns * 16 / image.width)
        maps.append(torch.full((rows * 16, columns * 16), z * 500 / f_p))
    results = processor.post_process_depth_estimation(outputs_of(batch, maps))
    for image, result in zip(images, results, strict=True):
        np.testing.assert_allclose(result["predicted_depth"], np.full((image.height, image.width), z), rtol=1e-6)


def nearest_error(label, scale, shape):
    """The map numbers its entries: which one has each label pixel, and how far off its centre, in entries, at most."""
    number = np.rint(label.double().numpy() * scale).astype(int) - 1
    rows, columns = np.divmod(number, shape[1])
    height, width = label.shape
    down = (np.arange(height)[:, None] + 0.5) / height * shape[0] - (rows + 0.5)
    across = (np.arange(width) + 0.5) / width * shape[1] - (columns + 0.5)
    return max(np.abs(down).max(), np.abs(across).max())


@pytest.mark.parametrize(
    "photo_size, map_shape, focal_length",
    [
        ((1920, 1440), (192, 256), 1430.0),  # ScanNet++'s sensor depth beside its photo
        ((640, 480), (480, 640), 559.62),
        ((561, 427), (427, 561), 518.8579),
        ((100, 75), (150, 200), 90.0),
        ((60, 90), (91, 60), 200.0),
    ],
)
def test_labels_are_the_nearest_pixels_in_the_canonical_camera(processor, photo_size, map_shape, focal_length):
    numbered = 1 + np.arange(math.prod(map_shape), dtype=np.float32).reshape(map_shape)
    batch = processor(Image.new("L", photo_size), focal_lengths=focal_length, depth_maps=numbered)
    (label,), (entry,) = batch["depth_labels"], batch["cameras"]
    assert label.dtype == torch.float32 and label.shape == entry["processed_size"]
    f_p = focal_length * math.sqrt(math.prod(entry["processed_size"]) / math.prod(photo_size))
    assert nearest_error(label, f_p / 1000, map_shape) <= 0.5 + 1e-4


def test_unlabelled_pixels_stay_unlabelled(processor):
    depth = np.random.default_rng(0).uniform(1, 5, (64, 96)).astype(np.float32)
    depth[noise(96, 64, 1) < 128] = 0
    batch = processor(photo(96, 64), focal_lengths=1000, depth_maps=depth)
    assert torch.equal(batch["depth_labels"][0], torch.from_numpy(depth))
    batch = processor(photo(96, 64), focal_lengths=431, depth_maps=depth)
    label, scale = batch["depth_labels"][0], batch["cameras"][0]["metric_scale"]
    assert set(np.unique((label * scale).numpy().round(4))) <= set(depth.round(4).ravel())
    assert (label == 0).float().mean().item() == pytest.approx((depth == 0).mean(), abs=0.02)


def test_labels_and_predictions_are_each_others_inverse(processor):
    """A network that predicts its label exactly is right in metres."""
    batch = processor(photo(300, 200), focal_lengths=333.0, depth_maps=np.full((200, 300), 4.0), max_pixels=50_000)
    metres = processor.post_process_depth_estimation(outputs_of(batch, batch["depth_labels"]))[0]["predicted_depth"]
    np.testing.assert_allclose(metres, np.full((200, 300), 4.0), rtol=1e-6)


@pytest.mark.parametrize(
    "depth_maps",
    [
        [np.ones((48, 64)), None],
        (torch.ones(48, 64, dtype=torch.bfloat16), None),
        [torch.ones(48, 64, requires_grad=True), None],
        [np.ones((48, 64), np.uint16), None],
        [[np.ones((24, 32))], [None]],
    ],
    ids=["array", "bfloat16", "requires grad", "uint16", "nested"],
)
def test_depth_maps_in_other_forms_and_none(processor, depth_maps):
    batch = processor([photo(64, 48), photo(96, 64)], focal_lengths=1000, depth_maps=depth_maps)
    scale = batch["cameras"][0]["metric_scale"]
    first, second = batch["depth_labels"]
    np.testing.assert_allclose(first * scale, torch.ones(first.shape), rtol=1e-6)
    assert second.shape == batch["cameras"][1]["processed_size"] and not second.any()


def test_one_array_of_several_depth_maps(processor):
    maps = np.stack([np.full((48, 64), 1.0), np.full((48, 64), 2.0)])
    batch = processor([photo(64, 48)] * 2, focal_lengths=1000, depth_maps=maps)
    values = [(label * batch["cameras"][0]["metric_scale"]).mean().item() for label in batch["depth_labels"]]
    assert values == pytest.approx([1, 2])


def test_a_read_only_depth_map_is_taken_in_silence(processor):
    depth = np.ones((48, 64), np.float32)
    depth.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(photo(64, 48), depth_maps=depth)


def test_casting_the_batch_leaves_the_cameras(processor):
    batch = processor(photo(64, 48), focal_lengths=777.7, return_tensors="pt")
    before = json.dumps(batch["cameras"])
    batch = batch.to(torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64
    assert json.dumps(batch["cameras"]) == before
    believed = torch.full(batch["cameras"][0]["processed_size"], 3.0, dtype=torch.bfloat16)
    metres = processor.post_process_depth_estimation(outputs_of(batch, [believed]))[0]["predicted_depth"]
    np.testing.assert_allclose(metres, 3.0 * batch["cameras"][0]["metric_scale"], rtol=1e-6)


# ---- back to the photo's size


def by_pixel_centres(depth, size):
    """Bilinear, edges continued: sample at (i + 0.5) * old / new - 0.5."""
    places = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip(depth.shape, size, strict=True)]
    return map_coordinates(np.asarray(depth, np.float64), np.meshgrid(*places, indexing="ij"), order=1, mode="nearest")


@pytest.mark.parametrize("target", [(64, 96), (150, 101), (1, 1), (48, 300), (20, 30)], ids=str)
def test_maps_are_resized_bilinearly_by_pixel_centres(processor, target):
    batch = processor(photo(96, 64), focal_lengths=800, return_tensors="pt")
    depth = torch.rand(batch["cameras"][0]["processed_size"], generator=torch.Generator().manual_seed(0)) + 1
    (result,) = processor.post_process_depth_estimation(outputs_of(batch, [depth]), [target])
    expected = by_pixel_centres(depth.numpy() * batch["cameras"][0]["metric_scale"], target)
    assert result["predicted_depth"].dtype == torch.float32
    np.testing.assert_allclose(result["predicted_depth"], expected, rtol=1e-5)


def test_a_ramp_stays_the_ramp(processor):
    """Metres that grow along the photo's width as seen on the processed grid grow so on the photo."""
    batch = processor(photo(150, 90), focal_lengths=700.0, return_tensors="pt")
    height, width = batch["cameras"][0]["processed_size"]
    ramp = 1 + 4 * (torch.arange(width) + 0.5) / width
    depth = (ramp / batch["cameras"][0]["metric_scale"]).expand(height, width)
    (result,) = processor.post_process_depth_estimation(outputs_of(batch, [depth]))
    expected = np.tile(1 + 4 * (np.arange(150) + 0.5) / 150, (90, 1))
    inside = slice(2, -2)  # the outermost half pixel has no neighbour
    np.testing.assert_allclose(result["predicted_depth"][:, inside], expected[:, inside], rtol=1e-5)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_target_sizes(processor, kind):
    batch = processor([photo(96, 64), photo(64, 96)], focal_lengths=1000, return_tensors="pt")
    maps = [torch.ones(entry["processed_size"]) for entry in batch["cameras"]]
    results = processor.post_process_depth_estimation(outputs_of(batch, maps), kind([(10, 20), (33, 7)]))
    assert [result["predicted_depth"].shape for result in results] == [(10, 20), (33, 7)]
    results = processor.post_process_depth_estimation(outputs_of(batch, maps))
    assert [result["predicted_depth"].shape for result in results] == [(64, 96), (96, 64)]


@pytest.fixture(scope="module")
def forwarded(processor, model):
    images = [photo(96, 64), photo(50, 80), photo(96, 64, seed=1)]
    batch = processor(images, focal_lengths=[600, 300, 1000], max_pixels=20_000, return_tensors="pt")
    with torch.inference_mode():
        return batch, model(**batch)


def test_outputs_of_forward(processor, forwarded):
    batch, outputs = forwarded
    results = processor.post_process_depth_estimation(outputs)
    assert [result["predicted_depth"].shape for result in results] == [(64, 96), (80, 50), (64, 96)]
    for depth, entry, result in zip(outputs.predicted_depth, batch["cameras"], results, strict=True):
        assert depth.shape == entry["processed_size"]
        expected = by_pixel_centres(depth.numpy() * entry["metric_scale"], entry["size"])
        np.testing.assert_allclose(result["predicted_depth"], expected, rtol=1e-4, atol=1e-5)
        assert list(result) == ["predicted_depth"] and result["predicted_depth"].dtype == torch.float32


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_outputs_of_generate(processor, model, forwarded, mode):
    batch, outputs = forwarded
    special = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    generated = model.generate(**batch, **mode, max_new_tokens=2, suppress_tokens=special, return_dict_in_generate=True)
    expected = processor.post_process_depth_estimation(outputs)
    results = processor.post_process_depth_estimation(generated)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result["predicted_depth"], other["predicted_depth"], rtol=1e-4, atol=1e-5)


def test_a_text_only_batch_has_no_maps(processor, model):
    with torch.inference_mode():
        outputs = model(**processor(text=["How far?"], return_tensors="pt"))
    assert processor.post_process_depth_estimation(outputs) == []


def test_post_processing_refuses(processor):
    batch = processor([photo(96, 64), photo(64, 96)], focal_lengths=1000, return_tensors="pt")
    maps = [torch.ones(entry["processed_size"]) for entry in batch["cameras"]]
    outputs = outputs_of(batch, maps)
    post_process = processor.post_process_depth_estimation
    no_depth, no_cameras = (SimpleNamespace(predicted_depth=depth, cameras=None) for depth in (None, maps))
    refused(lambda: post_process(no_depth), "predicted_depth", "output_depth")
    refused(lambda: post_process(no_cameras), "cameras", "whole batch")
    refused(lambda: post_process(outputs, [(10, 10)]), "1 target_sizes", "2 depth maps")
    refused(lambda: post_process(outputs, (480, 640)), "target_sizes", error=(TypeError, ValueError))
    refused(lambda: post_process(outputs, [(10, 10), (0, 5)]), "target_sizes", "(0, 5)")
    refused(lambda: post_process(outputs, [(10, 10), (5, 5, 3)]), "target_sizes", "(5, 5, 3)")


# ---- point clouds


def test_points_of_a_slanted_plane_lie_on_it():
    normal, offset, (fx, cx, cy) = np.array([0.3, -0.2, 1.0]), 4.0, (210.0, 70.25, 41.5)
    x, y = (np.arange(160) - cx) / fx, (np.arange(90) - cy) / fx
    depth = offset / (normal[0] * x + normal[1] * y[:, None] + normal[2])
    points = DepthVLMProcessor.to_point_cloud(depth, fx, (cx, cy))
    assert points.shape == (90, 160, 3) and points.dtype == torch.float32
    np.testing.assert_allclose(points.numpy().astype(np.float64) @ normal, offset, rtol=1e-5)


def test_points_are_in_the_opencv_frame_around_the_maps_middle():
    depth = torch.full((3, 5), 2.0)
    depth[1, 2] = 9.0
    points = DepthVLMProcessor.to_point_cloud(depth, 10.0)
    assert points[1, 2].tolist() == [0, 0, 9]  # the middle pixel looks along the axis
    assert points[0, 0].tolist() == pytest.approx([-0.4, -0.2, 2])  # left is -x, up is -y
    assert points[2, 4].tolist() == pytest.approx([0.4, 0.2, 2])
    even = DepthVLMProcessor.to_point_cloud(np.full((4, 4), 1.0), 1.0)
    assert even[..., :2].sum() == 0 and even[0, 0].tolist() == [-1.5, -1.5, 1]
    corner = DepthVLMProcessor.to_point_cloud(depth, 10.0, (0, 0))
    assert corner[0, 0].tolist() == [0, 0, 2]


def test_point_cloud_of_a_processed_photo_is_the_photos(processor):
    """A wall at 3 m, 2 m wide in the photo, is 2 m wide in the cloud, whatever it was processed at."""
    batch = processor(photo(200, 150), focal_lengths=300.0, max_pixels=30_000, return_tensors="pt")
    believed = torch.full(batch["cameras"][0]["processed_size"], 3.0 / batch["cameras"][0]["metric_scale"])
    metres = processor.post_process_depth_estimation(outputs_of(batch, [believed]))[0]["predicted_depth"]
    points = processor.to_point_cloud(metres, batch["cameras"][0]["focal_length"])
    assert (points[0, -1, 0] - points[0, 0, 0]).item() == pytest.approx(199 / 300 * 3, rel=1e-5)


def test_point_cloud_refuses():
    cloud = DepthVLMProcessor.to_point_cloud
    refused(lambda: cloud(torch.ones(1, 4, 4), 10.0), "depth", "(1, 4, 4)")
    for value in (0, -5.0, math.nan, math.inf):
        refused(lambda value=value: cloud(torch.ones(4, 4), value), f"focal_length is {value}", "px")


# ---- what is refused


def png_with_size(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


NOT_IMAGES = {
    "dict": {"url": "photo.jpg"},
    "number": 5,
    "None": None,
    "set": {1},
}


@pytest.mark.parametrize("image", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_what_is_not_an_image(processor, image):
    refused(lambda: processor([photo(64, 48), image]), "images[1]", type(image).__name__, "path", error=TypeError)


UNUSABLE_IMAGES = {
    "PIL image without pixels": (Image.new("RGB", (0, 5)), "0x5"),
    "array without pixels": (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
    "array of one dimension": (np.zeros(7, np.uint8), "(7,)"),
    "array of four dimensions": (np.zeros((1, 8, 8, 3), np.uint8), "(1, 8, 8, 3)"),
    "array of two channels": (np.zeros((8, 8, 2), np.uint8), "channel"),
    "float array past 1": (np.full((8, 8), 1.5), "0 to 1"),
    "float array past 1, in colour": (np.full((8, 8, 3), 1.5), "1"),
    "float array of NaN": (np.full((8, 8), np.nan), "0 to 1"),
    "float array below 0": (np.full((8, 8, 3), -0.5), "0"),
    "float image past 1": (Image.fromarray(np.full((8, 8), 255.0, np.float32)), "0 to 1"),
    "integers past 8 bits in colour": (np.full((8, 8, 3), 300), "255"),
    "negative integers": (np.full((8, 8), -3, np.int32), "0"),
    "negative integers in a PIL image": (Image.fromarray(np.full((8, 8), -3, np.int32)), "0"),
    "integers past 16 bits": (Image.fromarray(np.full((8, 8), 70000, np.int32)), "65535"),
    "objects": (np.full((8, 8), None), "object"),
    "bytes of no image": (b"\x89PNG", "cannot identify"),
    "channels first or last": (np.zeros((3, 64, 4), np.uint8), "(3, 64, 4)"),
    "missing file": ("no/such/photo.jpg", "no/such/photo.jpg"),
    "bfloat16 past 1": (torch.full((3, 8, 8), 1.5, dtype=torch.bfloat16), "0 to 1"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("image, word", UNUSABLE_IMAGES.values(), ids=UNUSABLE_IMAGES)
def test_images_that_cannot_be_used(processor, image, word):
    refused(lambda: processor(images=[image]), "images[0]", word, "pass ")


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", png_with_size(30000, 30000), png_with_size(64, 48)],
    ids=["empty", "text", "decompression bomb", "too few pixels"],
)
def test_files_that_are_not_whole_images(processor, tmp_path, data):
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    refused(lambda: processor(path), "images", "photo.png", "pass a whole, readable photo")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files(processor, tmp_path, form):
    path, whole = tmp_path / "photo", encoded(photo(64, 48), form)
    for kept in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(kept * len(whole))])
        refused(lambda: processor([path]), "images[0]", str(path), "pass a whole, readable photo")


def test_a_folder_and_an_unreachable_url(processor, tmp_path, url):
    refused(lambda: processor(tmp_path), "images", str(tmp_path), "photo")
    refused(lambda: processor(f"{url}/missing.jpg"), "images", "missing.jpg")
    refused(lambda: processor("http://127.0.0.1:1/x.png"), "images", "http://127.0.0.1:1/x.png")


@pytest.mark.parametrize("size", [(3100, 100), (100, 3100), (1, 31)])
def test_absurd_aspect_ratio(processor, size):
    refused(lambda: processor(Image.new("L", size)), "images[0]", f"{size[0]}x{size[1]}", "aspect ratio", "crop")


FOCAL_ERRORS = {
    "zero": (0, ValueError, "positive"),
    "negative": (-559.6, ValueError, "positive"),
    "NaN": (math.nan, ValueError, "nan"),
    "infinite": (math.inf, ValueError, "inf"),
    "millimetres": (4.2, ValueError, "not mm"),
    "metres away": (1e7, ValueError, "degrees"),
    "text": ("1430", TypeError, "number of px"),
    "pair": (torch.ones(2), TypeError, "number of px"),
    "dict": ({}, TypeError, "number of px"),
}


@pytest.mark.parametrize("value, error, word", FOCAL_ERRORS.values(), ids=FOCAL_ERRORS)
def test_focal_lengths_that_cannot_be(processor, value, error, word):
    refused(lambda: processor([photo(64, 48)] * 2, focal_lengths=[80, value]), "focal_lengths[1]", word, error=error)


def test_a_focal_length_in_text_is_not_taken_apart(processor):
    refused(lambda: processor([photo(64, 48)] * 4, focal_lengths="1430"), "focal_lengths", "1430", error=TypeError)


MAP_ERRORS = {
    "negative": (-np.ones((48, 64)), "negative"),
    "NaN": (np.full((48, 64), np.nan), "NaN"),
    "infinite": (np.full((48, 64), np.inf), "infinite"),
    "three dimensions": (np.ones((1, 48, 64)), "(1, 48, 64)"),
    "one dimension": (np.ones(64), "(64,)"),
    "empty": (np.ones((0, 64)), "(0, 64)"),
    "portrait": (np.ones((64, 48)), "(64, 48)"),
    "text": ("depth.png", "metres"),
    "object": (object(), "metres"),
}


@pytest.mark.parametrize("value, word", MAP_ERRORS.values(), ids=MAP_ERRORS)
def test_depth_maps_that_cannot_be(processor, value, word):
    call = lambda: processor([photo(96, 64), photo(64, 48)], depth_maps=[None, value])  # noqa: E731
    refused(call, "depth_maps[1]", word, error=(TypeError, ValueError))


def test_depth_maps_that_are_no_list(processor):
    for value in (5.0, "depth.png"):
        refused(
            lambda value=value: processor(photo(64, 48), depth_maps=value), "depth_maps", error=(TypeError, ValueError)
        )


def test_counts_that_differ(processor):
    two = [photo(64, 48), photo(48, 64)]
    refused(lambda: processor(two, focal_lengths=[500.0]), "1 focal_lengths", "2 images")
    refused(lambda: processor(two, focal_lengths=torch.ones(3) * 500), "3 focal_lengths", "2 images")
    refused(lambda: processor(two, focal_lengths=[]), "0 focal_lengths", "2 images")
    refused(lambda: processor(two, depth_maps=[np.ones((48, 64))]), "1 depth_maps", "2 images")
    refused(lambda: processor(two, PLACEHOLDER), "text", "1 <|image_pad|>", "2 images")
    refused(lambda: processor(two, [PLACEHOLDER * 3, ""]), "text", "3 <|image_pad|>", "2 images")
    refused(lambda: processor(text=PLACEHOLDER), "text", "1 <|image_pad|>", "0 images")
    refused(lambda: processor(two, "How far?"), "text", "0 <|image_pad|>", "2 images")


def test_arguments_of_images_without_images(processor):
    refused(lambda: processor(text="How far?", focal_lengths=500.0), "focal_lengths", "images")
    refused(lambda: processor(text="How far?", depth_maps=[np.ones((4, 4))]), "depth_maps", "images")
    refused(lambda: processor(images=[]), "images", "empty list")
    refused(lambda: processor(images=[[], []]), "images", "empty list")
    refused(lambda: processor(), "input")


def test_videos(processor):
    refused(lambda: processor(text="<|video_pad|>", videos=[noise(64, 48)]), "videos", "images", "Qwen3-VL")
    message = user({"type": "video", "video": "film.mp4"}, "What happens?")
    refused(lambda: chat(processor, [message]), "videos", "images", "Qwen3-VL")


@pytest.mark.parametrize("max_pixels", [0, -1, TOKEN**2 - 1, math.nan, "many"])
def test_a_budget_without_room_for_a_token(processor, max_pixels):
    refused(lambda: processor(photo(64, 48), max_pixels=max_pixels), "max_pixels", max_pixels, TOKEN**2)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"canonical_focal_length": 0}, "canonical_focal_length is 0"),
        ({"canonical_focal_length": math.nan}, "canonical_focal_length is nan"),
        ({"canonical_focal_length": math.inf}, "canonical_focal_length is inf"),
        ({"default_fov": 0}, "default_fov is 0"),
        ({"default_fov": 180}, "default_fov is 180"),
        ({"default_fov": math.nan}, "default_fov is nan"),
    ],
)
def test_settings(make_processor, settings, word):
    refused(lambda: make_processor(**settings), word, "must")


# ---- files and other processes


def test_save_and_load(make_processor, tmp_path):
    saved = make_processor(shortest=2048, longest=99_999, canonical_focal_length=777.5, default_fov=71.0)
    saved.save_pretrained(tmp_path)
    loaded = DepthVLMProcessor.from_pretrained(tmp_path)
    assert (loaded.canonical_focal_length, loaded.default_fov) == (777.5, 71.0)
    image = photo(300, 200)
    assert_same(loaded(image, return_tensors="pt"), saved(image, return_tensors="pt"))


def test_an_official_qwen3_vl_folder_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    preprocessor = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = preprocessor | {"video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    for name, content in {
        "preprocessor_config.json": preprocessor,
        "video_preprocessor_config.json": video,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "config.json": {"model_type": "qwen3_vl"},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = DepthVLMProcessor.from_pretrained(tmp_path)
    assert (loaded.canonical_focal_length, loaded.default_fov) == (1000.0, 60.0)
    entry = camera(loaded, photo(640, 480), focal_lengths=559.62)
    assert entry["processed_size"] == (864, 1152)
    assert dict(loaded.image_processor.size) == preprocessor["size"]


REMOTE = """
import sys, numpy as np
from transformers import AutoProcessor, pipeline
from transformers.utils import logging
logging.disable_progress_bar()
model, photo, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
pipe = pipeline("depth-estimation", model=model, trust_remote_code=True)
result = pipe(photo, max_pixels=8192)
camera = processor(images=photo, max_pixels=8192)["cameras"][0]
settings = [processor.canonical_focal_length, processor.default_fov, camera["focal_length"], camera["metric_scale"]]
np.savez(out, depth=result["predicted_depth"], settings=settings, names=[type(pipe).__name__, result["depth"].mode])
"""


def test_a_saved_folder_works_in_a_fresh_process(make_processor, model, folder, tmp_path, monkeypatch):
    for cls, auto_class in (
        (DepthVLMConfig, "AutoConfig"),
        (DepthVLMForConditionalGeneration, "AutoModelForImageTextToText"),
        (DepthVLMProcessor, "AutoProcessor"),
    ):
        monkeypatch.setattr(cls, "_auto_class", auto_class)  # so that saving copies the code
    ours = make_processor(canonical_focal_length=250.0, default_fov=71.0)
    monkeypatch.setattr(model.config, "canonical_focal_length", 250.0)  # one that differs would be refused
    saved = tmp_path / "model"
    model.save_pretrained(saved)
    ours.save_pretrained(saved)
    assert {f"{name}_depthvlm.py" for name in ("configuration", "modeling", "photos", "processing")} <= set(
        os.listdir(saved)
    )
    shutil.copy(folder / "turned.jpg", tmp_path)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(saved), "turned.jpg", "out.npz"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as there:
        batch = ours(images=tmp_path / "turned.jpg", max_pixels=8192, return_tensors="pt")
        entry = batch["cameras"][0]
        assert there["settings"].tolist() == [250.0, 71.0, entry["focal_length"], entry["metric_scale"]]
        assert there["names"].tolist() == ["DepthVLMPipeline", "L"]
        with torch.inference_mode():
            (here,) = ours.post_process_depth_estimation(model(**batch))
        np.testing.assert_allclose(there["depth"], here["predicted_depth"], rtol=1e-4, atol=1e-5)


# ---- the pipeline


@pytest.fixture(scope="module")
def pipe(make_processor, model):
    return DepthVLMPipeline(model=model, processor=make_processor(longest=20_000), task="depth-estimation")


def explicit(pipe, image, **arguments):
    batch = pipe.processor(images=[image], return_tensors="pt", **arguments)
    with torch.inference_mode():
        (result,) = pipe.processor.post_process_depth_estimation(pipe.model(**batch))
    return result["predicted_depth"]


def assert_depth(result, expected):
    assert result["predicted_depth"].shape == expected.shape and result["predicted_depth"].dtype == torch.float32
    torch.testing.assert_close(result["predicted_depth"], expected, rtol=1e-4, atol=1e-5)


def test_pipeline_takes_a_path_an_image_and_a_list(pipe, folder):
    path = folder / "turned.jpg"
    expected = explicit(pipe, path)
    assert expected.shape == (96, 64)
    assert_depth(pipe(str(path)), expected)
    assert_depth(pipe(Image.open(path)), expected)
    results = pipe([str(path), photo(80, 50)])
    assert len(results) == 2
    assert_depth(results[0], expected)
    assert_depth(results[1], explicit(pipe, photo(80, 50)))


def test_pipeline_picture_is_the_depth_in_8_bits(pipe):
    result = pipe(photo(80, 50))
    depth = result["predicted_depth"].numpy()
    assert result["depth"].mode == "L" and result["depth"].size == (80, 50)
    np.testing.assert_allclose(np.asarray(result["depth"]), depth / depth.max() * 255, atol=1.01)


def test_pipeline_takes_focal_length_and_max_pixels(pipe, model):
    image = photo(80, 50)
    expected = explicit(pipe, image, focal_lengths=90.0, max_pixels=4096)
    assert_depth(pipe(image, focal_lengths=90.0, max_pixels=4096), expected)
    # given once for all calls
    settled = DepthVLMPipeline(
        model=model, processor=pipe.processor, task="depth-estimation", focal_lengths=90.0, max_pixels=4096
    )
    assert_depth(settled(image), expected)
    assert_depth(settled(image, focal_lengths=70.0), explicit(pipe, image, focal_lengths=70.0, max_pixels=4096))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_pipeline_batches_photos_of_different_sizes(pipe, batch_size):
    images = [photo(80, 50), photo(50, 90, seed=1), photo(96, 64, seed=2)]
    results = pipe(images, focal_lengths=100.0, batch_size=batch_size)
    for image, result in zip(images, results, strict=True):
        assert_depth(result, explicit(pipe, image, focal_lengths=100.0))


def test_pipeline_refuses(pipe):
    refused(lambda: pipe(photo(80, 50), focal_length=90.0), "focal_length", "focal_lengths", error=TypeError)
    refused(lambda: pipe("no/such/photo.jpg"), "no/such/photo.jpg", "photo")
    refused(lambda: pipe(photo(80, 50), focal_lengths=-1), "focal_lengths[0]", "positive")
