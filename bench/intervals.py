"""95 % intervals of scores, by the bootstrap (Efron and Tibshirani 1993).

A resample draws as many images as there are, with replacement; whole scenes where a data set names them, for images of
one scene are alike. A score is a function of sums over points, so that a resample needs the sums of each unit (scene or
image) alone, and all resamples of all contestants are one matrix product. Every contestant gets the same resamples:
differences between two are the paired bootstrap.
"""

import numpy as np
import pandas
from scipy import stats

from . import metrics, released

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
LARGEST = 4_000_000  # entries of a matrix of draws


def units_of(table: pandas.DataFrame) -> tuple[np.ndarray, int]:
    """(N,) the unit of each row, 0 ... n - 1: its scene, or where that is "" its image; and how many have a scene."""
    scene, name = table.scene.astype(str), table["id"].astype(str)
    units, names = pandas.factorize(scene.where(scene != "", "\0" + name))
    return units, sum(not name.startswith("\0") for name in names)


def point_sums(table: pandas.DataFrame, units: np.ndarray) -> np.ndarray:
    """(units, len(metrics.TERMS)), for `metrics.from_sums`."""
    return sums_by(units, metrics.point_terms(table.prediction.to_numpy(float), table["gt"].to_numpy(float)))


def released_sums(table: pandas.DataFrame, units: np.ndarray) -> np.ndarray:
    """(units, 2): sums of the images' shares, and numbers of images, for `means`."""
    shares = released.delta1_by_image(table).to_numpy()
    first = np.flatnonzero(~table["id"].duplicated())  # images in the order of the shares
    return sums_by(units[first], np.column_stack([shares, np.ones(len(shares))]))


def image_sums(table: pandas.DataFrame, units: np.ndarray, names: list[str]) -> np.ndarray:
    """(units, 2 * names): sums of the images' scores that are there, and numbers of such images, for `means`."""
    values = table[names].to_numpy(float)
    return sums_by(units, np.hstack([np.nan_to_num(values), ~np.isnan(values)]))


def means(sums: np.ndarray) -> np.ndarray:
    total, count = np.split(sums, 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / count


def sums_by(groups: np.ndarray, values: np.ndarray, count: int = 0) -> np.ndarray:
    """(max(groups) + 1, or at least `count`; columns of values): sums of the rows of each group."""
    return np.column_stack([np.bincount(groups, column, count) for column in values.T])


def resample(sums: np.ndarray, source: str) -> np.ndarray:
    """(RESAMPLES, ...) sums over resamples of the units of `sums` (units, ...).

    A source and a number of units always give the same resamples; two sources give independent ones.
    """
    count, flat = len(sums), sums.reshape(len(sums), -1)
    generator = np.random.default_rng([SEED, *source.encode()])
    totals = np.empty((RESAMPLES, flat.shape[1]))
    rows = max(1, LARGEST // count)
    for first in range(0, RESAMPLES, rows):
        block = totals[first : first + rows]
        drawn = generator.integers(count, size=(len(block), count)) + count * np.arange(len(block))[:, None]
        draws = np.bincount(drawn.ravel(), minlength=len(block) * count).reshape(len(block), count)
        with np.errstate(invalid="ignore"):  # an error may be infinite, and not drawn
            block[:] = draws.astype(np.float64) @ flat
    return totals.reshape(RESAMPLES, *sums.shape[1:])


def bounds(replicates: np.ndarray, units: int) -> np.ndarray:
    """(2, ...) lower and upper end of the interval of `replicates` (RESAMPLES, ...); NaN where it has none.

    Percentiles, expanded for few units (Hesterberg 2015): else intervals of 8 scenes cover 90 %.
    """
    if units < 2:
        return np.full((2, *replicates.shape[1:]), np.nan)
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tails = stats.norm.cdf(np.sqrt(units / (units - 1)) * stats.t.ppf(tails, units - 1))
    with np.errstate(invalid="ignore"):
        return np.quantile(replicates, tails, axis=0)
