"""Held-out rows: as model inputs, the same each time, and shared among ranks so that each counts once."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .data import DataArguments, load_sample, open_sample
from .encoding import Collator, Encoder
from .rows import Rows
from .stream import report, row_name


class EvalSamples(torch.utils.data.Dataset):
    """
    The first rows of the held-out data as model inputs, the same each time.

    In the place of a row that cannot be used, which is logged, stands a text of which nothing is learnt (`labels` are
    -100, and there are no `depth_labels`), so that it adds nothing to a sum of losses.
    """

    def __init__(self, arguments: DataArguments, encoder: Encoder, log: Path | None = None) -> None:
        self.sources, self.encoder, self.log = arguments.eval_datasets, encoder, log
        self.rows = [source.open() for source in self.sources]
        self.places = [
            (index, block, row)
            for index, rows in enumerate(self.rows)
            for block, row in itertools.islice(places_of(rows), arguments.max_eval_samples)
        ]
        self.opened = None, None
        messages = [{"role": role, "content": []} for role in ("user", "assistant")]
        nothing = encoder(
            dict.fromkeys(("others", "images", "focal_lengths", "depth_maps"), []) | {"messages": messages}
        )
        self.nothing = nothing | {"labels": torch.full_like(nothing["labels"], -100)}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        number, block, row = self.places[index]
        source, stored, generator = self.sources[number], {}, np.random.default_rng(index)
        try:
            if self.opened[0] != (number, block):
                self.opened = (number, block), self.rows[number].read(block)
            stored = self.opened[1][row]
            sample = open_sample(stored, source, generator)
            self.encoder.measure(sample)
            encoded = self.encoder(load_sample(sample, source, generator))
        except Exception as error:  # as in training
            report(source, row_name(stored, self.rows[number], block, row), error, self.log)
            encoded = self.nothing
        return encoded | {"set": number}


def places_of(rows: Rows) -> Iterator[tuple[int, int]]:
    return ((block, row) for block, size in enumerate(rows.sizes.tolist()) for row in range(size))


class FilledUp(torch.utils.data.Dataset):
    """A data set whose indices beyond its length are rows of it that are marked not to count."""

    def __init__(self, dataset: EvalSamples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[dict, bool]:
        return self.dataset[index % len(self.dataset)], index < len(self.dataset)


def collate_filled_up(collator: Collator, rows: list[tuple[dict, bool]]) -> dict:
    """A batch without the answers and depth labels of the rows that do not count."""
    samples, counts = zip(*rows, strict=True)
    batch = collator(list(samples))
    batch["labels"][~torch.tensor(counts)] = -100
    if "depth_labels" in batch:
        of_images = [counted for sample, counted in rows for _ in sample["depth_labels"]]
        batch["depth_labels"] = [
            label if counted else torch.zeros_like(label)
            for label, counted in zip(batch["depth_labels"], of_images, strict=True)
        ]
    return batch
