"""SpatialRGPT (`a8cheng/SpatialRGPT-VILA1.5-8B`): through an endpoint of its own."""

from ._prompt import Served


class SpatialRGPT(Served):
    title = "SpatialRGPT"
    needs = "its fork of VILA, with transformers 4.37 and torch 2.3"


CONTESTANT = SpatialRGPT
