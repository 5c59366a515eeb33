"""The web page: `python app.py`, or a Hugging Face Space.

A photo gives its depth to measure in, a cloud to turn and answers to questions. It is served on this machine alone
unless --host says otherwise; nothing that visitors upload outlives their visit.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SAMPLES = [
    (ROOT / "samples" / "room.jpg", "Which is nearer, the left or the right half?"),
    (ROOT / "samples" / "street.jpg", "How far is the point at 75 % from the left and 50 % from the top?"),
]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or hub id; default: here")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: an accelerator, if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights but the depth head's (bitsandbytes)")
    parser.add_argument("--camera-from", metavar="MODEL", help="as predict.py's: depth_pro:ID or moge:ID")
    parser.add_argument("--host", help="default: this machine alone (or GRADIO_SERVER_NAME, as Gradio has it)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--max-upload", default="32mb", metavar="SIZE", help="of a file; default: 32mb")
    parser.add_argument("--max-megapixels", type=float, default=50, metavar="N", help="of a photo; default: 50")
    return parser.parse_args(arguments)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the model and answer until the process is interrupted. folder: for Gradio's files, empty."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when Gradio is imported
    from transformers.utils import logging

    from depthvlm import predict

    try:
        from web.actions import Actions
        from web.engine import Engine
        from web.page import Page
    except ImportError as error:
        raise ValueError(f'a package is missing ({error}): pip install -e ".[app]"') from error

    logging.disable_progress_bar()
    device = predict.usable_device(args.device)
    estimate = predict.load_estimator(args.camera_from, device) if args.camera_from else None
    model, processor = predict.load(args.model, device, args.dtype, args.quantize)
    settings = {"model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "quantize": args.quantize}
    engine = Engine(model, processor, settings, estimate, args.camera_from)
    page = Page(Actions(engine, folder, args.max_megapixels), SAMPLES)
    page.build().launch(
        server_name=args.host, server_port=args.port, max_file_size=args.max_upload, **page.launch_options()
    )


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then too
    with tempfile.TemporaryDirectory(prefix="depthvlm-") as folder:
        try:
            serve(args, Path(folder).resolve())
        except (ValueError, OSError) as error:
            print(f"app.py: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
