"""Taskonomy, as in Omnidata's starter set: 512x512 renders of building scans. Train only, buildings of `fullplus`."""

from ._omnidata import Omnidata

SPLIT_FILE = "train_val_test_fullplus.csv"


class Taskonomy(Omnidata):
    name = "taskonomy"
    title = "Taskonomy (Omnidata starter set)"
    page = "https://github.com/EPFL-VILAB/omnidata"
    licence = "research and non-commercial agreement of each building source"
    citation = (
        "Zamir et al., Taskonomy: Disentangling Task Transfer Learning, CVPR 2018; "
        "Eftekhar et al., Omnidata: A Scalable Pipeline for Making Multi-Task Mid-Level Vision Datasets, ICCV 2021"
    )
    layout = (
        "{rgb,depth_zbuffer,point_info}/taskonomy/BUILDING/point_P_view_V_domain_*.{png,json} and "
        f"{SPLIT_FILE} (StanfordVL/taskonomy, data/assets/splits_taskonomy.zip)"
    )
    needs = (
        (SPLIT_FILE, "the list of buildings and their splits"),
        ("rgb/taskonomy/*/point_*_domain_rgb.png", "images"),
        ("depth_zbuffer/taskonomy/*/point_*_domain_depth_zbuffer.png", "z-depth (not depth_euclidean)"),
        ("point_info/taskonomy/*/point_*.json", "cameras"),
    )
    depth_range = (0.005, 15.0)
    part = "taskonomy"
    split_file = SPLIT_FILE

    def scene_of(self, row: dict[str, str], official_split: str) -> str | None:
        return row["id"] if row[official_split] == "1" else None


SOURCE = Taskonomy
