"""The picture at the top of the README, by the checkpoint in this repository: python samples/overview.py"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from depthvlm import handler, predict
from depthvlm.photos_depthvlm import open_photo
from depthvlm.predictions import outputs

HERE = Path(__file__).resolve().parent
WIDTH, GAP = 400, 10  # px
TURN, TILT = math.radians(-24), math.radians(-16)  # of the cloud, about its middle
GROUND = 26  # grey behind the cloud


def draw_cloud(depth: np.ndarray, camera: dict, photo: Image.Image) -> Image.Image:
    """The points as a camera sees them that looks at their middle from the left and above."""
    points = outputs.unproject(depth, camera, 1)[outputs.on_surface(depth, camera, 1)].astype(np.float64)
    colors = np.asarray(photo)[outputs.on_surface(depth, camera, 1)]
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    about_y = [[math.cos(TURN), 0, -math.sin(TURN)], [0, 1, 0], [math.sin(TURN), 0, math.cos(TURN)]]
    about_x = [[1, 0, 0], [0, math.cos(TILT), math.sin(TILT)], [0, -math.sin(TILT), math.cos(TILT)]]
    points = (points - middle) @ np.transpose(about_y) @ np.transpose(about_x) + [0, 0, 1.45 * middle[2]]
    order = np.argsort(-points[:, 2])  # the nearest is painted last
    points, colors = points[order], colors[order]
    columns = np.rint(points[:, 0] / points[:, 2] * camera["fx"] + camera["cx"]).astype(int)
    rows = np.rint(points[:, 1] / points[:, 2] * camera["fy"] + camera["cy"]).astype(int)
    picture = np.full((*depth.shape, 3), GROUND, np.uint8)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inside = (0 <= rows + down) & (rows + down < len(picture)) & (0 <= columns + right)
        inside &= columns + right < picture.shape[1]
        picture[rows[inside] + down, columns[inside] + right] = colors[inside]
    return Image.fromarray(picture)


def main() -> None:
    photo, focal_length = open_photo(HERE / "room.jpg", "the photo")
    model, processor = predict.load(str(HERE.parent), "cpu")
    inputs = handler.encode_inputs(processor, [photo], None, [focal_length], None)
    with torch.inference_mode():
        camera, depth, _ = handler.predict(model, processor, inputs, False)[0]
    colors = Image.open(io.BytesIO(outputs.color_png(depth)))
    cloud = draw_cloud(depth, handler.describe_camera(camera), photo)
    panels = [panel.convert("RGB").resize((WIDTH, round(WIDTH * panel.height / panel.width)), Image.Resampling.LANCZOS)
              for panel in (photo, colors, cloud)]  # fmt: skip
    picture = Image.new("RGB", (3 * WIDTH + 2 * GAP, max(panel.height for panel in panels)), "white")
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * (WIDTH + GAP), 0))
    picture.save(HERE / "overview.jpg", quality=88)


if __name__ == "__main__":
    main()
