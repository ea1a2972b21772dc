"""Laws of dropout. p is rounded to a multiple of 1/256 on a CPU; the laws hold for the rounded one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.dropout import Dropout
from captioner.errors import ConfigError


def _rounded(p):
    return min(round(p * 256), 255) / 256


def _seeded(p, *, seed=0):
    torch.manual_seed(seed)
    return Dropout(p).train()


@pytest.fixture(autouse=True)
def _own_random_numbers():
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9, 0.95])
def test_the_rate_is_p(p):
    n = 200_000
    dropped = (_seeded(p)(torch.ones(n)) == 0).sum().item()
    rate = _rounded(p)
    assert abs(rate - p) <= 1 / 512
    # Six standard deviations of a binomial: a false alarm once in 10^9 seeds, and the seed is fixed.
    assert abs(dropped - n * rate) < 6 * (n * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_expectation_is_kept(p):
    n, rate = 200_000, _rounded(p)
    mean = _seeded(p)(torch.full((n,), 3.0)).mean().item()
    assert abs(mean - 3) < 6 * 3 * (rate / (1 - rate) / n) ** 0.5


@settings(deadline=None, max_examples=100)
@given(p=st.floats(0, 0.999), size=st.integers(0, 20), seed=st.integers(0, 2**32 - 1))
def test_an_element_is_dropped_or_scaled(p, size, seed):
    values = torch.arange(1, size + 1, dtype=torch.float32)
    result = _seeded(p, seed=seed)(values)
    kept = result != 0
    assert result.shape == values.shape
    torch.testing.assert_close(result[kept], values[kept] / (1 - _rounded(p)))


def test_every_place_of_every_size_is_dropped_and_kept():
    for size in range(1, 21):
        draws = torch.stack([_seeded(0.5, seed=seed)(torch.ones(size)) for seed in range(40)])
        assert (draws == 0).any(dim=0).all()
        assert (draws != 0).any(dim=0).all()


def test_neighbouring_elements_are_dropped_independently():
    n = 160_000
    dropped = (_seeded(0.5)(torch.ones(n)) == 0).double() - 0.5
    for distance in (1, 2, 7, 8, 16, 64):  # 8 random bytes come from one number
        correlation = (dropped[:-distance] * dropped[distance:]).mean().item() / 0.25
        assert abs(correlation) < 6 / (n - distance) ** 0.5


@pytest.mark.parametrize("training", [False, True])
def test_without_training_or_rate_the_values_are_left_alone(training):
    values = torch.randn(5, 7)
    assert Dropout(0.0).train(training)(values) is values
    assert Dropout(0.9).eval()(values) is values


def test_p_next_to_one_still_gives_finite_numbers():
    assert _seeded(0.9999)(torch.ones(100_000)).isfinite().all()


def test_the_gradient_is_the_mask():
    values = torch.randn(9, 13, requires_grad=True)
    result = _seeded(0.3)(values)
    result.sum().backward()
    mask = torch.where(result == 0, 0.0, 1 / (1 - _rounded(0.3)))
    torch.testing.assert_close(values.grad, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype):
    values = torch.randn(1000).to(dtype)
    result = _seeded(0.25)(values)
    assert result.dtype == dtype
    kept = result != 0
    assert 600 < kept.sum() < 900
    torch.testing.assert_close(result[kept].double(), values[kept].double() / 0.75, rtol=1e-2, atol=0)


def test_a_view_with_strides_is_dropped_like_any_other():
    values = torch.arange(1.0, 13.0).view(3, 4).T
    result = _seeded(0.5)(values)
    kept = result != 0
    torch.testing.assert_close(result[kept], 2 * values[kept])


def test_the_same_seed_drops_the_same_elements():
    values = torch.ones(100)
    assert torch.equal(_seeded(0.5, seed=3)(values), _seeded(0.5, seed=3)(values))
    assert not torch.equal(_seeded(0.5, seed=3)(values), _seeded(0.5, seed=4)(values))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_p_outside_zero_to_one_is_refused(p):
    with pytest.raises(ConfigError, match="dropout must be at least 0 and below 1"):
        Dropout(p)
