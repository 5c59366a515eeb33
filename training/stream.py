"""The order in which rows come: shuffled, divided among readers, batched by length, resumed without reading again.

Every DataLoader worker of every rank is a *reader*. A reader draws from all data sets in fixed proportions, and from
each data set in passes over its blocks (`rows.py`). Each pass takes the blocks in a new order, the same for all
readers, and deals them out in turn, beginning with the reader whose turn it was at the end of the previous pass: a
reader gets different blocks in each pass, and all readers get equally many. If a data set has fewer blocks than there
are readers, the readers that share a block read all of it, each beginning at a different row. Rows are shuffled within
a block, or within as many of the reader's blocks of a pass as hold `shuffle_buffer` rows. The order depends on the seed
and on the number of readers alone, so that reading can resume at any row.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .data import DataArguments, DataSource, load_sample, open_sample
from .encoding import Encoder
from .passes import Passes
from .rows import Rows

logger = logging.get_logger(__name__)

# Batches of similar length are chosen from a pool of opened rows
POOL_BATCHES = 16  # size of the pool, in batches
PASS_FRACTION = 8  # the pool is at most an eighth of a pass over all data sets, so that no row is in it twice
GOOD_PADDING = 0.05  # share of padding up to which all batches are equally good
PATIENCE = 16  # longest wait of a row for others of its length: this many pools, or half a pass
REFUSED_AT_MOST = 100  # rows beyond those opened ahead, without a single one that can be used, before a reader gives up


class TrainingStream(torch.utils.data.IterableDataset):
    """
    The endless mix of a rank, split over its DataLoader workers, that goes on from any sample.

    encoder: makes the model's inputs; without one, samples are as `load_sample` returns them. batch_size: of the
    DataLoader; rows of similar numbers of tokens are batched together, which needs an encoder. log: where rows that
    cannot be used are listed; they are passed over and counted. A reader that finds none to use raises ValueError.

    Every sample also holds `set`, the index of its data set, and `position`: (worker, where it stands), for `resume`.
    """

    def __init__(
        self,
        arguments: DataArguments,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        log: Path | None = None,
        encoder: Encoder | None = None,
        batch_size: int = 1,
    ) -> None:
        if not arguments.datasets:
            raise ValueError("datasets is empty; list at least one data set with its path in the YAML file")
        self.arguments, self.seed, self.rank, self.world_size, self.log = arguments, seed, rank, world_size, log
        self.encoder, self.batch_size = encoder, batch_size
        self.rows = [source.open() for source in arguments.datasets]
        counts = [int(rows.sizes.sum()) for rows in self.rows]
        for source, count in zip(arguments.datasets, counts, strict=True):
            if not count:
                raise ValueError(f"data set {source.label} ({source.path}) has no rows; leave it out")
        weights = [source.weight for source in arguments.datasets]
        if arguments.sampling == "rows":
            weights = [weight * count for weight, count in zip(weights, counts, strict=True)]
        self.shares = np.array(weights) / sum(weights)
        self.mix = [
            [source.label, source.kind, weight, count, len(rows.sizes)]
            for source, weight, count, rows in zip(arguments.datasets, weights, counts, self.rows, strict=True)
        ]
        self.batches_done, self.states = 0, []

    def resume(self, batches_done: int, positions: Sequence) -> None:
        """
        Go on after `batches_done` batches per rank.

        positions: of each worker's last batch, of all ranks, or, with as many ranks and workers as before, of this rank
        alone. With as many, the batches that follow are those that would have followed. With another number, every
        data set goes on at its first block that was not finished; what comes again and what is skipped is logged.
        Raises ValueError for another mix.
        """
        states = newest(positions)
        for state in states:
            for old, new in itertools.zip_longest(state["mix"], self.mix):
                if old != new:
                    raise ValueError(
                        f"the checkpoint's mix has {old} where this one has {new} (label, kind, weight, rows, blocks); "
                        "resume with the same data sets, or start anew from the checkpoint's weights"
                    )
        self.batches_done, self.states = batches_done, states

    def bad_rows(self, positions: Sequence) -> dict[str, tuple[int, int]]:
        """Label of each data set -> rows read and, of these, rows that could not be used, summed over the positions."""
        totals = np.zeros((2, len(self.rows)), int)
        for state in newest(positions):
            totals += [state["used"], state["refused"]]
        return {
            source.label: (used + refused, refused)
            for source, (used, refused) in zip(self.arguments.datasets, totals.T.tolist(), strict=True)
        }

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        workers = info.num_workers if info else 1
        # a resumed DataLoader asks its first worker first; it plays the one whose turn it is
        worker = ((info.id if info else 0) + self.batches_done) % workers
        reader, readers = self.rank * workers + worker, self.world_size * workers
        if self.states and self.states[0]["readers"] != readers:
            state = self.divide_anew(readers, is_first=self.rank == 0 and worker == self.batches_done % workers)
        else:
            beginning = self.beginning(self.states[0] if self.states else None)
            state = next((state for state in self.states if state["reader"] == reader), beginning)
        return iter(Reader(self, worker, reader, readers, state))

    def beginning(self, other: dict | None = None) -> dict:
        """The state of a reader that has read nothing, while another one may have."""
        zeros = [0] * len(self.rows)
        return {
            "division": other["division"] if other else 0,
            "first": other["first"] if other else zeros,
            "steps": zeros,
            "offsets": zeros,
            "drawn": zeros,
            "used": zeros,
            "refused": zeros,
            "pool": [],
            "group": [],
        }

    def divide_anew(self, readers: int, is_first: bool) -> dict:
        """The state of a reader where the checkpoint has another number of them; the first takes over their counts."""
        old_readers = self.states[0]["readers"]
        states = {reader: self.beginning(self.states[0]) for reader in range(old_readers)}
        states |= {state["reader"]: state for state in self.states}
        firsts, changes = [], []
        for index, source in enumerate(self.arguments.datasets):
            passes = [self.passes(index, reader, old_readers, state) for reader, state in states.items()]
            first = min(one.number(one.step) for one in passes)
            again, blocks = 0, set()
            for one in passes:
                for block, taken in one.taken(first):
                    again += taken
                    blocks.add(block)
            held = [key for state in states.values() for key in [*state["pool"], *state["group"]] if key[1] == index]
            skipped = sum(block not in blocks for _, _, block, _ in held)
            firsts.append(first)
            changes.append(f"{source.label}: {again - len(held) + skipped} rows come again, {skipped} are skipped")
        state = self.beginning({"division": self.states[0]["division"] + 1, "first": firsts})
        if is_first:
            logger.warning(f"{old_readers} readers (ranks x workers) are now {readers}; {'; '.join(changes)}")
            for name in ("used", "refused"):
                state[name] = np.sum([one[name] for one in self.states], axis=0).tolist()
        return state

    def passes(self, index: int, reader: int, readers: int, state: dict) -> "Passes":
        place = state["first"][index], state["steps"][index], state["offsets"][index]
        return Passes(self.rows[index], self.arguments.shuffle_buffer, (self.seed, index), reader, readers, *place)


def newest(positions: Sequence) -> list[dict]:
    """The states of positions, without those from before the readers' number last changed."""
    states = [state for _, state in positions]
    last = max((state["division"] for state in states), default=0)
    return [state for state in states if state["division"] == last]


@dataclass
class Held:
    """An opened sample that waits for its batch."""

    key: tuple[int, int, int, int]  # its number among the reader's rows, data set, block and row
    sample: dict
    length: tuple[float, float]  # in tokens, and a random number, which orders those of equal length
    name: str  # of the row


class Reader:
    """What one reader yields, from a state on."""

    def __init__(self, stream: TrainingStream, worker: int, reader: int, readers: int, state: dict) -> None:
        self.stream, self.worker, self.reader, self.readers = stream, worker, reader, readers
        self.first, self.division = state["first"], state["division"]
        self.passes = [stream.passes(index, reader, readers, state) for index in range(len(stream.rows))]
        self.drawn, self.used, self.refused = (np.array(state[name]) for name in ("drawn", "used", "refused"))
        rows = sum(int(rows.sizes.sum()) for rows in stream.rows) // readers  # of a pass
        batches = POOL_BATCHES if stream.batch_size > 1 else 1
        self.pool_size = max(stream.batch_size, min(stream.batch_size * batches, rows // PASS_FRACTION))
        self.patience = min(PATIENCE * self.pool_size, rows // 2)
        self.in_vain = 0  # rows refused since the last sample
        self.pool, self.group = self.open_again(state["pool"]), self.open_again(state["group"])

    def __iter__(self) -> Iterator[dict]:
        while True:
            if not self.group:
                self.next_group()
            held = self.group.pop(0)
            sample = self.load(held)
            if sample is None:
                self.group.insert(0, self.replacement(held))
                continue
            index = held.key[1]
            self.used[index] += 1
            self.in_vain = 0
            yield sample | {"set": index, "position": (self.worker, self.state())}

    def state(self) -> dict:
        return {
            "division": self.division,
            "reader": self.reader,
            "readers": self.readers,
            "mix": self.stream.mix,
            "first": self.first,
            "steps": [one.step for one in self.passes],
            "offsets": [one.offset for one in self.passes],
            "drawn": self.drawn.tolist(),
            "used": self.used.tolist(),
            "refused": self.refused.tolist(),
            "pool": [held.key for held in self.pool],
            "group": [held.key for held in self.group],
        }

    def next_group(self) -> None:
        """
        Take as many rows as a batch has from the pool, neighbours in length: at random among those that need little
        padding, or, where a row has waited long, the best ones with it.
        """
        size = self.stream.batch_size
        while len(self.pool) < self.pool_size:
            bisect.insort(self.pool, self.draw(), key=lambda held: held.length)
        lengths = np.array([held.length[0] for held in self.pool])
        sums = np.cumsum([0, *lengths])
        padding = 1 - (sums[size:] - sums[:-size]) / np.maximum(lengths[size - 1 :] * size, 1)
        number, oldest = int(self.drawn.sum()), min(range(len(self.pool)), key=lambda index: self.pool[index].key[0])
        if number - self.pool[oldest].key[0] > self.patience:
            first = max(oldest - size + 1, 0)
            start = first + int(padding[first : oldest + 1].argmin())
        else:
            good = np.flatnonzero(padding <= max(GOOD_PADDING, padding.min()))
            start = int(self.generator(number, 2).choice(good))
        self.group = self.pool[start : start + size]
        del self.pool[start : start + size]

    def replacement(self, held: Held) -> Held:
        """The row that is nearest to it in length."""
        if not self.pool:
            return self.draw()
        return self.pool.pop(min(range(len(self.pool)), key=lambda i: abs(self.pool[i].length[0] - held.length[0])))

    def draw(self) -> Held:
        """The next row that can be opened, of the data set that is furthest behind its share."""
        while True:
            number = int(self.drawn.sum())
            index = int(np.argmax(self.stream.shares * (number + 1) - self.drawn))
            self.drawn[index] += 1
            if held := self.open((number, index, *self.passes[index].next()), self.passes[index].read):
                return held

    def open(self, key: tuple[int, int, int, int], read: Callable[[int, int], dict]) -> Held | None:
        number, index, block, row = key
        stored, generator, encoder = {}, self.generator(number, 0), self.stream.encoder
        try:
            stored = read(block, row)
            sample = open_sample(stored, self.source(index), generator)
            length = encoder.measure(sample) if encoder else 0.0
        except Exception as error:  # whatever a decoder raises for what it was given
            return self.refuse(index, row_name(stored, self.stream.rows[index], block, row), error)
        return Held(key, sample, (length, generator.random()), row_name(stored, self.stream.rows[index], block, row))

    def open_again(self, keys: list) -> list[Held]:
        """Rows that were opened before, each block read once."""
        read_block = functools.lru_cache(maxsize=1)(lambda index, block: self.stream.rows[index].read(block))
        held = {}
        for key in sorted(map(tuple, keys), key=lambda key: key[1:]):
            held[key] = self.open(key, lambda block, row, index=key[1]: read_block(index, block)[row])
        return [held[tuple(key)] for key in keys if held[tuple(key)] is not None]

    def load(self, held: Held) -> dict | None:
        number, index, *_ = held.key
        try:
            sample = load_sample(held.sample, self.source(index), self.generator(number, 1))
            return self.stream.encoder(sample) if self.stream.encoder else sample
        except Exception as error:
            return self.refuse(index, held.name, error)

    def refuse(self, index: int, name: str, error: Exception) -> None:
        self.refused[index] += 1
        self.in_vain += 1
        line = report(self.source(index), name, error, self.stream.log)
        if self.in_vain == self.pool_size + REFUSED_AT_MOST:
            raise ValueError(
                f"{self.in_vain} rows were read and none of them can be used; mend the data or their description "
                f"in `datasets`; the last: {line}"
            )

    def source(self, index: int) -> DataSource:
        return self.stream.arguments.datasets[index]

    def generator(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.stream.seed, self.division, self.reader, number, purpose])


def row_name(stored: dict, rows: Rows, block: int, row: int) -> str:
    """A row's own id, else where it is stored."""
    return rows.name(block, row) if stored.get("id") is None else str(stored["id"])


def report(source: DataSource, name: str, error: Exception, log: Path | None) -> str:
    """Name a row that cannot be used, where people look and in the log."""
    reason = f"{type(error).__name__}: {error}"
    line = json.dumps(
        {"data_set": source.label, "path": source.path, "name": source.name, "id": name, "reason": reason}
    )
    logger.warning(f"row that cannot be used, left out: {line}")
    if log:
        with open(log, "a") as file:
            file.write(line + "\n")
    return line
