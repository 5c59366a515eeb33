"""What SUN RGB-D and NYUv2 share: SUN's stored depth and scene folders, and the .mat files that hold splits."""

import numpy as np
import scipy.io

from ._base import BadFrame, BadRaw, Sample, Source, pinhole

ALLSPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"


def metres(stored: np.ndarray) -> np.ndarray:
    """SUN's stored depth (h, w) uint16, millimetres rotated left by 3 bits -> (h, w) float32 metres."""
    millimetres = (stored >> 3) | (stored << 13)
    return millimetres.astype(np.float32) / 1000


def load_scene(source: Source, folder: str) -> Sample:
    """Read the one image of a scene folder below `SUNRGBD/`, e.g. "kv2/kinect2data/000002_...".

    Depth is `depth_bfx`, where holes are filled, if the folder has it, else `depth`: the paper's choice, kept so that
    figures compare. Filled pixels are not measurements, and nothing in the file tells them apart.
    """
    folder = f"SUNRGBD/{folder}"
    image, size = source.read_image(_only_file(source, f"{folder}/image", ".jpg"))
    kind = "depth_bfx" if source.path(folder, "depth_bfx").is_dir() else "depth"
    name = _only_file(source, f"{folder}/{kind}", ".png")
    stored = source.read_depth16(name)
    if stored.shape != size[::-1]:
        raise BadFrame(
            f"{name} is {stored.shape[1]}x{stored.shape[0]} and its image {size[0]}x{size[1]}; "
            "SUN RGB-D keeps both at one size, so one of them is of another scene"
        )
    name = f"{folder}/intrinsics.txt"
    return Sample(image, metres(stored), pinhole(source.read_text(name).split(), name))


def _only_file(source: Source, folder: str, suffix: str) -> str:
    names = [name for name in source.listdir(folder) if name.lower().endswith(suffix)]
    if len(names) != 1:
        raise BadFrame(
            f"{folder} holds {len(names)} *{suffix} files; a SUN RGB-D scene has one image and one depth map"
        )
    return f"{folder}/{names[0]}"


def alltest_folders(source: Source) -> list[str]:
    """Sorted scene folders below `SUNRGBD/` of SUN's official test split (`alltest` of allsplit.mat). Raises BadRaw."""
    if not source.path(ALLSPLIT).is_file():
        raise BadRaw(f"{ALLSPLIT} is not below {source.raw}; unpack SUNRGBDtoolbox.zip there")
    # "/n/fs/sun3d/data/SUNRGBD/kv1//b3dodata/img_0063/" -> "kv1/b3dodata/img_0063"
    entries = [str(np.squeeze(entry)).partition("SUNRGBD/")[2] for entry in read_mat(source, ALLSPLIT, "alltest").flat]
    return sorted({"/".join(filter(None, entry.split("/"))) for entry in entries})


def read_mat(source: Source, name: str, variable: str) -> np.ndarray:
    """One variable of a MAT v5 file; a cell comes as an object array of arrays. Raises BadRaw."""
    path = source.path(name)
    try:
        return scipy.io.loadmat(path, variable_names=[variable])[variable]
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise BadRaw(f"{name} is not a MAT v5 file with {variable!r} ({error!r}); download it again") from error
