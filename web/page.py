"""The page: photo, depth to measure in, question box, cloud, camera, several photos, videos; and the API."""

import base64
import csv
import html
import io
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from depthvlm import outputs, videos
from depthvlm.handler import describe_camera
from depthvlm.photos_depthvlm import (
    FULL_FRAME_DIAGONAL,
    focal_of_35mm,
    focal_of_view,
    open_image_file,
    open_photo,
    view_of_focal,
)

from .engine import POINTS, Engine, Result
from .visits import FETCHED, Download, Visit, Visits

HERE = Path(__file__).resolve().parent
UNITS = ["px", "mm (35 mm equivalent)", "degrees (field of view)"]
MEDIA_TYPES = {"png": "image/png", "color": "image/png", "ply": "application/octet-stream", "glb": "model/gltf-binary"}
MEDIA_TYPES |= {"npz": "application/octet-stream", "json": "application/json"}
STYLE = "body[data-drawing] #chat [data-testid=bot] { visibility: hidden }"
LINKS_STYLE = "ul { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 0 } li { list-style: none }"
MAX_PHOTOS, MAX_FRAMES = 20, 60
# of Gradio's own routes those that read from the network, or write what a visitor did to a disk
CLOSED = ("/gradio_api/file=http", "/gradio_api/proxy", "/gradio_api/deep_link", "/gradio_api/run-history")
ABOUT = """\
Depth is metric: z, along the camera's axis. **Metres need the focal length.** It is read from EXIF where a photo has
it; otherwise a field of view of 60 degrees is assumed, and an assumed focal length that is 20 % off makes each distance
20 % wrong. Webcams, screenshots and messengers' copies have no EXIF; crops have a wrong one. Correct it in *Camera*.

The sky has no distance: what the map shows there means nothing. Lenses are taken as pinholes.

Photos stay in the memory of this server while the page is open, and are removed with it.
"""


async def only_uploads(url_or_file_path):
    """Instead of a component's fetching of what a client names by its URL."""
    if str(url_or_file_path).startswith(("http://", "https://")):
        raise gr.Error("Files are not fetched from URLs; upload the file.")
    return url_or_file_path


def photo_input(**options) -> gr.Image:
    """An image whose functions get the path of the bytes as they were uploaded, EXIF included, image or not."""
    component = gr.Image(type="filepath", image_mode=None, **options)
    component.preprocess = lambda payload: payload and payload.path
    component.async_move_resource_to_block_cache = only_uploads
    return component


def file_input(**options) -> gr.File:
    """Files whose functions get (name, path) of each, and no copies."""
    component = gr.File(**options)
    component.preprocess = lambda payload: [
        (file.orig_name or "file", file.path) for file in getattr(payload, "root", [payload] if payload else [])
    ]
    component.async_move_resource_to_block_cache = only_uploads
    return component


class Page:
    """engine: the model. folder: Gradio's. max_megapixels: of an upload."""

    def __init__(self, engine: Engine, folder: Path, max_megapixels: float, samples: list[tuple[str, str]]):
        self.engine, self.visits = engine, Visits(engine, folder)
        self.max_megapixels = max_megapixels
        self.samples = samples
        image_processor = engine.processor.image_processor
        self.token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
        self.max_tokens = min(image_processor.size["longest_edge"] // self.token_pixels, 4096)

    # Photos

    def open(self, path: str) -> tuple[Image.Image, float | None]:
        """An upright photo and its EXIF focal length; `gr.Error` for what is too large or no photo."""
        try:
            with open_image_file(Path(path)) as image:
                megapixels = image.width * image.height / 1e6
            if megapixels > self.max_megapixels:
                raise ValueError(f"The photo has {megapixels:.0f} megapixels; this page takes {self.max_megapixels:g}.")
        except (OSError, SyntaxError, Image.DecompressionBombError):
            pass  # open_photo says why
        except ValueError as error:
            raise gr.Error(str(error)) from error
        try:
            return open_photo(Path(path).read_bytes(), "The file")
        except (ValueError, TypeError, MemoryError) as error:
            raise gr.Error(f"{error}.") from error

    def prepare(self, path: str, name: str, focal_length: float | None, tokens: float | None, question: str | None):
        photo, from_exif = self.open(path)
        source = "given" if focal_length is not None else "exif"
        focal_length = from_exif if focal_length is None else focal_length
        pixels = None if tokens is None else int(tokens) * self.token_pixels
        try:
            return self.engine.prepare(photo, name, focal_length, source, pixels, question)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error).replace("images[0]", "The photo").replace("[0]", "")) from error

    def run(self, steps: Iterator) -> Iterator:
        """The engine's steps; what they raise, in plain words."""
        try:
            yield from steps
        except torch.OutOfMemoryError as error:
            raise gr.Error("There is not enough memory for this; choose less detail.") from error
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error)) from error

    def finish(self, result: Result, asks: bool) -> None:
        """See a photo to the end, with nobody watching, and no follow-up."""
        for _ in self.run(self.engine.see(result, asks)):
            pass
        self.engine.forget(result)

    # One photo

    def see(self, path, question, tokens, focal_length, unit, again: bool, request: gr.Request) -> Iterator[tuple]:
        """Depth of a photo, then the answer to a question that stands in the box already."""
        visit = self.visits.of(request.session_hash)
        if path is None:
            self.clear(visit)
            yield self.nothing()
            return
        if not again and (path, tokens) == visit.made_with:
            yield (gr.skip(),) * 6
            return
        self.clear(visit)
        question = (question or "").strip() or None
        size = self.open(path)[0].size if again else None
        given = to_pixels(focal_length, unit, size) if again else None
        result = self.prepare(path, Path(path).stem, given, tokens, question)
        visit.made_with = (path, tokens)
        self.visits.claim(visit, path)
        chat = [] if question is None else [{"role": "user", "content": question}]
        for words in self.run(self.engine.see(result, question is not None)):
            if words is None:
                visit.result = result
                yield (*self.shown(visit), chat, "" if question else gr.skip())
            else:
                yield (*[gr.skip()] * 4, [*chat, {"role": "assistant", "content": words}], gr.skip())

    def shown(self, visit: Visit) -> tuple:
        """Viewer, status, camera's text and its number, of a visit's result."""
        result = visit.result
        camera = describe_camera(result.camera)
        rows, columns = camera["processed_size"]
        status = (
            f"{result.tokens} image tokens ({columns}x{rows} px), depth after {1000 * result.seconds:.0f} ms. "
            f"Focal length {camera['fx']:.0f} px: {says(camera)}"
        )
        return payload(self.engine, result), status, camera_text(camera), round(camera["fx"], 1)

    def show_cloud(self, request: gr.Request) -> tuple:
        """The cloud's file and the downloads of a visit's result."""
        visit = self.visits.of(request.session_hash)
        if visit.result is None:
            return None, ""
        cloud = self.cloud(visit.result)
        self.visits.claim(visit, visit.made_with[0], cloud)
        return str(cloud), links(self.offer(visit))

    def nothing(self) -> tuple:
        return "", "", "", None, [], gr.skip()

    def clear(self, visit: Visit) -> None:
        if visit.result is not None:
            self.engine.forget(visit.result)
        visit.result, visit.made_with = None, ()
        self.visits.claim(visit)
        self.visits.offer(visit, "photo", [])

    def cloud(self, result: Result) -> Path:
        """A GLB file; what is very far is left out, as it would make the rest small."""
        depth = self.engine.depth(result, result.view.size[::-1])
        camera = resized(describe_camera(result.camera), result.view.size)
        content = outputs.glb(depth, camera, result.texture, POINTS, farthest=3 * float(np.median(depth)))
        with tempfile.NamedTemporaryFile(dir=self.visits.folder, suffix=".glb", delete=False) as file:
            file.write(content)
        return Path(file.name)

    def offer(self, visit: Visit) -> dict[str, str]:
        result = visit.result
        return self.visits.offer(
            visit,
            "photo",
            [
                Download(f"{result.name}{outputs.SUFFIXES[kind]}", media, partial(self.engine.encode, result, kind))
                for kind, media in MEDIA_TYPES.items()
            ],
        )

    def rescale(self, focal_length, unit, request: gr.Request) -> tuple:
        """Another focal length, without another pass."""
        visit = self.visits.of(request.session_hash)
        if visit.result is None:
            raise gr.Error("There is no photo yet.")
        height, width = visit.result.camera["size"]
        visit.result.rescale(to_pixels(focal_length, unit, (width, height)))
        return self.shown(visit)

    def ask(self, question, chat, request: gr.Request) -> Iterator[tuple]:
        """The answer to a question about the photo that was seen."""
        visit = self.visits.of(request.session_hash)
        question = (question or "").strip()
        if not question:
            raise gr.Error("Write a question first.")
        if visit.result is None:
            raise gr.Error("Choose a photo first; a question that stands here by then is answered with it.")
        chat = [*(chat or []), {"role": "user", "content": question}]
        yield chat, ""
        for words in self.run(self.engine.ask(visit.result, question)):
            yield [*chat, {"role": "assistant", "content": words}], gr.skip()

    # Several

    def see_all(self, files: list[tuple[str, str]], question, request: gr.Request) -> Iterator[tuple]:
        visit = self.visits.of(request.session_hash)
        if not files:
            raise gr.Error("Choose photos first.")
        if len(files) > MAX_PHOTOS:
            raise gr.Error(f"{len(files)} photos are more than the {MAX_PHOTOS} that this page takes at once.")
        self.visits.claim(visit, *visit.files, *(path for _, path in files))
        question = (question or "").strip() or None
        rows, content, taken = [], {}, set()
        for name, path in files:
            stem, number = Path(name).stem, 1
            while stem in taken:
                number += 1
                stem = f"{Path(name).stem}-{number}"
            taken.add(stem)
            try:
                result = self.prepare(path, stem, None, None, question)
                self.finish(result, question is not None)
                record = json.loads(self.engine.encode(result, "json"))
                camera, depth = record["camera"], record["depth"]
                size = f"{camera['width']}x{camera['height']}"
                source = camera["focal_length_source"]
                row = [name, size, round(camera["fx"], 1), source, *depth.values(), result.answer or ""]
                for kind in ("png", "color", "ply", "json"):
                    content[f"{stem}{outputs.SUFFIXES[kind]}"] = self.engine.encode(result, kind)
            except gr.Error as error:
                row = [name, "", None, "", None, None, None, f"not read: {error.message}"]
            rows.append(row)
            yield rows, ""
        content["table.csv"] = table_of(rows)
        archive = zipped(content)
        yield (
            rows,
            links(self.visits.offer(visit, "photos", [Download("depth.zip", "application/zip", lambda: archive)])),
        )

    def see_video(self, files: list[tuple[str, str]], fps, focal_length, request: gr.Request) -> Iterator[tuple]:
        visit = self.visits.of(request.session_hash)
        if not files:
            raise gr.Error("Choose a video first.")
        ((name, path),) = files
        self.visits.claim(visit, *visit.files, path)
        maps, times = [], []
        with tempfile.TemporaryDirectory(dir=self.visits.folder) as folder:
            try:
                for seconds, frame in videos.read_frames(path, fps):
                    if len(maps) == MAX_FRAMES:
                        break
                    result = self.engine.prepare(frame, name, focal_length or None, "given", None, None)
                    self.finish(result, False)
                    maps.append(Path(folder, f"{seconds:09.3f}s_depth.png"))
                    maps[-1].write_bytes(self.engine.encode(result, "png"))
                    times.append(seconds)
                    yield f"{len(maps)} frames, up to {seconds:.1f} s of the video", "", ""
                film = Path(folder, "film.mp4")
                videos.write_depth_video(film, maps, fps, overwrite=False)
                content = {file.name: file.read_bytes() for file in maps} | {"depth.mp4": film.read_bytes()}
            except (ValueError, TypeError) as error:
                raise gr.Error(str(error).replace(path, name).replace("images[0]", "a frame")) from error
        film, archive = content["depth.mp4"], zipped(content)
        offered = self.visits.offer(
            visit,
            "video",
            [
                Download("depth.mp4", "video/mp4", lambda: film),
                Download("frames.zip", "application/zip", lambda: archive),
            ],
        )
        player = (
            f'<video controls loop muted width="100%" src="{offered["depth.mp4"]}" aria-label="Depth video"></video>'
        )
        more = "" if len(maps) < MAX_FRAMES else f"; the rest is past the {MAX_FRAMES} that this page takes"
        yield f"{len(maps)} frames, {times[-1]:.1f} s{more}", player, links(offered)

    # The API

    def predict(self, photo, focal_length, question) -> tuple:
        """
        Metric depth of a photo, and the answer to a question about it, from one pass.

        photo: an image file. focal_length: px at the photo's own size; None: from EXIF, else assumed. question: text;
        empty: none.

        Returns depth (16-bit PNG of the photo's size, millimetres, 0 = none, 65535 = that or farther), answer (text,
        empty without a question), camera (width, height, fx, fy, cx, cy in px, focal_length_source) and cloud (GLB,
        metres, x right, y up, the camera looks along -z).
        """
        if photo is None:
            raise gr.Error("photo is missing.")
        question = (question or "").strip() or None
        result = self.prepare(photo, "photo", focal_length or None, None, question)
        self.finish(result, question is not None)
        self.visits.sweep()
        folder = Path(tempfile.mkdtemp(prefix=FETCHED, dir=self.visits.folder))
        depth, cloud = folder / "depth.png", folder / "cloud.glb"
        depth.write_bytes(self.engine.encode(result, "png"))
        cloud.write_bytes(self.engine.encode(result, "glb"))
        return str(depth), result.answer or "", describe_camera(result.camera), str(cloud)

    # Layout

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="DepthVLM", fill_width=True, analytics_enabled=False) as blocks:
            gr.Markdown("# DepthVLM\nA photo in, metres out: measure in it, turn it in 3D, ask about it.")
            with gr.Tab("Photo"):
                self.build_photo()
            with gr.Tab("Several photos"):
                self.build_several()
            with gr.Tab("Video"):
                self.build_video()
            with gr.Tab("About"):
                gr.Markdown(ABOUT)
            self.build_api()
            blocks.unload(self.leave)
        self.visits.kept = {path for path in self.visits.folder.rglob("*") if path.is_file()}
        return blocks.queue(max_size=64)

    def leave(self, request: gr.Request):
        self.visits.leave(request.session_hash)

    def build_photo(self):
        model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        quick = {"concurrency_limit": None, "api_visibility": "private"}
        with gr.Row():  # what a phone shows first comes first
            with gr.Column(scale=1, min_width=300):
                photo = photo_input(
                    label="Photo", sources=["upload", "webcam", "clipboard"], height=260, elem_id="photo"
                )
                question = gr.Textbox(
                    label="Question", placeholder="How far is the door from the camera?", elem_id="question"
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=2, min_width=300):
                viewer = gr.HTML(
                    value="",
                    html_template=(HERE / "viewer.html").read_text(encoding="utf-8"),
                    css_template=(HERE / "viewer.css").read_text(encoding="utf-8"),
                    js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
                    elem_id="viewer",
                )
                status = gr.Markdown(elem_id="status")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                chat = gr.Chatbot(label="Answers", height=200, elem_id="chat", buttons=["copy"])
                gr.Examples([list(sample) for sample in self.samples], [photo, question], elem_id="examples")
                with gr.Accordion("Camera", open=False, elem_id="camera"):
                    camera = gr.Markdown(elem_id="camera-text")
                    focal = gr.Number(label="Correct it", minimum=0, elem_id="focal")
                    unit = gr.Dropdown(UNITS, value=UNITS[0], label="Unit", elem_id="unit")
                    rescale = gr.Button("Rescale metres", size="sm", elem_id="rescale")
                    again = gr.Button("Run again with it", size="sm", elem_id="again")
                    gr.Markdown("Rescaling is immediate. A new run also shows the photo to the model at another size.")
                detail = gr.Slider(
                    4,
                    self.max_tokens,
                    value=self.max_tokens,
                    step=1,
                    label="Detail: image tokens at most (fewer are faster)",
                    elem_id="detail",
                )
            with gr.Column(scale=2, min_width=300):
                cloud = gr.Model3D(
                    label="Cloud, without what is very far",
                    height=380,
                    camera_position=(90, 80, None),
                    elem_id="cloud",
                )
                downloads = gr.HTML(css_template=LINKS_STYLE, elem_id="downloads")
        shown = [viewer, status, camera, focal]
        inputs = [photo, question, detail, focal, unit]
        seen = [*shown, chat, question]
        photo.change(partial_request(self.see, again=False), inputs, seen, **model)
        detail.release(partial_request(self.see, again=False), inputs, seen, **model)
        again.click(partial_request(self.see, again=True), inputs, seen, **model)
        # by itself: Model3D never shows a file that it is given twice before it is ready, as streaming functions do
        viewer.change(self.show_cloud, None, [cloud, downloads], **quick)
        rescale.click(self.rescale, [focal, unit], shown, **quick)
        gr.on([ask.click, question.submit], self.ask, [question, chat], [chat, question], **model)

    def build_several(self):
        label = f"Up to {MAX_PHOTOS} photos"
        files = file_input(label=label, file_count="multiple", file_types=["image"], elem_id="files")
        question = gr.Textbox(label="Question about each", elem_id="files-question")
        start = gr.Button("Measure all", variant="primary", elem_id="files-start")
        headers = ["photo", "size", "focal length (px)", "source", "min (m)", "median (m)", "max (m)", "answer"]
        table = gr.Dataframe(headers=headers, label="Distances", interactive=False, wrap=True, elem_id="table")
        archive = gr.HTML(css_template=LINKS_STYLE, elem_id="zip")
        start.click(
            self.see_all,
            [files, question],
            [table, archive],
            concurrency_id="model",
            concurrency_limit=1,
            api_visibility="private",
        )

    def build_video(self):
        file = file_input(label="Video", file_types=["video"], elem_id="video")
        with gr.Row():
            fps = gr.Slider(0.5, 10, value=2, step=0.5, label="Frames per second")
            focal = gr.Number(label="Focal length (px), if it is known", minimum=0)
        start = gr.Button("Measure frames", variant="primary", elem_id="video-start")
        status, player, archive = (
            gr.Markdown(elem_id="video-status"),
            gr.HTML(elem_id="player"),
            gr.HTML(css_template=LINKS_STYLE, elem_id="frames"),
        )
        gr.Markdown(f"Each frame is measured for itself; the first {MAX_FRAMES} are taken.")
        start.click(
            self.see_video,
            [file, fps, focal],
            [status, player, archive],
            concurrency_id="model",
            concurrency_limit=1,
            api_visibility="private",
        )

    def build_api(self):
        with gr.Row(visible=False):
            given = [
                photo_input(label="photo"),
                gr.Number(label="focal_length", value=None),
                gr.Textbox(label="question"),
            ]
            returned = [
                gr.File(label="depth"),
                gr.Textbox(label="answer"),
                gr.JSON(label="camera"),
                gr.File(label="cloud"),
            ]
            gr.Button().click(
                self.predict, given, returned, api_name="predict", concurrency_id="model", concurrency_limit=1
            )

    def launch_options(self) -> dict:
        """Of `Blocks.launch`: downloads from memory, and what Gradio would do that this page does not need, closed."""

        def download(request: Request) -> Response:
            offered = self.visits.download(request.path_params["token"])
            if offered is None:
                return PlainTextResponse("This file is gone with the page that offered it.", status_code=404)
            headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
            if offered.kind != "video/mp4":
                headers["Content-Disposition"] = "attachment"
            return Response(offered.make(), media_type=offered.kind, headers=headers)

        return {
            "app_kwargs": {
                "routes": [Route("/download/{token}/{name}", download)],
                "middleware": [Middleware(Closed)],
            },
            "css": STYLE,
            "footer_links": ["api"],
            "run_history": False,
        }


class Closed:
    """ASGI middleware that answers 403 to `CLOSED`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith(CLOSED):
            await PlainTextResponse("closed", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def partial_request(function, **given):
    """`function` with arguments given, in a form whose `gr.Request` Gradio still sees."""

    def call(path, question, tokens, focal_length, unit, request: gr.Request):
        yield from function(path, question, tokens, focal_length, unit, request=request, **given)

    return call


def to_pixels(value, unit: str, size: tuple[int, int]) -> float:
    """A stated focal length in px of a photo of `size`."""
    if value is None or not value > 0:
        raise gr.Error("Write a focal length above 0 first.")
    if unit == UNITS[1]:
        return focal_of_35mm(value, size)
    if unit == UNITS[2]:
        if not 1 < value < 160:
            raise gr.Error(f"A field of view of {value:g} degrees cannot be; write one between 1 and 160.")
        return focal_of_view(value, max(size))
    return value


def says(camera: dict) -> str:
    """Where a focal length came from, in plain words."""
    source = camera["focal_length_source"]
    known = {
        "exif": "from the photo's EXIF data.",
        "assumed": "**assumed** (60 degrees of view). Metres are as far off as it is: correct it under *Camera*.",
        "given": "as given.",
        "given, rescaled": "as given; metres were rescaled, without a new run.",
    }
    return known.get(source, f"{source}.")


def camera_text(camera: dict) -> str:
    focal, size = camera["fx"], (camera["width"], camera["height"])
    equivalent = focal / math.hypot(*size) * FULL_FRAME_DIAGONAL
    view = view_of_focal(focal, max(size))
    text = f"{focal:.1f} px at {size[0]}x{size[1]}, {equivalent:.1f} mm (35 mm equivalent), {view:.1f} degrees"
    return f"{text}: {says(camera)}"


def resized(camera: dict, size: tuple[int, int]) -> dict:
    """The camera of the same photo at another size."""
    across, down = size[0] / camera["width"], size[1] / camera["height"]
    changed = {"width": size[0], "height": size[1], "fx": camera["fx"] * across, "fy": camera["fy"] * down}
    changed |= {"cx": (camera["cx"] + 0.5) * across - 0.5, "cy": (camera["cy"] + 0.5) * down - 0.5}
    return camera | changed


def payload(engine: Engine, result: Result) -> str:
    """What viewer.js draws: the map at the view's size, as uint16 of the logarithm, steps of 0.02 % at most."""
    depth = engine.depth(result, result.view.size[::-1])
    near, far = float(depth.min()), float(depth.max())
    step = max(math.log(far / near), 1e-6) / 65535
    stored = np.rint(np.log(depth / near) / step).astype("<u2")
    limits = outputs.color_limits(depth)
    camera = resized(describe_camera(result.camera), result.view.size)
    file = io.BytesIO()
    result.view.save(file, "jpeg", quality=90)
    return json.dumps(
        {name: camera[name] for name in ("width", "height", "fx", "fy", "cx", "cy")}
        | {
            "key": result.key,
            "a": math.log(near),
            "b": step,
            "depth": base64.b64encode(zlib.compress(stored.tobytes(), 1)).decode("ascii"),
            "photo": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}",
            "near": limits[0],
            "far": limits[1],
            "ticks": outputs.round_metres(*limits),
            "palette": outputs.PALETTE[: outputs.SHADES].tolist(),
        }
    )


def links(addresses: dict[str, str]) -> str:
    items = "".join(
        f'<li><a href="{address}" download>{html.escape(name)}</a></li>' for name, address in addresses.items()
    )
    return f'<ul class="downloads" aria-label="Downloads">{items}</ul>' if items else ""


def table_of(rows: list[list]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["photo", "size", "focal_length", "source", "min", "median", "max", "answer"], *rows])
    return file.getvalue().encode()


def zipped(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()
