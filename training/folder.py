"""RGB-D frames as a plain folder: `rgb/NAME.*`, `depth/NAME.png` and `camera.json`.

`camera.json` states what the images do not: `depth_scale`, by which the 16-bit values of the depth maps are divided to
give metres (0 = no measurement), and `focal_length`, in px of the images at their own size: one number for all, an
object with one per NAME, the name of a JSON file with such an object or of a CSV file with the columns name and
focal_length, or "exif" for what each image's EXIF data say.
"""

import csv
import io
import json
import math
from functools import cached_property
from pathlib import Path

CAMERA = "camera.json"
EXIF = "exif"


def inside(root: str | Path, name: str) -> Path:
    """`root / name`, refused with ValueError where that leads out of root: by `..`, as an absolute path, by a link."""
    path = (Path(root) / name).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise ValueError(f"path {name!r} leads out of {root}; only files below it are read")
    return path


class RGBDFolder:
    """
    names: of the frames, sorted: the path below `rgb/` or `depth/` without suffix. A frame that lacks one of its files
    is listed too, so that whoever reads it meets that.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        camera = self.read_object(CAMERA)
        if missing := {"depth_scale", "focal_length"} - camera.keys():
            raise ValueError(
                f"{self.path / CAMERA} lacks {', '.join(sorted(missing))}; see the README, 'Your own data'"
            )
        self.depth_scale, self.stated = camera["depth_scale"], camera["focal_length"]
        if not is_positive(self.depth_scale):
            raise ValueError(f"depth_scale in {self.path / CAMERA} is {self.depth_scale}; give the values per metre")
        if not (self.stated == EXIF or is_positive(self.stated) or isinstance(self.stated, (str, dict))):
            raise ValueError(
                f"focal_length in {self.path / CAMERA} is {self.stated}; give px, px per name, the name of a JSON or "
                f'CSV file, or "{EXIF}"'
            )
        self.images = {}
        for file in files_below(self.path / "rgb"):
            other = self.images.setdefault(stem(file), file)
            if other != file:
                raise ValueError(f"{self.path / 'rgb'} holds {other} and {file}, one frame twice; remove one of them")
        depths = {stem(file) for file in files_below(self.path / "depth")}
        self.names = sorted(self.images.keys() | depths)

    @staticmethod
    def is_one(path: str | Path) -> bool:
        return (Path(path) / "rgb").is_dir() and (Path(path) / "depth").is_dir()

    def image(self, name: str) -> str:
        """Path of the frame's image, from the folder on."""
        return f"rgb/{self.images.get(name, f'{name}.*')}"

    def depth(self, name: str) -> str:
        """Path of the frame's depth map, from the folder on."""
        return f"depth/{name}.png"

    def focal_length(self, name: str) -> float | str | None:
        """In px, "exif", or None where a file with one per name lacks this one."""
        if isinstance(self.stated, dict) or (isinstance(self.stated, str) and self.stated != EXIF):
            return self.per_name.get(name)
        return self.stated

    @cached_property
    def per_name(self) -> dict[str, float]:
        if isinstance(self.stated, dict):
            return self.stated
        if not self.stated.endswith(".csv"):
            return self.read_object(self.stated)
        table = csv.DictReader(io.StringIO(self.read_text(self.stated)))
        if not {"name", "focal_length"} <= set(table.fieldnames or ()):
            raise ValueError(
                f"{self.path / self.stated} has the columns {table.fieldnames}; name and focal_length are needed"
            )
        return {row["name"]: float(row["focal_length"]) for row in table}

    def read_text(self, name: str) -> str:
        return inside(self.path, name).read_text(encoding="utf-8-sig")

    def read_object(self, name: str) -> dict:
        try:
            content = json.loads(self.read_text(name))
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} has no {name}; see the README, 'Your own data'") from error
        except ValueError as error:
            raise ValueError(f"{self.path / name} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path / name} holds no JSON object; see the README, 'Your own data'")
        return content


def files_below(folder: Path) -> list[str]:
    """Paths of the files, from the folder on, without hidden ones."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def stem(file: str) -> str:
    return file.rpartition(".")[0]


def is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
