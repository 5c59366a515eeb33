"""HM3D, as rendered by Omnidata: 512x512 views of up to 125 degrees (HM3D itself is meshes only). Train only."""

from ._omnidata import Omnidata


class HM3D(Omnidata):
    name = "hm3d"
    title = "Habitat-Matterport 3D (Omnidata render)"
    page = "https://github.com/EPFL-VILAB/omnidata"
    licence = "Matterport end-user licence agreement for academic use, non-commercial"
    citation = (
        "Ramakrishnan et al., Habitat-Matterport 3D Dataset (HM3D), NeurIPS Datasets and Benchmarks 2021; "
        "Eftekhar et al., Omnidata: A Scalable Pipeline for Making Multi-Task Mid-Level Vision Datasets, ICCV 2021"
    )
    layout = (
        "{rgb,depth_zbuffer,point_info}/hm3d/SCENE/point_P_view_V_domain_*.{png,json} with SCENE like "
        "00000-kfPV7w3FaU5, and metadata.csv (matterport/habitat-matterport-3dresearch)"
    )
    needs = (
        ("metadata.csv", "the list of scenes and their splits"),
        ("rgb/hm3d/*/point_*_domain_rgb.png", "images"),
        ("depth_zbuffer/hm3d/*/point_*_domain_depth_zbuffer.png", "z-depth (not depth_euclidean)"),
        ("point_info/hm3d/*/point_*.json", "cameras"),
    )
    depth_range = (0.01, 10.0)
    part = "hm3d"
    split_file = "metadata.csv"

    def scene_of(self, row: dict[str, str], official_split: str) -> str | None:
        return row["scene"] if row["split"] == official_split else None


SOURCE = HM3D
