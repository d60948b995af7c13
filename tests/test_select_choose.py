"""Heads from scores and from none, against choices made by exhaustion and by hand."""

from itertools import combinations

import numpy as np
import pytest

from mlx_hydra.config import check_heads
from mlx_hydra.select.choose import (
    Budget,
    choose_by_scores,
    choose_fixed,
    choose_layers,
    ranked,
)


def best_by_exhaustion(scores, count, least):
    """The largest sum of scores under the constraint, over all choices."""
    L, H = scores.shape
    units = [(layer, head) for layer in range(L) for head in range(H)]
    allowed = [
        chosen
        for chosen in combinations(units, count)
        if all(sum(layer == at for at, _ in chosen) >= least for layer in range(L))
    ]
    best = max(allowed, key=lambda chosen: sum(scores[unit] for unit in chosen))
    return [[head for at, head in best if at == layer] for layer in range(L)]


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_screening_keeps_the_largest_sum(seed, least):
    scores = np.random.default_rng(seed).random((3, 4))
    # One layer has nothing to offer, so that the constraint binds.
    scores[seed % 3] *= 0.01
    heads = choose_by_scores(scores, Budget(0.5, least))
    assert heads == best_by_exhaustion(scores, 6, least)
    check_heads(heads, 3, 4)


@pytest.mark.parametrize("least", [0, 1, 2, 3])
def test_groups_keep_the_largest_sum_of_whole_groups(least):
    scores = np.random.default_rng(1).random((3, 8))
    scores[0] *= 0.01
    heads = choose_by_scores(scores, Budget(0.5, least, 2))
    groups = scores.reshape(3, 4, 2).mean(-1)
    expected = best_by_exhaustion(groups, 6, -(-least // 2))
    assert heads == [[h for g in layer for h in (2 * g, 2 * g + 1)] for layer in expected]


def test_equal_scores_go_to_the_layer_with_the_fewest():
    assert choose_by_scores(np.zeros((2, 4)), Budget(0.25, 0)) == [[0], [0]]
    assert choose_by_scores(np.zeros((2, 4)), Budget(0.5, 1)) == [[0, 1], [0, 1]]
    # Two heads of the first layer count, one of the last; of the rest none.
    scores = np.zeros((3, 4))
    scores[0, 1:3], scores[2, 3] = 1, 0.5
    assert choose_by_scores(scores, Budget(0.5, 0)) == [[1, 2], [0, 1], [0, 3]]
    assert choose_by_scores(scores, Budget(0.75, 0)) == [[0, 1, 2], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = np.zeros((2, 4))
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="layer 1, head 2 is"):
        choose_by_scores(scores, Budget(0.5, 1))


def test_ranking_takes_the_first_of_equals():
    assert ranked(np.array([[0.0, 1.0], [1.0, -1.0]])) == [(0, 1), (1, 0), (0, 0), (1, 1)]


def test_all_heads_and_at_least_one():
    assert choose_by_scores(np.zeros((2, 2)), Budget(1, 2)) == [[0, 1], [0, 1]]
    assert choose_by_scores(np.eye(2), Budget(0.01, 0)) == [[0], []]


def test_fixed_heads_are_the_same_in_each_layer_and_spread():
    assert choose_fixed((3, 16), Budget(0.125, 1)) == [[0, 8]] * 3
    assert choose_fixed((2, 16), Budget(0.25, 1)) == [[0, 4, 8, 12]] * 2
    assert choose_fixed((2, 8), Budget(0.25, 0, 2)) == [[0, 1]] * 2
    assert choose_fixed((2, 8), Budget(0.5, 0, 2)) == [[0, 1, 4, 5]] * 2
    # One at least.
    assert choose_fixed((1, 8), Budget(0.01, 0)) == choose_fixed((1, 8), Budget(0.01, 1)) == [[0]]
    assert choose_fixed((1, 8), Budget(0.25, 2)) == [[0, 4]]


def test_whole_layers_are_spread_as_in_hybrids():
    full = [layer for layer, heads in enumerate(choose_layers((28, 2), 0.25)) if heads]
    assert full == [3, 7, 11, 15, 19, 23, 27]
    assert choose_layers((4, 2), 0.5) == [[], [0, 1], [], [0, 1]]
    assert choose_layers((4, 2), 0.01) == [[], [], [], [0, 1]]


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_ratios_out_of_range(ratio):
    for choose in (
        lambda: choose_by_scores(np.zeros((2, 2)), Budget(ratio, 0)),
        lambda: choose_fixed((2, 2), Budget(ratio, 0)),
        lambda: choose_layers((2, 2), ratio),
    ):
        with pytest.raises(ValueError, match=r"--full-ratio .*: expected a number over 0 and up"):
            choose()


def test_least_heads_out_of_range():
    for least in (-1, 5):
        with pytest.raises(ValueError, match=rf"--min-per-layer {least}: .* from 0 to 4"):
            choose_by_scores(np.zeros((2, 4)), Budget(0.5, least))
        with pytest.raises(ValueError, match=rf"--min-per-layer {least}: .* from 0 to 4"):
            choose_fixed((2, 4), Budget(0.5, least))
    message = r"2 layers need 4 heads in all, --full-ratio 0\.25 keeps 2; .* ratio from 0\.5 up"
    with pytest.raises(ValueError, match=message):
        choose_by_scores(np.zeros((2, 4)), Budget(0.25, 2))
    with pytest.raises(ValueError, match=r"2 layers need 4 heads in all, --full-ratio 0\.25 keep"):
        choose_by_scores(np.zeros((2, 4)), Budget(0.25, 1, 2))
    message = r"3 layers need 9 heads in all, --full-ratio 0\.1 keeps 3; .* ratio from 0\.75 up"
    with pytest.raises(ValueError, match=message):
        choose_fixed((3, 4), Budget(0.1, 3))
    message = r"1 layers need 4 heads in all, --full-ratio 0\.25 keeps 2; .* ratio from 0\.5 up"
    with pytest.raises(ValueError, match=message):
        choose_fixed((1, 8), Budget(0.25, 3, 2))
