"""The base class of the optimizers: updates of single parameters, in `step()` or in backward, which make up a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sbft.optim.clocked_optimizer import ClockedOptimizer
from sbft.optim.group_settings import check_dtype, check_group
from sbft.optim.kernels import backend_for
from sbft.optim.release import GradientRelease
from sbft.optim.sharding import in_order_of, local, shard_of
from sbft.optim.state import CLOCK, TokenClock
from sbft.optim.update import OpenStep, Update
from sbft.optim.vocabulary import SlicedGradient
from sbft.optim.waiting import WaitingReleases


class TokenOptimizer(ClockedOptimizer):
    """A `torch.optim.Optimizer` whose moving averages decay per token seen, not per step.

    Set `tokens_per_step` to the number of tokens of the coming step (all ranks together) before backward runs, or let
    `count_tokens(model)` set it; `step()` consumes it. Every average takes a half-life in tokens or a fixed decay factor per
    step, never both; where none has a half-life (`needs_tokens` is false), no count is needed.

    A subclass names its `averages` and implements `_init_state` and `_update`. All else is here, including gradient release.

    Args:
        params: parameters or parameter groups; float32 or bfloat16.
        defaults: settings of a group.
        seed: key of the rounding noise, with the step and the parameter's position.
    """

    _open_step: OpenStep
    _kernels: dict[
        torch.device, ModuleType
    ]  # of the open step; looking up SBFT_KERNELS in every update would take a tenth of the update
    _grad_norm: Tensor | None
    _nonfinite: int | Tensor
    _release: GradientRelease | None
    _handed: dict[Tensor, SlicedGradient]  # gradients in slices that wait for their update
    _waiting: WaitingReleases

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int) -> None:
        self.seed = int(seed)
        self.clock = TokenClock()
        self._start_transient()
        for average in self.averages:
            average.set_default(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; while gradients are released its parameters are released too.

        Raises:
            ValueError: if a setting is out of its domain, or an average has both a half-life and a decay factor.
            TypeError: if a parameter is neither float32 nor bfloat16.
        """
        for average in self.averages:
            average.replace_default(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.averages)
            self._validate(group)
            for param in group["params"]:
                check_dtype(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.replacements += 1
        self._needs_tokens = None
        self._waiting.forget()
        group[CLOCK] = self._noted_clock()
        count = len(self._positions)
        for i, param in enumerate(group["params"]):
            self._positions[param] = (len(self.param_groups) - 1, count + i)
        if self._release is not None and self._release.is_attached:
            self._release.attach(group["params"])

    def _validate(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a setting that only this optimizer has is out of its domain."""

    # Measurements of a step

    @property
    def grad_norm(self) -> Tensor | None:
        """Euclidean norm of the last step's whole gradient, float32 of shape (); None before the first step."""
        return self._grad_norm

    @property
    def nonfinite_gradients(self) -> int:
        """Number of updates of single parameters that were left out because their gradient held NaN or infinity."""
        return int(self._nonfinite)

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, param: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient and close the step; or update `param` alone and leave the step open.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.
            param: a single parameter to update now, as gradient release does within backward.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: if an average has a half-life and `tokens_per_step` was not set, or a parameter would be updated
                twice in one step.
        """
        if hasattr(self, "grad_scale"):  # set by GradScaler.step on optimizers that claim to support it
            del self.grad_scale
            raise RuntimeError(
                "sbft optimizers train float32 or bfloat16 weights, which require no GradScaler: call backward() on the plain "
                "loss and step() on the optimizer."
            )
        if param is not None:
            self._update_parameter(param)
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
                if p.grad is not None or p in self._handed:
                    self._update_parameter(p, may_wait=True)
        self.launch_waiting()
        self._close_step()
        return loss

    _step_supports_amp_scaling = True  # makes GradScaler pass itself, so that step() can refuse it with a message

    def _asks_for_state_alone(self) -> bool:
        """Whether this is no training step: `torch.distributed.checkpoint` has an optimizer make its state by a step with a
        rate of zero and gradients of zero."""
        if self.state or self._tokens_per_step is not None or any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(local(grad).any()) for grad in grads)

    def _make_state(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._init_state(param, group, self.state[param])

    def skip_step(self) -> None:
        """Close the coming step without an update: averages, tokens and noise stay, only `skipped_steps` advances."""
        self.launch_waiting()
        self.clock.skipped_steps += 1
        self._note_clock()
        self._begin_step()

    def discard_step(self) -> None:
        """Forget a step that an error left half done, so that the next may begin; released weights keep their update."""
        self.launch_waiting()
        self._begin_step()

    def _close_step(self) -> None:
        self._grad_norm, nonfinite = _norm(self._open_step.square_sums)
        self._nonfinite = self._nonfinite + nonfinite
        self.clock.steps += 1
        self.clock.tokens_seen += self._tokens_per_step or 0
        self._note_clock()
        self._begin_step()

    def _begin_step(self) -> None:
        self._tokens_per_step = self._needs_tokens = None
        self._open_step.updated.clear()
        self._open_step.square_sums.clear()
        self._handed.clear()
        self._kernels.clear()

    def take_open_step(self) -> OpenStep:
        """Remove the updates from the open step, as if none had run, and return them; the tokens of the step stay."""
        taken, self._open_step = self._open_step, OpenStep(set(), [])
        return taken

    def add_to_open_step(self, earlier: OpenStep) -> None:
        """Count updates that `take_open_step` returned as made in the open step."""
        self._open_step.updated.update(earlier.updated)
        self._open_step.square_sums.extend(earlier.square_sums)

    # Gradient release

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
        if self.releases_gradients:
            raise RuntimeError("this optimizer releases gradients already: call remove() on the earlier handle first")
        self._release = GradientRelease(self, held)
        return self._release

    @property
    def releases_gradients(self) -> bool:
        """Whether a `GradientRelease` is attached."""
        return self._release is not None and self._release.is_attached

    def release_parameter(self, param: Tensor) -> None:
        """As `update_parameter`; but on a GPU, a small update may wait for others, until `launch_waiting()`.

        Gradient release calls this within backward, and `launch_waiting()` at its end.
        """
        with torch.no_grad():
            self._update_parameter(param, may_wait=True)

    @property
    def has_waiting(self) -> bool:
        """Whether updates of released gradients wait for their launch."""
        return bool(self._waiting)

    @torch.no_grad()
    def launch_waiting(self) -> None:
        """Launch the updates that wait. Whatever reads the state or ends the step calls this."""
        self._waiting.launch()

    @property
    def most_waiting_bytes(self) -> int | None:
        """Limit of the gradients that wait for a common launch on a GPU, with the scratch memory of that launch.

        0 launches every update at once. None, the default, is 1% of the weights' bytes, at least 4 MiB. It changes no bit of
        the results.
        """
        return self._waiting.most_bytes

    @most_waiting_bytes.setter
    def most_waiting_bytes(self, limit: int | None) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"most_waiting_bytes must be a number of bytes of at least 0, or None, got {limit!r}")
        self._waiting.forget()
        self._waiting.most_bytes = limit

    def state_dict(self) -> dict[str, Any]:
        self.launch_waiting()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.launch_waiting()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.launch_waiting()
        return super().__getstate__()

    # Gradients in slices

    def takes_slices(self, param: Tensor) -> bool:
        """Whether `hand_over` may give a parameter's gradient in slices."""
        return False

    def hand_over(self, param: Tensor, gradient: SlicedGradient) -> None:
        """Give a parameter's whole gradient in slices, in place of `param.grad`; its next update uses and drops it.

        Raises:
            ValueError: if the optimizer takes no slices for it.
        """
        if not self.takes_slices(param):
            raise ValueError(
                f"{type(self).__name__} takes no gradient in slices for this parameter: see takes_slices()"
            )
        self._handed[param] = gradient

    def handed_over(self, param: Tensor) -> SlicedGradient | None:
        """What `hand_over` gave for a parameter that was not updated since."""
        return self._handed.get(param)

    # Updates

    def update_parameter(self, param: Tensor) -> None:
        """Update one parameter from its gradient and leave the step open; gradient release calls this within backward.

        Raises:
            RuntimeError: if an average has a half-life and `tokens_per_step` was not set, or the parameter was updated in this
                step already.
        """
        with torch.no_grad():
            self._update_parameter(param)

    def _update_parameter(self, param: Tensor, may_wait: bool = False) -> None:
        self._require_tokens()
        updated, square_sums = self._open_step
        handed = self._handed.pop(param, None) if self._handed else None
        if param in updated and not (handed is None and param.grad is None):
            raise RuntimeError(
                "a second backward ran before step(): with released gradients every backward is an update. Call step() after "
                "each backward (discard_step() after one that failed); to accumulate gradients, train without "
                "release_gradients()."
            )
        grad: Tensor | SlicedGradient | None = handed
        shard = None
        if grad is None:
            grad = param.grad
            if grad is None or param.numel() == 0:
                return
            if grad.is_sparse:
                raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
            shard = shard_of(param)
            grad = grad if shard is None else local(in_order_of(grad, param))
            if grad.ndim > 3 and not grad.is_contiguous():
                # Channels-last kernels of convolutions cannot be viewed as a stack of matrices.
                grad = grad.contiguous()
        group_index, index = self._positions[param]
        group = self.param_groups[group_index]
        key = self._noise_key(index) if group["stochastic_rounding"] and param.dtype == torch.bfloat16 else None
        updated.add(param)
        state = self.state[param]
        self._init_state(param, group, state)
        if shard is not None:
            param, state = local(param), {name: local(value) for name, value in state.items()}
        device = param.device
        kernels: Any = self._kernels.get(device)
        if kernels is None:
            kernels = self._kernels[device] = backend_for(device)
        if may_wait and handed is None and shard is None and not self._captured:
            kernels = self._waiting.instead_of(kernels, device, self._positions)
        square_sums.append(self._update(Update(param, grad, group, state, key, shard, kernels)))

    def initialize_state(self, param: Tensor) -> None:
        """Make a parameter's state now, as its first update would; `tokens_per_step` has to be set.

        Raises:
            RuntimeError: if the tokens of the coming step were not set.
        """
        self._require_tokens()
        self._init_state(param, self.param_groups[self._positions[param][0]], self.state[param])

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Add to `state` what an update needs and is missing: before the first update, everything."""
        raise NotImplementedError  # abstract

    def _update(self, update: Update) -> float | Tensor:
        """Update one parameter in place; returns the sum of its squared gradient (no update if that is not finite)."""
        raise NotImplementedError  # abstract

    def _start_transient(self) -> None:
        super()._start_transient()
        self._open_step = OpenStep(set(), [])
        self._kernels = {}
        self._grad_norm = None
        self._nonfinite = 0
        self._release = None
        self._handed = {}
        self._waiting = WaitingReleases()


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
