"""What all optimizers here share: averages measured in tokens, one update per parameter, and a state that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sbft.optim.counting import TokenCount
from sbft.optim.release import GradientRelease
from sbft.optim.sharding import Shard, in_order_of, local, shard_of
from sbft.optim.state import CLOCK, SavedState, TokenClock
from sbft.rounding import noise_key
from sbft.tokens import FINE_TUNING_HALF_LIFE, debias

if TYPE_CHECKING:
    from sbft.optim.capture import DeviceNumbers

_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


class Average(NamedTuple):
    """Names of the two settings of one moving average, and the decay factor where neither is given.

    `default_beta=None` stands for the fine-tuning half-life.
    """

    half_life: str
    beta: str
    default_beta: float | None = None


class TokenOptimizer(SavedState):
    """A `torch.optim.Optimizer` whose moving averages decay per token seen, not per step.

    Set `tokens_per_step` to the number of tokens of the coming step (all ranks together) before backward runs, or let
    `count_tokens(model)` set it; `step()` consumes it. Every average takes a half-life in tokens or a fixed decay factor per
    step, never both; where none has a half-life (`needs_tokens` is false), no count is needed.

    A subclass names its `averages` and implements `_init_state` and `_update`; all else is here, the release
    of gradients included.

    Args:
        params: parameters or parameter groups; float32 or bfloat16.
        defaults: settings of a group.
        seed: key of the rounding noise, with the step and the parameter's position.
    """

    averages: ClassVar[tuple[Average, ...]] = ()

    _updated: set[Tensor]  # in the open step
    _square_sums: list[float | Tensor]  # of the open step's gradients
    _grad_norm: Tensor | None
    _nonfinite: int | Tensor
    _release: GradientRelease | None
    _counts: list[TokenCount]
    _needs_tokens: bool | None  # in the open step; None until asked for
    _numbers: DeviceNumbers | None  # what updates read in the place of the host's numbers while they are captured
    _captured: bool  # whether a CUDA graph may hold updates, and so addresses of what is carried from step to step

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int) -> None:
        self.seed = int(seed)
        self.clock = TokenClock()
        self._start_transient()
        for average in self.averages:
            if defaults[average.half_life] is None and defaults[average.beta] is None:
                name, value = (average.beta, average.default_beta)
                if value is None:
                    name, value = average.half_life, FINE_TUNING_HALF_LIFE
                defaults[name] = value
        super().__init__(params, defaults)

    # Settings

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; while gradients are released its parameters are released too.

        Raises:
            ValueError: if a setting is out of its domain, or an average has both a half-life and a decay factor.
            TypeError: if a parameter is neither float32 nor bfloat16.
        """
        for average in self.averages:  # a group that sets one of the pair replaces the default of the other
            given = [name for name in (average.half_life, average.beta) if param_group.get(name) is not None]
            if len(given) == 1:
                other = average.beta if given[0] == average.half_life else average.half_life
                param_group.setdefault(other, None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            for average in self.averages:
                _check_average(group, average)
            self._validate(group)
            for param in group["params"]:
                _check_dtype(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._changes += 1
        self._needs_tokens = None
        group[CLOCK] = self._noted_clock()
        count = len(self._positions)
        for i, param in enumerate(group["params"]):
            self._positions[param] = (len(self.param_groups) - 1, count + i)
        if self._release is not None:
            self._release.attach(group["params"])

    def _validate(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a setting that only this optimizer has is out of its domain."""

    # The token clock

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
        """Have `tokens_per_step` set by what the model is given in each forward pass of training, until `step()`.

        Tokens are counted by `attention_mask` or `input_ids`; where there are none, examples. Several passes before a step add
        up, as in accumulation; those in eval mode or without gradients are left out. A mask on a GPU is waited for.

        Args:
            model: whose forward is called in the loop; the compiled or wrapped one, if it is.
            count: counts in place of that; gets forward's arguments.
            process_group: processes whose counts are summed, those with different examples; all, if None.

        Returns:
            A handle; `handle.remove()`, or leaving it as a context manager, ends the counting.

        Raises:
            RuntimeError: if this model is counted already.
        """
        if any(one.model is model for one in self._counts):
            raise RuntimeError("this model's tokens are counted already: call remove() on the earlier handle first")
        self._counts.append(TokenCount(self, model, count, process_group))
        return self._counts[-1]

    @property
    def counts_tokens(self) -> bool:
        """Whether `count_tokens` sets the tokens of a step."""
        return bool(self._counts)

    @property
    def steps(self) -> int:
        """Finished steps, skipped ones not counted."""
        return self.clock.steps

    @property
    def tokens_seen(self) -> int:
        """Tokens of all finished steps."""
        return self.clock.tokens_seen

    @property
    def skipped_steps(self) -> int:
        """Steps closed by `skip_step()`."""
        return self.clock.skipped_steps

    @property
    def grad_norm(self) -> Tensor | None:
        """Euclidean norm of the last step's whole gradient, float32 of shape (); None before the first step."""
        return self._grad_norm

    @property
    def nonfinite_gradients(self) -> int:
        """How many updates of single parameters were left out because their gradient held NaN or infinity."""
        return int(self._nonfinite)

    def _average_weight(self, group: dict[str, Any], average: Average) -> float:
        """Weight of this step's value in a moving average: one minus its decay factor."""
        half_life = group[average.half_life]
        if half_life is None:
            return 1.0 - float(group[average.beta])
        assert self._tokens_per_step is not None
        return debias(half_life, self._tokens_per_step)

    def _is_kept(self, group: dict[str, Any], average: Average) -> bool:
        """Whether a moving average is one: not so with a decay factor of zero per step."""
        return group[average.half_life] is not None or float(group[average.beta]) > 0

    def _weight(self, group: dict[str, Any], average: Average) -> float | Tensor:
        """`_average_weight`, for an update; while updates are captured, float64 of shape () on the device."""
        if self._numbers is None:
            return self._average_weight(group, average)
        return self._numbers.weights[self._place(group)][self.averages.index(average)]

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        """A group's learning rate; while updates are captured, float64 of shape () on the device."""
        return float(group["lr"]) if self._numbers is None else self._numbers.rates[self._place(group)]

    def _place(self, group: dict[str, Any]) -> int:
        return next(i for i, one in enumerate(self.param_groups) if one is group)

    def _follows_steps(self, group: dict[str, Any]) -> bool:
        """Whether other numbers than the learning rate, the averages' weights and the noise change from step to step."""
        return False

    # Updates

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, param: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient and close the step; or update `param` alone and leave the step open.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.
            param: a single parameter to update now. Gradient release uses this from within backward.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: if an average has a half-life and `tokens_per_step` was not set, or a parameter would be updated
                twice in one step.
        """
        if hasattr(self, "grad_scale"):  # set by GradScaler.step on optimizers that claim to support it
            del self.grad_scale
            raise RuntimeError(
                "sbft optimizers train float32 or bfloat16 weights, which need no GradScaler: call backward() on the plain "
                "loss and step() on the optimizer."
            )
        if param is not None:
            self._update_one(param)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._asks_for_state_alone():
            self._make_state()
            return loss
        self._require_tokens()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_one(p)
        self._close_step()
        return loss

    def _asks_for_state_alone(self) -> bool:
        """Whether this is no step of a training: `torch.distributed.checkpoint` has an optimizer make its state by a step with
        a rate of zero and gradients of zero."""
        if self.state or self._tokens_per_step is not None or any(float(one["lr"]) for one in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(local(grad).any()) for grad in grads)

    def _make_state(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._init_state(param, group, self.state[param])

    _step_supports_amp_scaling = True  # makes GradScaler hand itself over, so that step() can refuse it in words

    def skip_step(self) -> None:
        """Close the coming step without an update: averages, tokens and noise stay, only `skipped_steps` advances."""
        self.clock.skipped_steps += 1
        self._note_clock()
        self._begin_step()

    def discard_step(self) -> None:
        """Forget a step that an error left half done, so that the next may begin; released weights keep their update."""
        self._begin_step()

    def release_gradients(self, held: Iterable[Tensor] = ()) -> GradientRelease:
        """Update each parameter within backward as soon as its gradient is complete, and free that gradient.

        Args:
            held: parameters that are updated in `step()` nevertheless: those whose hooks run before all of the gradient is
                there, as FSDP2 runs them for an embedding that is also the output head.

        Returns:
            A handle; `handle.remove()`, or leaving it as a context manager, restores the plain behaviour.

        Raises:
            RuntimeError: if gradients are released already, or several processes hold replicas of plain parameters.
        """
        if self._release is not None:
            raise RuntimeError("this optimizer releases gradients already: call remove() on the earlier handle first")
        self._release = GradientRelease(self, held)
        return self._release

    @property
    def releases_gradients(self) -> bool:
        """Whether a `GradientRelease` is attached."""
        return self._release is not None

    def _update_one(self, param: Tensor) -> None:
        self._require_tokens()
        if param in self._updated:
            raise RuntimeError(
                "a second backward ran before step(): with released gradients every backward is an update. Call step() after "
                "each backward (discard_step() after one that failed); to accumulate gradients, train without "
                "release_gradients()."
            )
        grad = param.grad
        if grad is None or param.numel() == 0:
            return
        if grad.is_sparse:
            raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
        shard = shard_of(param)
        grad = grad if shard is None else local(in_order_of(grad, param))
        if grad.ndim > 3 and not grad.is_contiguous():
            grad = grad.contiguous()  # channels-last kernels of convolutions: no stack of matrices can be seen in them
        group_index, index = self._positions[param]
        group = self.param_groups[group_index]
        key: Any = None
        if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
            numbers = self._numbers
            key = noise_key(self.seed, self.clock.steps, index) if numbers is None else numbers.key(index)
        self._updated.add(param)
        state = self.state[param]
        self._init_state(param, group, state)
        if shard is not None:
            param, state = local(param), {name: local(value) for name, value in state.items()}
        self._square_sums.append(self._update(param, grad, group, state, key, shard))

    def initialize_state(self, param: Tensor) -> None:
        """Make now what a parameter's first update would make of its state; `tokens_per_step` has to be set.

        Raises:
            RuntimeError: if the tokens of the coming step were not set.
        """
        self._require_tokens()
        self._init_state(param, self.param_groups[self._positions[param][0]], self.state[param])

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Put into `state` what an update needs and does not find there: before the first, everything."""
        raise NotImplementedError  # abstract

    def _update(
        self,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        state: dict[str, Tensor],
        key: tuple[int, int] | None,
        shard: Shard | None,
    ) -> float | Tensor:
        """Update one parameter in place; returns the sum of its squared gradient (no update if that is not finite).

        Of a parameter that is spread over several processes, the tensors are the parts that lie here.
        """
        raise NotImplementedError  # abstract

    def _close_step(self) -> None:
        self._grad_norm, nonfinite = _norm(self._square_sums)
        self._nonfinite = self._nonfinite + nonfinite
        self.clock.steps += 1
        self.clock.tokens_seen += self._tokens_per_step or 0
        self._note_clock()
        self._begin_step()

    def _begin_step(self) -> None:
        self._tokens_per_step = self._needs_tokens = None
        self._updated.clear()
        self._square_sums.clear()

    def _start_transient(self) -> None:
        """Everything that is neither saved nor pickled."""
        self._tokens_per_step = None
        self._positions = {}
        self._updated = set()
        self._square_sums = []
        self._grad_norm = None
        self._nonfinite = 0
        self._release = None
        self._counts = []
        self._needs_tokens = None
        self._numbers = None
        self._captured = False
        self._changes = 0


_TOKENS_NOT_SET = (
    "tokens_per_step is not set: averages are measured in tokens, so say how many the coming step holds before backward, "
    "for example `optimizer.tokens_per_step = batch['input_ids'].numel()`, or once, before training, "
    "`optimizer.count_tokens(model)`, which counts as the model is called in training mode; in a transformers Trainer add the "
    "callback sbft.TokenCountCallback(). Averages with a decay factor per step, such as beta2=0.95, need no count"
)


def _check_average(group: dict[str, Any], average: Average) -> None:
    half_life, beta = group[average.half_life], group[average.beta]
    if half_life is not None and beta is not None:
        raise ValueError(
            f"{average.half_life}={half_life!r} (tokens) and {average.beta}={beta!r} (per step) both set the same average: "
            "give one of them"
        )
    if half_life is not None and not (half_life > 0 and math.isfinite(half_life)):
        raise ValueError(f"{average.half_life} must be a positive number of tokens, got {half_life!r}")
    if beta is not None and not 0 <= beta < 1:
        raise ValueError(f"{average.beta} must be at least 0 and less than 1, got {beta!r}")


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        value = float(group[name])
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]!r}")


def _check_dtype(param: Tensor) -> None:
    if param.dtype == torch.float16:
        raise TypeError(
            "float16 weights cannot be trained without a loss scaler, and their small exponent makes small updates vanish: "
            "convert the model with model.to(torch.bfloat16)"
        )
    if param.dtype not in _SUPPORTED_DTYPES:
        raise TypeError(f"weights must be float32 or bfloat16, got {param.dtype}")


def _norm(square_sums: list[float | Tensor]) -> tuple[Tensor, int | Tensor]:
    """Global norm (float32, shape ()) and count of non-finite entries, independent of the order of the entries on a CPU."""
    on_device = [s for s in square_sums if isinstance(s, Tensor) and s.device.type != "cpu"]
    numbers = [float(s) for s in square_sums if not isinstance(s, Tensor) or s.device.type == "cpu"]
    finite = [s for s in numbers if math.isfinite(s)]
    total = math.fsum(finite) if len(finite) == len(numbers) else math.inf
    if not on_device:
        return torch.tensor(math.sqrt(total), dtype=torch.float32), len(numbers) - len(finite)
    stacked = torch.stack([s.to(on_device[0].device) for s in on_device])
    nonfinite = (~torch.isfinite(stacked)).sum() + (len(numbers) - len(finite))
    return (stacked.sum() + total).sqrt().float(), nonfinite
