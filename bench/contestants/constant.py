"""The same depth everywhere, `constant:2.0`: what any model has to beat, and a check of data and scorer."""

import numpy as np

from ._base import Contestant, Query


class Constant(Contestant[list[Query]]):
    title = "Constant"
    group = "Naive Prediction with Constant Answers"
    dense = True

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        try:
            self.depth = float(checkpoint)
        except ValueError:
            self.depth = float("nan")
        if not 0 < self.depth < float("inf"):
            raise ValueError(f"constant:{checkpoint} is no depth; write metres above 0, as in constant:2.0")
        self.title = f"Always {self.depth:g} m"

    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        return [np.full(query.image.size[::-1], self.depth, np.float32) for query in prepared]


CONTESTANT = Constant
