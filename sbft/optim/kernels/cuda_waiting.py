"""Updates that wait for each other, so that many small weights share their launches.

At batch size 1 the host needs longer to launch the updates of small weights one by one than the device needs to run them. An
update that waits keeps its gradient. It takes what a launch of its own would take, and gives the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from sbft.optim.kernels import cuda, cuda_plans
from sbft.optim.kernels.blocks import Key, Weight, matrices, opened, stored
from sbft.optim.kernels.cuda_members import Form, Member, launches_of
from sbft.optim.sharding import Shard

MOST_WEIGHTS = 1024  # in one launch
_ALIGNMENT = 16
_MOST_KNOWN = 1 << 16
_NUMBERS_OF_UPDATE = struct.Struct("<5q")


class WaitingUpdate(NamedTuple):
    """An update that was not launched yet; it keeps alive what the launch reads."""

    member: Member
    weight: Weight
    state: Sequence[Tensor | None]
    grad: Tensor
    known: Tensor | None  # the weight's sum of squares
    key: Key
    taken_bytes: int


class WaitingUpdates:
    """Stands in for the module `cuda`: its functions let small updates wait, and launch others at once.

    What a function returns of an update that waits is filled by `launch`.

    Args:
        device: of the weights.
        most_bytes: limit of the gradients that wait, with the scratch memory of their launches. An update that takes more than
            half of it does not wait.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.waiting_bytes = 0
        self._device = device
        self._members: dict[tuple[Any, ...], Member | None] = {}
        self._waiting: dict[tuple[Any, ...], list[WaitingUpdate]] = {}
        self._stream: int | None = None

    def __len__(self) -> int:
        """Number of updates that wait."""
        return sum(map(len, self._waiting.values()))

    # The functions of `cuda`

    def adafactor_factored(self, weight: Weight, grad: Tensor, *state: Tensor | None, **settings: Any) -> Any:
        """As `cuda.adafactor_factored`."""
        return self._adafactor("adafactor_factored", weight, grad, *state, **settings)

    def adafactor_full(self, weight: Weight, grad: Tensor, *state: Tensor | None, **settings: Any) -> Any:
        """As `cuda.adafactor_full`."""
        return self._adafactor("adafactor_full", weight, grad, *state, **settings)

    def _adafactor(self, name: str, weight: Weight, grad: Tensor, *state: Tensor | None, **settings: Any) -> Any:
        *averages, known = state
        relative = settings["relative_step"]
        member = self._member(name, weight, grad, averages, relative, settings)
        if member is None:
            return getattr(cuda, name)(weight, grad, *state, **settings)
        shrink = self._opened_shrink(weight, settings)
        numbers: tuple[float, ...] = settings["lr"], shrink, float(settings["clip_threshold"])
        if name == "adafactor_full":
            numbers = (float(settings["eps"]), *numbers)
        numbers = (float(settings["eps"]), settings["average_weight"], *numbers)
        self._wait(member, numbers, weight, averages, grad, known, settings["key"])
        total, new_square_sum = member.results
        return total, new_square_sum if relative else known

    def adamw(self, weight: Weight, grad: Tensor, *state: Tensor | None, **settings: Any) -> Any:
        """As `cuda.adamw`."""
        first, second, *masses = state
        moments = [second if first is None else first, second, *masses]
        member = self._member("adamw", weight, grad, moments, first is not None, settings)
        if member is None:
            return cuda.adamw(weight, grad, *state, **settings)  # type: ignore[arg-type]
        rates = settings["lr"], self._opened_shrink(weight, settings), float(settings["eps"])
        numbers = settings["first_weight"], settings["second_weight"], *rates
        self._wait(member, numbers, weight, state, grad, None, settings["key"])
        return member.results[0]

    def sgd(self, weight: Weight, grad: Tensor, *state: Tensor | None, **settings: Any) -> Any:
        """As `cuda.sgd`."""
        has_momentum = state[0] is not None
        member = self._member("sgd", weight, grad, state if has_momentum else (), has_momentum, settings)
        if member is None:
            return cuda.sgd(weight, grad, *state, **settings)
        weight_of_gradient = settings["momentum_weight"] if has_momentum else 1.0
        numbers = weight_of_gradient, settings["lr"], self._opened_shrink(weight, settings)
        self._wait(member, numbers, weight, state, grad, None, settings["key"])
        return member.results[0]

    @staticmethod
    def _opened_shrink(weight: Weight, settings: dict[str, Any]) -> Any:
        return cuda.shrink_of(opened(weight), settings["lr"] * settings["weight_decay"])

    # Waiting

    def _member(
        self,
        name: str,
        weight: Weight,
        grad: Tensor,
        state: Sequence[Tensor | None],
        kind: bool,
        settings: dict[str, Any],
    ) -> Member | None:
        """What is known of a weight, or None if its update does not wait."""
        shard: Shard | None = settings.get("shard")
        if shard is not None or not grad.is_contiguous() or not self._is_on_the_same_stream():
            return None
        memory, stochastic = stored(weight), settings["key"] is not None
        pointers = [tensor.data_ptr() for tensor in (*cuda.tensors_of(memory), *state) if tensor is not None]
        known_by = (name, weight.shape, grad.dtype, kind, stochastic, *pointers)
        if known_by not in self._members:
            if len(self._members) >= _MOST_KNOWN:  # weights that move from step to step
                self._members.clear()
            self._members[known_by] = self._new_member(name, memory, grad, state, kind, stochastic)
        member = self._members[known_by]
        if member is None or grad.data_ptr() % _ALIGNMENT or 2 * self._taken_bytes(member, grad) > self.most_bytes:
            return None
        return member

    def _new_member(
        self, name: str, memory: Weight, grad: Tensor, state: Sequence[Tensor | None], kind: bool, stochastic: bool
    ) -> Member | None:
        tensors = [tensor for tensor in state if tensor is not None]
        shape = matrices(grad).shape
        whole = [tensor for tensor in (*cuda.tensors_of(memory), *tensors) if tensor.ndim]
        if not cuda.covers(memory, grad, None) or any(tensor.data_ptr() % _ALIGNMENT for tensor in whole):
            return None
        if cuda_plans.index_type(shape, (shape[1] * shape[2], shape[2], 1), 0) != cuda_plans.index_type((1,), (1,), 0):
            return None  # far above any limit of what waits
        factored, grid = name == "adafactor_factored", cuda.grid_of(memory)
        alone = _has_one_tile(memory, shape) if factored else cuda_plans.line_plan(memory.numel(), whole=True).alone
        if factored and not alone and grid != cuda_plans.NO_GRID:
            return None  # the program would have too few registers
        sizes = shape[1:] if factored else (memory.numel(),)
        form = Form(
            name,
            cuda.dtype_of(memory),
            grad.dtype,
            grid,
            16 if all(size % 16 == 0 for size in sizes) else 1,
            not factored or shape[2] % 32 == 0,
            alone,
            stochastic,
            kind,
        )
        return Member(form, memory, tensors, shape)

    def _is_on_the_same_stream(self) -> bool:
        """Whether the current stream is that of the updates that wait: it orders a launch behind their gradients."""
        if self._device.type != "cuda":
            return True
        stream = driver.active.get_current_stream(self._device.index)
        if not self._waiting:
            self._stream = stream
        return bool(stream == self._stream)

    def _wait(
        self,
        member: Member,
        numbers: tuple[float, ...],
        weight: Weight,
        state: Sequence[Tensor | None],
        grad: Tensor,
        known: Tensor | None,
        key: Key,
    ) -> None:
        if member.waits:  # of an earlier gradient
            self.launch()
        taken = self._taken_bytes(member, grad)
        while self.waiting_bytes + taken > self.most_bytes:
            self._launch(max(self._waiting, key=self._bytes_of))
        together = (member.form, numbers)
        waiting = self._waiting.setdefault(together, [])
        waiting.append(WaitingUpdate(member, weight, state, grad, known, key, taken))
        member.waits = True
        self.waiting_bytes += taken
        if len(waiting) == MOST_WEIGHTS:
            self._launch(together)

    @staticmethod
    def _taken_bytes(member: Member, grad: Tensor) -> int:
        return grad.untyped_storage().nbytes() + 4 * member.scratch

    def _bytes_of(self, together: tuple[Any, ...]) -> int:
        return sum(update.taken_bytes for update in self._waiting[together])

    # Launching

    def launch(self) -> None:
        """Launch all updates that wait."""
        while self._waiting:
            self._launch(next(iter(self._waiting)))

    def _launch(self, together: tuple[Any, ...]) -> None:
        waiting = self._waiting.pop(together)
        self.waiting_bytes -= sum(update.taken_bytes for update in waiting)
        for update in waiting:
            update.member.waits = False
        form, numbers = together
        records, scratch_at = [], 0
        for member, _, _, grad, known, key, _ in waiting:
            known = member.results[1] if known is None else known
            of_update = grad.data_ptr(), known.data_ptr(), scratch_at // 16, *cuda.words_of(key)
            records += [_NUMBERS_OF_UPDATE.pack(*of_update), member.fixed]
            scratch_at += member.scratch
        programs = tuple(map(max, zip(*(update.member.programs for update in waiting), strict=True)))
        measure = (
            form.kind and form.function.startswith("adafactor") and any(update.known is None for update in waiting)
        )
        with cuda.current(self._device):
            table = _sent(b"".join(records), self._device)
            scratch = torch.empty(max(scratch_at, 16), dtype=torch.float32, device=self._device)
            launches_of(form, programs, len(waiting), self._device)((table, scratch), numbers, measure)


def _has_one_tile(memory: Weight, shape: torch.Size) -> bool:
    stack, rows, columns = shape
    plan = cuda_plans.factored_plan(stack, rows, columns, cuda.dtype_of(memory).itemsize)
    return plan.tiles == plan.apply_tiles == 1


def _sent(content: bytes, device: torch.device) -> Tensor:
    """A table in device memory, in stream order; the host does not wait."""
    table = torch.frombuffer(bytearray(content), dtype=torch.int64)
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until it was read
