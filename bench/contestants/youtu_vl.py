"""Youtu-VL (`tencent/Youtu-VL-4B-Instruct`): through an endpoint of its own.

Its dense depth comes as quantised levels whose scale is not public, so that it can only be asked in words.
"""

from ._prompt import Served


class YoutuVL(Served):
    title = "Youtu-VL"
    needs = "its own code, with transformers 4.56 to 4.57.1, and pydensecrf"


CONTESTANT = YoutuVL
