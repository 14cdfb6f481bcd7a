"""Half-lives and decay factors against closed forms and the paper's own numbers."""

import math

import pytest

from sbft import tokens


def test_a_half_life_of_tokens_halves():
    assert tokens.beta_from_half_life(1000, 1000) == 0.5
    assert tokens.beta_from_half_life(1000, 1) ** 1000 == pytest.approx(0.5, rel=1e-12)


def test_half_life_and_beta_are_inverse():
    for beta in (0.5, 0.95, 0.997, 0.9999):
        half_life = tokens.half_life_from_beta(beta, 4096)
        assert tokens.beta_from_half_life(half_life, 4096) == pytest.approx(beta, rel=1e-14)


def test_the_papers_scaling_of_beta2():
    assert tokens.rescale_beta(0.95, 512, 1) == pytest.approx(0.9999, abs=5e-7)
    assert tokens.rescale_beta(0.95, 16 * 1024, 1024) == pytest.approx(0.997, abs=5e-4)
    assert pytest.approx(0.95 ** (1 / 512), rel=1e-14) == tokens.rescale_beta(0.95, 512, 1)


def test_the_fine_tuning_default_is_beta2_095_at_16_by_1024_tokens():
    assert pytest.approx(221_404, abs=1) == tokens.FINE_TUNING_HALF_LIFE
    assert tokens.beta_from_half_life(tokens.FINE_TUNING_HALF_LIFE, 16 * 1024) == pytest.approx(0.95, rel=1e-12)


def test_debias_is_the_weight_of_a_running_average():
    half_life, weight = 500.0, 0.0
    for n in (3, 40, 7, 900):
        beta = tokens.beta_from_half_life(half_life, n)
        weight = beta * weight + (1 - beta)
    assert tokens.debias(half_life, 950) == pytest.approx(weight, rel=1e-12)


def test_debias_keeps_its_digits_when_little_was_seen():
    # 1 - 2 ** -x is x ln 2 for small x; computed naively, the digits cancel.
    assert tokens.debias(1e12, 1) == pytest.approx(math.log(2) * 1e-12, rel=1e-11)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tokens.beta_from_half_life(0, 1), "0"),
        (lambda: tokens.beta_from_half_life(-5.0, 1), "-5.0"),
        (lambda: tokens.beta_from_half_life(math.nan, 1), "nan"),
        (lambda: tokens.beta_from_half_life(10, 0), "0"),
        (lambda: tokens.beta_from_half_life(math.inf, 1), "inf"),
        (lambda: tokens.half_life_from_beta(1.0, 1), "1.0"),
        (lambda: tokens.half_life_from_beta(0.0, 1), "0.0"),
        (lambda: tokens.rescale_beta(1.5, 1, 2), "1.5"),
        (lambda: tokens.debias(10, -3), "-3"),
    ],
)
def test_domain_errors_name_the_value(call, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        call()
