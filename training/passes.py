"""The order in which one reader takes the rows of one data set, pass after pass, from any place on."""

import functools
from collections.abc import Iterator

import numpy as np

from .rows import Rows


class Passes:
    """
    One reader's way through one data set. All blocks of all passes form one sequence, of which reader r gets number
    first + r, first + r + readers, and so on.

    step: how many of them it has finished. offset: rows taken of the `together(step)` ones after them.
    """

    def __init__(
        self, rows: Rows, buffer: int, seed: tuple, reader: int, readers: int, first: int, step: int, offset: int
    ) -> None:
        self.rows, self.buffer, self.seed = rows, buffer, seed
        self.reader, self.readers, self.first, self.step, self.offset = reader, readers, first, step, offset
        self.arrange()

    def number(self, step: int) -> int:
        return self.first + self.reader + step * self.readers

    def block(self, number: int) -> int:
        turn, place = divmod(number, len(self.rows.sizes))
        return int(block_order(self.seed, turn, len(self.rows.sizes))[place])

    def together(self, step: int) -> list[int]:
        """The reader's next blocks of one pass, until they hold `buffer` rows."""
        numbers = [self.number(step)]
        rows = self.rows.sizes[self.block(numbers[0])]
        while rows < self.buffer:
            number = self.number(step + len(numbers))
            if number // len(self.rows.sizes) != numbers[0] // len(self.rows.sizes):
                break
            numbers.append(number)
            rows += self.rows.sizes[self.block(number)]
        return [self.block(number) for number in numbers]

    def arrange(self) -> None:
        """Go on to the next blocks where these are finished, and lay out their rows."""
        self.blocks = self.together(self.step)
        self.ends = np.cumsum(self.rows.sizes[self.blocks])
        if self.offset == self.ends[-1]:
            self.step, self.offset = self.step + len(self.blocks), 0
            return self.arrange()
        number, sharing = self.number(self.step), []
        start = number - self.reader
        if len(self.rows.sizes) < self.readers:
            sharing = [other for other in range(start, start + self.readers) if self.block(other) == self.blocks[0]]
        place = start if sharing else number
        rows = np.random.default_rng([*self.seed, 1, place, self.blocks[0]]).permutation(self.ends[-1])
        if sharing:
            rows = np.roll(rows, -(sharing.index(number) * len(rows) // len(sharing)))
        self.order, self.opened = rows, {}

    def next(self) -> tuple[int, int]:
        """(block, row) of the next row."""
        if self.offset == len(self.order):
            self.arrange()
        place = int(self.order[self.offset])
        index = int(np.searchsorted(self.ends, place, side="right"))
        self.offset += 1
        return self.blocks[index], place - int(self.ends[index - 1] if index else 0)

    def read(self, block: int, row: int) -> dict:
        if block not in self.opened:
            self.opened[block] = self.rows.read(block)
        return self.opened[block][row]

    def taken(self, since: int) -> Iterator[tuple[int, int]]:
        """(block, rows taken) of the reader's blocks from number `since` on."""
        for step in range(self.step - 1, -1, -1):
            if self.number(step) < since:
                break
            block = self.block(self.number(step))
            yield block, int(self.rows.sizes[block])
        for index in self.order[: self.offset]:
            yield self.blocks[int(np.searchsorted(self.ends, index, side="right"))], 1


@functools.lru_cache(maxsize=32)
def block_order(seed: tuple, turn: int, blocks: int) -> np.ndarray:
    """The order of the blocks in a pass."""
    return np.random.default_rng([*seed, 0, turn]).permutation(blocks)
