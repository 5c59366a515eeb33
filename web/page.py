"""The page's layout, and what of Gradio's server is closed."""

from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from .actions import MAX_FRAMES, MAX_PHOTOS, Actions
from .views import UNITS

HERE = Path(__file__).resolve().parent
STYLE = "body[data-drawing] #chat [data-testid=bot] { visibility: hidden }"
LINKS_STYLE = "ul { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 0 } li { list-style: none }"
# of Gradio's own routes those that read from the network, or write what a visitor did to a disk
CLOSED = ("/gradio_api/file=http", "/gradio_api/proxy", "/gradio_api/deep_link", "/gradio_api/run-history")
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one event at a time
PRIVATE = {"api_visibility": "private"}
ABOUT = """\
Depth is metric: z, along the camera's axis. **Metres need the focal length.** It is read from EXIF where a photo has
it; otherwise a field of view of 60 degrees is assumed, and an assumed focal length that is 20 % off makes each distance
20 % wrong. Webcams, screenshots and messengers' copies have no EXIF; crops have a wrong one. Correct it in *Camera*.

The sky has no distance: what the map shows there means nothing. Lenses are taken as pinholes.

Photos stay in the memory of this server while the page is open, and are removed with it.
"""


async def only_uploads(url_or_file_path: str) -> str:
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
    """samples: (photo, question) to begin with."""

    def __init__(self, actions: Actions, samples: list[tuple[str, str]]):
        self.actions, self.samples = actions, samples

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
            blocks.unload(self.actions.leave)
        self.actions.visits.kept = {path for path in self.actions.visits.folder.rglob("*") if path.is_file()}
        return blocks.queue(max_size=64)

    def build_photo(self) -> None:
        model, quick = MODEL | PRIVATE, {"concurrency_limit": None} | PRIVATE
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
                chat = gr.Chatbot(label="Answers", height=260, elem_id="chat", buttons=["copy"])
                gr.Examples([list(sample) for sample in self.samples], [photo, question], elem_id="examples")
                detail = gr.Slider(
                    4,
                    self.actions.max_tokens,
                    value=self.actions.max_tokens,
                    step=1,
                    label="Detail: image tokens at most (fewer are faster)",
                    elem_id="detail",
                )
            with gr.Column(scale=2, min_width=300):
                with gr.Accordion("Camera", open=False, elem_id="camera"):
                    camera = gr.Markdown(elem_id="camera-text")
                    with gr.Row():
                        focal = gr.Number(label="Focal length", minimum=0, elem_id="focal")
                        unit = gr.Dropdown(UNITS, value=UNITS[0], label="Unit", elem_id="unit")
                    with gr.Row():
                        rescale = gr.Button("Rescale metres", elem_id="rescale")
                        again = gr.Button("Run again with it", elem_id="again")
                    gr.Markdown("Rescaling is immediate. A new run also shows the photo to the model at another size.")
                cloud = gr.Model3D(
                    label="Cloud, without what is very far",
                    height=380,
                    camera_position=(90, 80, None),
                    elem_id="cloud",
                )
                downloads = gr.HTML(css_template=LINKS_STYLE, elem_id="downloads")
        shown = [viewer, status, camera, focal]
        inputs = [photo, question, detail]
        seen = [*shown, chat, question]
        photo.change(self.actions.see, inputs, seen, **model)
        detail.release(self.actions.see, inputs, seen, **model)
        again.click(self.actions.see_again, [*inputs, focal, unit], seen, **model)
        # by itself: Model3D never shows a file that it is given twice before it is ready, as streaming functions do
        viewer.change(self.actions.show_cloud, None, [cloud, downloads], **quick)
        rescale.click(self.actions.rescale, [focal, unit], shown, **quick)
        gr.on([ask.click, question.submit], self.actions.ask, [question, chat], [chat, question], **model)

    def build_several(self) -> None:
        label = f"Up to {MAX_PHOTOS} photos"
        files = file_input(label=label, file_count="multiple", file_types=["image"], elem_id="files")
        question = gr.Textbox(label="Question about each", elem_id="files-question")
        start = gr.Button("Measure all", variant="primary", elem_id="files-start")
        headers = ["photo", "size", "focal length (px)", "source", "min (m)", "median (m)", "max (m)", "answer"]
        table = gr.Dataframe(headers=headers, label="Distances", interactive=False, wrap=True, elem_id="table")
        archive = gr.HTML(css_template=LINKS_STYLE, elem_id="zip")
        start.click(self.actions.see_all, [files, question], [table, archive], **MODEL, **PRIVATE)

    def build_video(self) -> None:
        file = file_input(label="Video", file_types=["video"], elem_id="video")
        with gr.Row():
            fps = gr.Slider(0.5, 10, value=2, step=0.5, label="Frames per second")
            focal = gr.Number(label="Focal length (px), 0 where it is not known", value=0, minimum=0)
        start = gr.Button("Measure frames", variant="primary", elem_id="video-start")
        status = gr.Markdown(elem_id="video-status")
        player = gr.HTML(css_template="video { max-width: 100%; max-height: 70vh }", elem_id="player")
        archive = gr.HTML(css_template=LINKS_STYLE, elem_id="frames")
        gr.Markdown(f"Each frame is measured for itself; the first {MAX_FRAMES} are taken.")
        start.click(self.actions.see_video, [file, fps, focal], [status, player, archive], **MODEL, **PRIVATE)

    def build_api(self) -> None:
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
            gr.Button().click(self.actions.predict, given, returned, api_name="predict", **MODEL)

    def launch_options(self) -> dict:
        """Of `Blocks.launch`: downloads from memory, and what Gradio would do that this page does not need, closed."""

        def download(request: Request) -> Response:
            offered = self.actions.visits.download(request.path_params["token"])
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
