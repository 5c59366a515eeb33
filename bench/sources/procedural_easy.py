"""Procedural, the easier pictures: rooms with two to four things near the camera, each with a name of its own."""

from .procedural.source import Procedural


class ProceduralEasy(Procedural):
    name = "procedural_easy"
    title = "Procedural rooms with few things"
    citation = "DepthVLM-Bench, procedural rooms with few things"
    splits = {"train": ("easy_train",), "test": ("easy_test",)}


SOURCE = ProceduralEasy
