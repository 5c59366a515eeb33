import random
from collections import Counter

import numpy as np
import pytest

from bench import sampling
from bench.sources._base import Frame


def frames(sizes):
    for (scene, camera), size in sorted(sizes.items()):
        for n in range(size):
            yield Frame(f"{scene}/{camera}/{n}", scene, camera, n)


def chosen(sizes, total, seed=0):
    counted = sampling.count_groups(frames(sizes))
    return list(sampling.choose(frames(sizes), counted, sampling.allot(counted, total, seed)))


def test_all_where_there_are_fewer():
    assert chosen({("a", ""): 5, ("b", ""): 2}, 1000) == list(frames({("a", ""): 5, ("b", ""): 2}))


def test_small_groups_pass_on_their_surplus():
    sizes = {("a", "1"): 100, ("a", "2"): 3, ("b", "1"): 40, ("c", "1"): 7}
    quota = sampling.allot(sizes, 60, 0)
    assert quota == {("a", "1"): 25, ("a", "2"): 3, ("b", "1"): 25, ("c", "1"): 7}


def test_water_filling_is_as_even_as_the_sizes_allow():
    for trial in range(200):
        draw = random.Random(trial)
        sizes = {(str(i), ""): draw.randint(1, 30) for i in range(draw.randint(1, 12))}
        total = draw.randint(1, 200)
        quota = sampling.allot(sizes, total, trial)
        assert sum(quota.values()) == min(total, sum(sizes.values()))
        assert all(0 <= quota[group] <= sizes[group] for group in sizes)
        # A group that could give more never has over one less than another.
        short = [quota[group] for group in sizes if quota[group] < sizes[group]]
        assert not short or max(quota.values()) - min(short) <= 1


def test_remainder_does_not_favour_the_alphabet():
    sizes = {(f"{i:03d}", ""): 10 for i in range(100)}
    taken = [sorted(group for group, n in sampling.allot(sizes, 130, seed).items() if n == 2) for seed in (0, 1)]
    assert [len(groups) for groups in taken] == [30, 30]
    assert taken[0] != taken[1] and taken[0] != sorted(sizes)[:30]
    # fewer images than groups: argoverse2 has 1050 groups for 1000 images
    assert Counter(sampling.allot(sizes, 70, 0).values()) == {1: 70, 0: 30}


def test_order_of_counting_does_not_matter():
    sizes = {(f"{i}", f"{i % 3}"): 1 + i % 7 for i in range(50)}
    backwards = dict(reversed(sizes.items()))
    assert sampling.allot(sizes, 77, 5) == sampling.allot(backwards, 77, 5)


@pytest.mark.parametrize(("size", "n"), [(10, 4), (654, 100), (7, 7), (5, 1), (1000, 999)])
def test_evenly_spaced_within_a_group(size, n):
    assert [f.data for f in chosen({("a", ""): size}, n)] == [j * size // n for j in range(n)]


def test_interleaved_groups_are_chosen_in_listing_order():
    listing = [Frame(str(n), "s", str(n % 3)) for n in range(30)]
    sizes = sampling.count_groups(listing)
    got = list(sampling.choose(listing, sizes, sampling.allot(sizes, 6, 0)))
    assert Counter(f.camera for f in got) == {"0": 2, "1": 2, "2": 2}
    assert [f.id for f in got] == ["0", "1", "2", "15", "16", "17"]


def test_listing_that_changes_between_the_passes_is_refused():
    listing = list(frames({("a", ""): 5}))
    sizes = sampling.count_groups(listing)
    for other in (listing[:4], [*listing, Frame("new", "b")]):
        with pytest.raises(ValueError, match="changed between"):
            list(sampling.choose(other, sizes, {("a", ""): 2}))


def test_point_budget_golden():
    for images, more, n in ((654, 190, 16), (454, 12, 23), (100, 0, 101), (1000, 0, 11)):
        budget = [sampling.points_of_image(i, images) for i in range(images)]
        assert sum(budget) == 10_000 and budget.count(n) == more and budget == sorted(budget, reverse=True)


def words_with(valid, shape=(6, 8)):
    words = np.zeros(shape, np.uint16)
    words.flat[list(valid)] = np.arange(1, len(valid) + 1) * 500
    return words


def test_points_are_valid_pixels_without_repetition_on_the_image_grid():
    words = words_with(range(3, 40, 2))
    u, v, metres = sampling.draw_points(words, 1000.0, (80, 30), 12, 0, "toy", "f")
    assert len(set(zip(u, v, strict=True))) == 12
    columns, rows = (u + 0.5) / 10 - 0.5, (v + 0.5) / 5 - 0.5  # 80 px over 8 columns, 30 over 6 rows
    np.testing.assert_allclose(columns, np.rint(columns), atol=1e-5)
    np.testing.assert_array_equal(metres, words[rows.round().astype(int), columns.round().astype(int)] / 1000.0)
    assert (metres > 0).all()


def test_fewer_valid_pixels_give_fewer_points():
    assert len(sampling.draw_points(words_with(range(5)), 1000.0, (8, 6), 12, 0)[0]) == 5


def test_points_depend_on_seed_source_and_frame_alone():
    words = words_with(range(48))
    draw = lambda *named: sampling.draw_points(words, 1000.0, (8, 6), 5, *named)[0].tolist()  # noqa: E731
    assert draw(0, "toy", "a") == draw(0, "toy", "a")
    assert (
        len({tuple(draw(*named)) for named in [(0, "toy", "a"), (1, "toy", "a"), (0, "t", "a"), (0, "toy", "b")]}) == 4
    )


def test_points_are_the_same_on_every_machine():
    u, v, metres = sampling.draw_points(words_with(range(48)), 1000.0, (8, 6), 4, 0, "toy", "frame")
    assert list(zip(u.tolist(), v.tolist(), metres.tolist(), strict=True)) == GOLDEN_POINTS


GOLDEN_POINTS = [(7.0, 0.0, 4.0), (3.0, 4.0, 18.0), (5.0, 4.0, 19.0), (6.0, 4.0, 19.5)]
