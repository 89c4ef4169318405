"""The random streams: independent of company, uniform and normal enough, and the same on every device."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zootwins.streams import (
    WORD, Draws, dropout_keep, epoch_order, philox, random_normal, random_words, stream_keys, to_uniform,
)


def plain_philox(counter, key, rounds):
    "Philox4x32 in Python's own integers."
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & WORD, (a >> 32) ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


words = st.integers(0, WORD)


@given(st.tuples(words, words, words, words), st.tuples(words, words), st.sampled_from([7, 10]))
def test_philox_is_exact_in_64_bit_arithmetic(counter, key, rounds):
    drawn = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)), rounds)
    assert [int(w) for w in drawn] == plain_philox(counter, key, rounds)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10_000), st.integers(1, 50))
def test_a_stream_does_not_depend_on_company(n, site, position, epoch):
    keys = stream_keys("usps_seed", "vd", [5, 6, 7])
    together = random_words(n, keys, site, torch.tensor([position] * 3), epoch)
    alone = random_words(n, keys[1], site, position, epoch)
    assert torch.equal(together[1], alone)
    assert torch.equal(random_words(n + 5, keys[1], site, position, epoch)[:n], alone)


def test_streams_of_models_stages_and_runs_differ():
    keys = [
        tuple(stream_keys(zoo, stage, [seed], run)[0].tolist())
        for zoo in "ab"
        for stage in "cd"
        for seed in (1, 2)
        for run in (0, 1)
    ]
    assert len(set(keys)) == 16


def test_uniform_numbers_are_uniform_and_never_zero():
    numbers = to_uniform(random_words(400_000, stream_keys("z", "s", [1])[0], 1)).double().numpy()
    assert 0 < numbers.min() and numbers.max() <= 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert to_uniform(torch.tensor([0])).item() > 0


def test_normals_have_the_moments_and_tails_of_normals():
    numbers = random_normal(2_000_000, stream_keys("z", "s", [1])[0], 1).double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    assert np.abs([numbers.mean(), numbers.var() - 1, stats.skew(numbers), stats.kurtosis(numbers)]).max() < 0.01
    for bound in (2, 3, 4):
        expected = 2 * stats.norm.sf(bound)
        assert abs((np.abs(numbers) > bound).mean() - expected) < 6 * np.sqrt(expected / len(numbers))
    pairs = numbers.reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.005


def test_orders_are_fair_permutations():
    keys = stream_keys("z", "original", list(range(2000)))
    orders = epoch_order(5, keys, 3)
    counts = np.array([[(orders[:, place] == image).sum().item() for image in range(5)] for place in range(5)])
    assert (orders.sort(-1).values == torch.arange(5)).all()
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_dropout_drops_its_share(p):
    draws = Draws(stream_keys("z", "s", [1])[0], torch.arange(100), torch.tensor(2))
    kept = dropout_keep(2000, p, draws.key, 4, draws.position, draws.epoch)
    assert abs(kept.double().mean().item() - (1 - p)) < 0.005
