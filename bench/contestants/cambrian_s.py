"""Cambrian-S (`nyu-visionx/Cambrian-S-7B`): through an endpoint of its own."""

from ._prompt import Served


class CambrianS(Served):
    title = "Cambrian-S"
    needs = "the Cambrian-S package"


CONTESTANT = CambrianS
