"""Half-lives in tokens, and the decay factors that follow from them. Pure arithmetic: no torch.

An average with half-life `t` tokens that sees `n` tokens in a step decays by `2 ** (-n / t)`. With a constant
half-life in tokens, an average behaves the same at every batch size (Marek et al., arXiv 2507.07101, section 3.2).
"""

import math

PRETRAINING_HALF_LIFE = 10_000_000.0
"""Default half-life of the second moment for pretraining, in tokens (arXiv 2507.07101, section 4)."""

FINE_TUNING_HALF_LIFE = -16 * 1024 / math.log2(0.95)
"""Default half-life for fine-tuning, about 221,000 tokens: beta2 = 0.95 at 16 x 1024 tokens, hence 0.997 at 1 x 1024."""


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}")


def beta_from_half_life(half_life: float, tokens: float) -> float:
    """Decay factor of one step.

    Args:
        half_life: tokens after which an old value weighs one half.
        tokens: tokens in the step, all ranks together.

    Returns:
        `2 ** (-tokens / half_life)`, between 0 and 1.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    _require_positive("half_life", half_life)
    _require_positive("tokens", tokens)
    return 2.0 ** (-tokens / half_life)


def half_life_from_beta(beta: float, tokens: float) -> float:
    """Half-life in tokens of an average that decays by `beta` in a step of `tokens` tokens.

    Raises:
        ValueError: if `beta` is not strictly between 0 and 1, or `tokens` is not positive and finite.
    """
    _require_positive("tokens", tokens)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be strictly between 0 and 1, got {beta!r}")
    return -tokens / math.log2(beta)


def rescale_beta(beta: float, tokens: float, new_tokens: float) -> float:
    """The decay factor that keeps the half-life in tokens when a step changes from `tokens` to `new_tokens` tokens.

    Equals `beta ** (new_tokens / tokens)`: 0.95 at 512 sequences becomes 0.9999 at one. (The rule is sometimes quoted
    with the two sizes exchanged.)

    Raises:
        ValueError: if `beta` is not strictly between 0 and 1, or a token count is not positive and finite.
    """
    return beta_from_half_life(half_life_from_beta(beta, tokens), new_tokens)


def debias(half_life: float, tokens_seen: float) -> float:
    """Weight that an average started at zero has collected after `tokens_seen` tokens; divide by it to remove the bias.

    Returns:
        `1 - 2 ** (-tokens_seen / half_life)`, between 0 and 1, accurate for small ratios too.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    _require_positive("half_life", half_life)
    _require_positive("tokens_seen", tokens_seen)
    return -math.expm1(-tokens_seen / half_life * math.log(2.0))
