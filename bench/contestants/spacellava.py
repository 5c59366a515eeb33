"""SpaceLLaVA (`remyxai/SpaceLLaVA`): through an endpoint of its own."""

from ._prompt import Served


class SpaceLLaVA(Served):
    title = "SpaceLLaVA"
    needs = "LLaVA's own code, or llama.cpp for its GGUF files"


CONTESTANT = SpaceLLaVA
