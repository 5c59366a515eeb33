"""DepthVLM-Bench as a `datasets` builder: one config per source, and the paper's two groups.

On datasets 3.x this file is a loading script (one import a line, because its parser reads no more):

    load_dataset("bench/depthvlm_bench.py", "nyuv2", data_dir=RAW, trust_remote_code=True)

On datasets >= 4, which runs no scripts, use the class:

    builder = DepthVLMBench(config_name="nyuv2", data_dir=RAW)
    builder.download_and_prepare()
    builder.as_dataset(split="test")

For more than a few thousand images use `python -m bench build`, which is parallel and resumable, and whose Parquet
shards `load_dataset` opens on every version.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets

VERSION = "1.3.0"  # of the rows; raise it when they change, or caches and half-finished builds serve old ones

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),  # unique within source and split
        "source": datasets.Value("string"),
        "split": datasets.Value("string"),
        "scene": datasets.Value("string"),
        "camera": datasets.Value("string"),
        "image": datasets.Image(),
        "depth": datasets.Image(),  # 16-bit PNG at the depth's own size; value / depth_scale = metres, 0 = none
        "depth_scale": datasets.Value("float64"),
        "depth_type": datasets.Value("string"),  # "z", along the optical axis
        "fx": datasets.Value("float64"),  # px of the image as stored, the first pixel's centre at (0, 0)
        "fy": datasets.Value("float64"),
        "cx": datasets.Value("float64"),
        "cy": datasets.Value("float64"),
        "points_u": datasets.Sequence(datasets.Value("float32")),  # px of the image; empty in train rows
        "points_v": datasets.Sequence(datasets.Value("float32")),
        "points_depth": datasets.Sequence(datasets.Value("float64")),  # metres; in float32, 1.6 m would pass 2 / 1.25
        "qa": {
            "kind": datasets.Sequence(datasets.Value("string")),
            "question": datasets.Sequence(datasets.Value("string")),
            "answer": datasets.Sequence(datasets.Value("string")),
        },
    }
)

# The paper's groups: config name -> (split, sources).
GROUPS = {
    "paper_train": (
        "train",
        ("argoverse2", "waymo", "ddad", "nuscenes", "scannetpp", "taskonomy", "hm3d", "matterport3d"),
    ),
    "paper_eval": (
        "test",
        ("argoverse2", "waymo", "ddad", "nuscenes", "scannetpp", "sunrgbd", "ibims1", "nyuv2", "eth3d"),
    ),
}

# Files of the sources beside this one; none where datasets 3.x has copied this file alone into its cache.
_NAMES = sorted(path.stem for path in (Path(__file__).parent / "sources").glob("[!_.]*"))


@dataclass
class BenchConfig(datasets.BuilderConfig):
    """data_dir: the raw folder; for a group, a folder with one raw folder per source, named like the source.

    splits: which of "train" and "test" to prepare. max_frames: images per split and source, chosen evenly over scenes
    and cameras (default: the paper's 1000 for test, at most 800 000 for train).
    """

    splits: tuple = ("train", "test")
    max_frames: int | None = None
    seed: int = 0


class DepthVLMBench(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIG_CLASS = BenchConfig
    VERSION = datasets.Version(VERSION)
    BUILDER_CONFIGS = [BenchConfig(name=name, version=VERSION) for name in (*_NAMES, *GROUPS) if _NAMES]
    DEFAULT_WRITER_BATCH_SIZE = 100

    def _info(self):
        name = self.config.name
        if name in GROUPS:
            return datasets.DatasetInfo(description=f"DepthVLM-Bench: {', '.join(GROUPS[name][1])}", features=FEATURES)
        source = self._module("sources").get(name)
        return datasets.DatasetInfo(
            description=f"DepthVLM-Bench: {source.title}",
            features=FEATURES,
            homepage=source.page,
            license=source.licence,
            citation=source.citation,
        )

    def _split_generators(self, dl_manager):
        name, raw, get = self.config.name, self.config.data_dir, self._module("sources").get
        if name in GROUPS:
            split, members = GROUPS[name]
            present = [member for member in members if raw and (Path(raw) / member).is_dir()]
            if not present:
                raise ValueError(
                    f"{name} needs data_dir: a folder with one raw folder for each of {', '.join(members)}"
                )
            missing = sorted({*members} - {*present})
            if missing:
                datasets.logging.get_logger(__name__).warning(f"{name} without {', '.join(missing)}: not in {raw}")
            parts = {split: [(member, str(Path(raw) / member)) for member in present]}
        else:
            splits = [split for split in get(name).splits if split in self.config.splits]
            parts = {split: [(name, raw)] for split in splits}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "parts": part})
            for split, part in parts.items()
        ]

    def _generate_examples(self, split, parts):
        build, get = self._module("build"), self._module("sources").get
        for name, raw in parts:
            skipped = 0
            reader = build.SourceReader(get(name), raw, split, self.config.seed)
            for frame, n_points in reader.plan(self.config.max_frames)[1]:
                row, reason, _ = build.read_row(reader, frame, n_points)
                if row is None:
                    skipped += 1
                    datasets.logging.get_logger(__name__).warning(f"{name}/{split}: skipped {frame.id}: {reason}")
                else:
                    yield f"{name}/{frame.id}", row
            if skipped:
                datasets.logging.get_logger(__name__).warning(f"{name}/{split}: {skipped} frames skipped in all")

    def _module(self, name):
        """Module `name` of this package; as a lone script, of the folder that the script was loaded from."""
        package = __package__
        if not _NAMES:
            if not (Path(self.base_path or "") / "sources").is_dir():
                raise ValueError(f"no folder 'sources' in {self.base_path!r}; load this script from a copy of bench/")
            package = "depthvlm_bench_" + re.sub(r"\W", "_", str(Path(self.base_path).resolve()))
            if package not in sys.modules:
                spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
                spec.submodule_search_locations = [str(self.base_path)]
                sys.modules[package] = importlib.util.module_from_spec(spec)
        return importlib.import_module(f".{name}", package)
