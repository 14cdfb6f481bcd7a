"""Optimizer time in tokens: how many tokens a step holds, and how much each moving average takes from that step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from sbft.optim.counting import TokenCount
from sbft.optim.device_numbers import DeviceNumbers
from sbft.optim.group_settings import Average
from sbft.optim.state import SavedState
from sbft.rounding import Key, noise_key
from sbft.tokens import debias


class ClockedOptimizer(SavedState):
    """The token clock of `TokenOptimizer`, and the numbers that depend on it.

    Attributes:
        averages: the moving averages of an optimizer; those that have a half-life decay per token.
    """

    averages: ClassVar[tuple[Average, ...]] = ()

    _counts: list[TokenCount]
    _needs_tokens: bool | None  # in the open step; None until asked for
    _numbers: DeviceNumbers | None  # replaces the host's numbers while updates are captured
    _captured: bool  # whether a CUDA graph may hold updates, and so addresses of what is carried from step to step

    # Tokens

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of the coming step, all ranks together; None until set."""
        return self._tokens_per_step

    @tokens_per_step.setter
    def tokens_per_step(self, tokens: int) -> None:
        if tokens != int(tokens) or tokens < 1:
            raise ValueError(f"tokens_per_step must be a positive whole number, got {tokens!r}")
        self._tokens_per_step = int(tokens)

    @property
    def needs_tokens(self) -> bool:
        """Whether an average has a half-life, so that `tokens_per_step` has to be set or counted in every step."""
        if self._needs_tokens is None:
            self._needs_tokens = any(
                group[average.half_life] is not None and self._is_used(group, average)
                for group in self.param_groups
                for average in self.averages
            )
        return self._needs_tokens

    def _is_used(self, group: dict[str, Any], average: Average) -> bool:
        """Whether updates of a group's parameters read a moving average."""
        return True

    def _require_tokens(self) -> None:
        if self._tokens_per_step is None and self.needs_tokens:
            raise RuntimeError(_TOKENS_NOT_SET)

    def count_tokens(
        self, model: nn.Module, count: Callable[..., int] | None = None, *, process_group: Any = None
    ) -> TokenCount:
        """Set `tokens_per_step` from the model's inputs in each forward pass of training, until `step()`.

        Tokens are counted by `attention_mask` or `input_ids`; where there are none, examples. Several passes before a step add
        up, as in accumulation. Passes in eval mode or without gradients do not count. Counting a mask on a GPU waits for it.

        Args:
            model: the model whose forward the loop calls: the compiled or wrapped one, if there is one.
            count: counts instead; called with the arguments of forward.
            process_group: processes whose counts are summed, because their examples differ; all, if None.

        Returns:
            A handle; `handle.remove()`, or leaving it as a context manager, ends the counting.

        Raises:
            RuntimeError: if this model's tokens are counted already.
        """
        if any(earlier.model is model for earlier in self._counts):
            raise RuntimeError("this model's tokens are counted already: call remove() on the earlier handle first")
        handle = TokenCount(self, model, count, process_group, handles=self._counts)
        self._counts.append(handle)
        return handle

    @property
    def counts_tokens(self) -> bool:
        """Whether `count_tokens` sets the tokens of a step."""
        return bool(self._counts)

    # Progress

    @property
    def steps(self) -> int:
        """Finished steps; skipped ones are not counted."""
        return self.clock.steps

    @property
    def tokens_seen(self) -> int:
        """Tokens of all finished steps."""
        return self.clock.tokens_seen

    @property
    def skipped_steps(self) -> int:
        """Steps closed by `skip_step()`."""
        return self.clock.skipped_steps

    # Numbers of a step

    def numbers_of_step(self) -> list[list[float]]:
        """For each group its learning rate and the weights of its averages in the coming step."""
        return [
            [float(group["lr"]), *(self._average_weight(group, average) for average in self.averages)]
            for group in self.param_groups
        ]

    @contextmanager
    def reading_numbers_from(self, numbers: DeviceNumbers) -> Iterator[None]:
        """Within this context updates read learning rates, weights of averages and noise keys from device memory.

        From then on, numbers that an update carries to the next step stay at one address, because a CUDA graph may hold it.
        """
        self._numbers, self._captured = numbers, True
        try:
            yield
        finally:
            self._numbers = None

    def varies_by_step(self, group: dict[str, Any]) -> bool:
        """Whether updates of a group depend on a number of the step that `DeviceNumbers` does not hold."""
        return False

    def _average_weight(self, group: dict[str, Any], average: Average) -> float:
        """Weight of this step's value in a moving average: one minus its decay factor."""
        half_life = group[average.half_life]
        if half_life is None:
            return 1.0 - float(group[average.beta])
        assert self._tokens_per_step is not None
        return debias(half_life, self._tokens_per_step)

    def _is_kept(self, group: dict[str, Any], average: Average) -> bool:
        """Whether a moving average has a state: with a decay factor of zero per step it is the last value."""
        return group[average.half_life] is not None or float(group[average.beta]) > 0

    def _weight(self, group: dict[str, Any], average: Average) -> float | Tensor:
        """`_average_weight`, for an update; while updates are captured, float64 of shape () on the device."""
        if self._numbers is None:
            return self._average_weight(group, average)
        return self._numbers.weights[self._position(group)][self.averages.index(average)]

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        """A group's learning rate; while updates are captured, float64 of shape () on the device."""
        return float(group["lr"]) if self._numbers is None else self._numbers.rates[self._position(group)]

    def _noise_key(self, parameter: int) -> Key:
        """Noise key of the parameter in this position; while updates are captured, int32 of shape () on the device."""
        if self._numbers is None:
            return noise_key(self.seed, self.clock.steps, parameter)
        return self._numbers.key(parameter)

    def _position(self, group: dict[str, Any]) -> int:
        return next(i for i, candidate in enumerate(self.param_groups) if candidate is group)

    def _start_transient(self) -> None:
        super()._start_transient()
        self._counts = []
        self._needs_tokens = None
        self._numbers = None
        self._captured = False


_TOKENS_NOT_SET = (
    "tokens_per_step is not set: averages are measured in tokens, so say how many the coming step holds before backward, "
    "for example `optimizer.tokens_per_step = batch['input_ids'].numel()`, or once, before training, "
    "`optimizer.count_tokens(model)`, which counts as the model is called in training mode; in a transformers Trainer add the "
    "callback sbft.TokenCountCallback(). Averages with a decay factor per step, such as beta2=0.95, need no count"
)
