"""What SUN RGB-D and NYUv2 share: SUN's depth words and scene folders, and the small .mat files that hold splits."""

import io
import math
import struct
import zlib

import numpy as np

from ._base import BadFrame, BadRaw, Sample, Source

# allsplit.mat holds some 10 000 paths; past this a file is an attack or a mistake.
MAX_MAT_BYTES = 64_000_000
MAX_MAT_ITEMS = 1_000_000

ALLSPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"


def metres(words: np.ndarray) -> np.ndarray:
    """SUN's depth words (h, w) uint16, millimetres rotated left by 3 bits -> (h, w) float32 metres."""
    millimetres = (words >> 3) | (words << 13)
    return millimetres.astype(np.float32) / 1000


def load_scene(source: Source, folder: str) -> Sample:
    """Read the one image of a scene folder below `SUNRGBD/`, e.g. "kv2/kinect2data/000002_...".

    Depth is `depth_bfx`, where holes are filled, if the folder has it, else `depth`: the paper's choice, kept so that
    figures compare. Filled pixels are not measurements, and nothing in the file tells them apart.
    """
    folder = f"SUNRGBD/{folder}"
    image, size = source.read_image(_only_file(source, f"{folder}/image", ".jpg"))
    name = f"{folder}/depth_bfx" if source.path(folder, "depth_bfx").is_dir() else f"{folder}/depth"
    name = _only_file(source, name, ".png")
    words = source.read_depth16(name)
    if words.shape != size[::-1]:
        raise BadFrame(
            f"{name} is {words.shape[1]}x{words.shape[0]} and its image {size[0]}x{size[1]}; "
            "SUN RGB-D keeps both at one size, so one of them is of another scene"
        )
    return Sample(image, metres(words), _intrinsics(source, f"{folder}/intrinsics.txt"))


def _only_file(source: Source, folder: str, suffix: str) -> str:
    names = [name for name in source.listdir(folder) if name.lower().endswith(suffix)]
    if len(names) != 1:
        raise BadFrame(
            f"{folder} holds {len(names)} *{suffix} files; a SUN RGB-D scene has one image and one depth map"
        )
    return f"{folder}/{names[0]}"


def _intrinsics(source: Source, name: str) -> tuple[float, float, float, float]:
    try:
        fx, skew, cx, zero, fy, cy, *last = map(float, source.read_text(name).split())
    except ValueError as error:
        raise BadFrame(f"{name} is not the 9 numbers of a 3x3 camera matrix ({error})") from error
    if (skew, zero, *last) != (0, 0, 0, 0, 1) or not all(map(math.isfinite, (fx, fy, cx, cy))) or min(fx, fy) <= 0:
        raise BadFrame(f"{name} is not a camera matrix fx 0 cx / 0 fy cy / 0 0 1 with positive focal lengths")
    return fx, fy, cx, cy


def alltest_folders(source: Source) -> list[str]:
    """Scene folders below `SUNRGBD/` of SUN's own test split (`alltest` of allsplit.mat), sorted. Raises BadRaw."""
    if not source.path(ALLSPLIT).is_file():
        raise BadRaw(f"{ALLSPLIT} is not below {source.raw}; unpack SUNRGBDtoolbox.zip there")
    return sorted({_folder(str(np.squeeze(entry))) for entry in read_mat(source, ALLSPLIT, "alltest").ravel()})


def _folder(entry: str) -> str:
    """ "/n/fs/sun3d/data/SUNRGBD/kv1//b3dodata/img_0063/" -> "kv1/b3dodata/img_0063"."""
    _, found, below = entry.partition("SUNRGBD/")
    parts = [part for part in below.split("/") if part]
    if not found or len(parts) < 3 or "." in parts or ".." in parts:
        raise BadRaw(f"{ALLSPLIT} lists {entry!r}, not a folder .../SUNRGBD/SENSOR/SOURCE/SCENE; download it again")
    return "/".join(parts)


def read_mat(source: Source, name: str, variable: str) -> np.ndarray:
    """One variable of a MAT v5 file (a cell comes as an object array of arrays); needs scipy. Raises BadRaw."""
    try:
        import scipy.io
    except ImportError as error:
        raise ImportError(f"reading {name} needs scipy; run: pip install scipy") from error
    data = source.read_bytes(name)
    # Damaged files make scipy raise nearly anything.
    try:
        _refuse_bomb(data)
        shapes = {found: shape for found, shape, _ in scipy.io.whosmat(io.BytesIO(data))}
        if math.prod(shapes.get(variable, ())) > MAX_MAT_ITEMS:
            raise ValueError(f"{variable} is declared with shape {shapes[variable]}")
        variables = scipy.io.loadmat(io.BytesIO(data), variable_names=[variable])
    except Exception as error:
        raise BadRaw(f"{name} is not a readable MAT v5 file ({error}); download it again") from error
    if variable not in variables:
        raise BadRaw(f"{name} has no variable {variable!r} but {', '.join(shapes) or 'none'}; download it again")
    return variables[variable]


def _refuse_bomb(data: bytes) -> None:
    """ValueError if a compressed element of a MAT v5 file would inflate past MAX_MAT_BYTES."""
    order = ">" if data[126:128] == b"MI" else "<"
    offset = 128
    while offset + 8 <= len(data):
        kind, length = struct.unpack_from(order + "II", data, offset)
        inflater = zlib.decompressobj()
        if (
            kind == 15
            and len(inflater.decompress(data[offset + 8 : offset + 8 + length], MAX_MAT_BYTES)) == MAX_MAT_BYTES
        ):
            raise ValueError(f"it inflates to {MAX_MAT_BYTES} bytes or more; refused as a decompression bomb")
        offset += 8 + length
