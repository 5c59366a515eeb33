"""bench/intervals.py against scipy's bootstrap, plain loops, and synthetic contestants whose true score is known."""

import numpy as np
import pandas
import pytest
from scipy import stats

from bench import intervals, metrics, released, scoring


def table_of(noise, images, points, scenes=0, delta1=0.3, spread=3.0) -> pandas.DataFrame:
    """Predictions of a contestant whose δ1 over all images that could have been drawn is `delta1`.

    Each image has a share of right points of its own; with `scenes`, each scene has, and its images are alike.
    """
    unit = np.arange(images) * scenes // images if scenes else np.arange(images)
    share = noise.beta(delta1 * spread, (1 - delta1) * spread, unit.max() + 1)[unit]
    counts = points + noise.integers(0, 2, images)
    image = np.repeat(np.arange(images), counts)
    depth = noise.uniform(0.5, 30, len(image))
    right = noise.random(len(image)) < share[image]
    factor = np.where(right, noise.uniform(0.85, 1.2, len(image)), noise.uniform(1.3, 3, len(image)))
    scene = [f"scene{n}" if scenes else "" for n in unit]
    frame = {"id": [f"i{n}" for n in image], "scene": np.array(scene)[image], "gt": depth, "prediction": depth * factor}
    return pandas.DataFrame(frame)


def delta1_interval(table, source="s") -> np.ndarray:
    units, _ = intervals.units_of(table)
    sums = intervals.point_sums(table, units)
    replicates = metrics.from_sums(intervals.resample(sums, source))[:, list(metrics.METRICS).index("delta1")]
    return intervals.bounds(replicates, len(sums))


@pytest.mark.parametrize(("images", "points", "scenes", "delta1"), [(100, 10, 0, 0.87), (40, 10, 10, 0.4)])
def test_intervals_hold_the_true_score_as_often_as_they_say(images, points, scenes, delta1):
    """500 data sets drawn anew: between 93 and 97 %. For ten scenes, plain percentiles hold it in 90 %."""
    noise, held, trials = np.random.default_rng(0), 0, 500
    for trial in range(trials):
        low, high = delta1_interval(table_of(noise, images, points, scenes, delta1, 4.0), str(trial))
        held += low <= delta1 <= high
    assert 0.93 <= held / trials <= 0.97


def test_intervals_are_scipys():
    """A ratio of sums over images, resampled by scipy.stats.bootstrap; both by chance, so within a few percent."""
    table = table_of(np.random.default_rng(1), 150, 10)
    by_image = table.assign(right=np.maximum(table.prediction / table["gt"], table["gt"] / table.prediction) < 1.25)
    sums = by_image.groupby("id").right.agg(["sum", "count"]).to_numpy(float)
    expected = stats.bootstrap(
        (sums[:, 0], sums[:, 1]),
        lambda right, count, axis: right.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = delta1_interval(table)
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.06 * width) and high == pytest.approx(
        expected.high, abs=0.06 * width
    )


def test_sums_give_the_metrics():
    """Sums over units, added up, make the scores of all points; those of some units, the scores of theirs."""
    noise = np.random.default_rng(3)
    table = table_of(noise, 40, 15, scenes=7)
    table.loc[noise.random(len(table)) < 0.1, "prediction"] = np.nan
    table.loc[:3, "prediction"] = [np.inf, -1.0, 0.0, 1e-9]
    units, scenes = intervals.units_of(table)
    assert scenes == units.max() + 1 == 7
    sums = intervals.point_sums(table, units)
    for rows in (np.ones(len(table), bool), units == 3, np.isin(units, [0, 5])):
        expected = metrics.scores(table.prediction[rows].to_numpy(), table["gt"][rows].to_numpy())
        found = metrics.from_sums(sums[np.unique(units[rows])].sum(axis=0))
        for name, value in zip(metrics.METRICS, found, strict=True):
            assert value == pytest.approx(expected[name], rel=1e-9), name


def test_units_are_scenes_where_they_are_known():
    table = pandas.DataFrame({"id": ["a", "a", "b", "c", "d"], "scene": ["x", "x", "", "x", ""]})
    units, scenes = intervals.units_of(table)
    assert units.tolist() == [0, 0, 1, 0, 2] and scenes == 1
    same_name = pandas.DataFrame({"id": ["a", "b"], "scene": ["", "a"]})  # an image and a scene of one name
    assert intervals.units_of(same_name)[0].tolist() == [0, 1]


def test_images_of_a_scene_are_not_independent():
    """Two images that always agree make a wider interval as a scene than they would as two images."""
    table = table_of(np.random.default_rng(4), 200, 10, scenes=20)
    by_scene = np.diff(delta1_interval(table))
    by_image = np.diff(delta1_interval(table.assign(scene="")))
    assert by_scene > 1.5 * by_image


def test_means_of_images():
    """Dense scores, with images that have no value, and released ones: means of what the resampled images have."""
    noise = np.random.default_rng(5)
    table = pandas.DataFrame({"id": [f"i{n}" for n in range(30)], "scene": "", "delta1": noise.random(30)})
    table["boundary_f1"] = np.where(noise.random(30) < 0.4, np.nan, noise.random(30))
    units, _ = intervals.units_of(table)
    sums = intervals.image_sums(table, units, ["delta1", "boundary_f1"])
    whole = scoring.of_images(table.drop(columns="scene").assign(points=1, answered=1))["metrics"]
    assert intervals.means(sums.sum(axis=0)) == pytest.approx([whole["delta1"], whole["boundary_f1"]])
    drawn = np.array([3, 3, 17, 9])
    expected = table.loc[drawn, "boundary_f1"].mean()
    assert intervals.means(sums[drawn].sum(axis=0))[1] == pytest.approx(expected, nan_ok=True)

    points = table_of(noise, 25, 4)
    points.loc[points["id"].isin(["i3", "i4"]), "prediction"] = np.nan  # images with no answer count 0
    points.loc[5, "prediction"] = np.nan
    sums = intervals.released_sums(points, intervals.units_of(points)[0])
    assert intervals.means(sums.sum(axis=0)) == pytest.approx([released.delta1(points)])


def test_resamples_are_fixed_paired_and_of_their_source():
    sums = np.stack([np.arange(50.0), 3 * np.arange(50.0) + 1], axis=1)
    first = intervals.resample(sums, "ibims1")
    assert np.array_equal(first, intervals.resample(sums, "ibims1"))
    assert first[:, 1] == pytest.approx(3 * first[:, 0] + 50)  # the same images for both, 50 of them
    assert np.array_equal(first[:, :1], intervals.resample(sums[:, :1], "ibims1"))
    other = intervals.resample(sums, "nyuv2")
    assert abs(np.corrcoef(first[:, 0], other[:, 0])[0, 1]) < 0.1


def test_what_has_no_interval():
    one = intervals.resample(np.ones((1, 2)), "s")
    assert np.isnan(intervals.bounds(one, 1)).all()
    sums = np.array([[1.0, 1.0]] + [[0.0, 0.0]] * 3)  # one image has points of the kind: some resamples have none
    assert np.isnan(intervals.bounds(intervals.means(intervals.resample(sums, "s")), 4)).all()
    infinite = np.array([[np.inf], [1.0], [2.0]])  # an error too large to square
    assert np.isnan(intervals.bounds(intervals.resample(infinite, "s"), 3)).any()
