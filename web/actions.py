"""What the page does: a photo, questions about it, several photos, a video, and the API's call."""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from depthvlm.handler import describe_camera
from depthvlm.photos_depthvlm import open_image_file, open_photo
from depthvlm.predictions import outputs, videos

from .engine import POINTS, Engine, Result
from .views import camera_text, links, payload, resized, source_text, table_of, to_pixels, zipped
from .visits import FETCHED, Download, Visit, Visits

MEDIA_TYPES = {"png": "image/png", "color": "image/png", "ply": "application/octet-stream", "glb": "model/gltf-binary"}
MEDIA_TYPES |= {"npz": "application/octet-stream", "json": "application/json"}
MAX_PHOTOS, MAX_FRAMES = 20, 60


class Actions:
    """
    The functions behind the page's buttons: what they get and return are Gradio's values, what they raise `gr.Error`.

    engine: the model. folder: Gradio's. max_megapixels: of an upload.
    """

    def __init__(self, engine: Engine, folder: Path, max_megapixels: float):
        self.engine, self.visits = engine, Visits(engine, folder)
        self.max_megapixels = max_megapixels
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

    def prepare(
        self, path: str, name: str, focal_length: float | None, tokens: float | None, question: str | None
    ) -> Result:
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

    def see(self, path, question, tokens, request: gr.Request) -> Iterator[tuple]:
        """Depth of a photo, then the answer to a question that stands in the box already."""
        visit = self.visits.of(request.session_hash)
        if path is None:
            self.clear(visit)
            yield self.nothing()
        elif (path, tokens) == visit.made_with:  # Gradio may report one photo twice
            yield (gr.skip(),) * 6
        else:
            yield from self.look(visit, path, question, tokens, None)

    def see_again(self, path, question, tokens, focal_length, unit, request: gr.Request) -> Iterator[tuple]:
        """The same with a focal length that the visitor states."""
        if path is None:
            raise gr.Error("There is no photo yet.")
        focal_length = to_pixels(focal_length, unit, self.open(path)[0].size)
        yield from self.look(self.visits.of(request.session_hash), path, question, tokens, focal_length)

    def look(self, visit: Visit, path, question, tokens, focal_length: float | None) -> Iterator[tuple]:
        self.clear(visit)
        question = (question or "").strip() or None
        result = self.prepare(path, Path(path).stem, focal_length, tokens, question)
        visit.made_with = (path, tokens)
        self.visits.claim(visit, path)
        chat = [] if question is None else [{"role": "user", "content": question}]
        for text in self.run(self.engine.see(result, question is not None)):
            if text is None:
                visit.result = result
                yield (*self.shown(visit), chat, "" if question else gr.skip())
            else:
                yield (*[gr.skip()] * 4, [*chat, {"role": "assistant", "content": text}], gr.skip())

    def shown(self, visit: Visit) -> tuple:
        """Viewer, status, camera's text and its number, of a visit's result."""
        result = visit.result
        camera = describe_camera(result.camera)
        rows, columns = camera["processed_size"]
        status = (
            f"{result.tokens} image tokens ({columns}x{rows} px), depth after {1000 * result.seconds:.0f} ms. "
            f"Focal length {camera['fx']:.0f} px: {source_text(camera)}"
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
        for text in self.run(self.engine.ask(visit.result, question)):
            yield [*chat, {"role": "assistant", "content": text}], gr.skip()

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
        maps, times, focal_length = [], [], focal_length or None
        with tempfile.TemporaryDirectory(dir=self.visits.folder) as folder:
            try:
                for seconds, frame in videos.read_frames(path, fps, self.max_megapixels):
                    if len(maps) == MAX_FRAMES:
                        break
                    result = self.engine.prepare(frame, name, focal_length, "given", None, None)
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
        player = f'<video controls loop muted src="{offered["depth.mp4"]}" aria-label="Depth video"></video>'
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
        result = self.prepare(photo, "photo", focal_length, None, question)
        self.finish(result, question is not None)
        self.visits.sweep()
        folder = Path(tempfile.mkdtemp(prefix=FETCHED, dir=self.visits.folder))
        depth, cloud = folder / "depth.png", folder / "cloud.glb"
        depth.write_bytes(self.engine.encode(result, "png"))
        cloud.write_bytes(self.engine.encode(result, "glb"))
        return str(depth), result.answer or "", describe_camera(result.camera), str(cloud)

    def leave(self, request: gr.Request) -> None:
        self.visits.leave(request.session_hash)
