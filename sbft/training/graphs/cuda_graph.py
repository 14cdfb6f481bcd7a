"""Captures training steps as CUDA graphs, one for each shape of batches, and replays them.

With a small model at batch size 1, a GPU is busy for a tenth of the time that the host needs to launch the thousand kernels
of a step one by one. Forward is one graph, and backward with the updates another, so that a loss that is not finite reaches
no weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sbft.errors import TrainingError
from sbft.optim.base import TokenOptimizer
from sbft.optim.capture import CapturedUpdates

Batch = dict[str, Any]
WARM_UP = 3
"""Steps before the first capture, in which libraries load their kernels and the optimizer makes its state."""
MOST_GRAPHS = 32
"""Limit on the number of graphs; each takes some MiB in the driver."""


class GraphedSteps:
    """Runs steps. After the first ones, it captures a step of a shape that ran before, and replays it from then on.

    Call `forward`, look at the loss, then call `backward`, which also updates the weights, or `leave_out`. The graphs share
    their memory. Since only one runs at a time, all together take little more than the largest. After `MOST_GRAPHS` graphs,
    steps of further shapes run kernel by kernel.

    Args:
        optimizer: releases its gradients, on one CUDA device.
        loss_of: computes the loss of a batch, float32 of shape (), without waiting for the device.

    Raises:
        ValueError: if the optimizer's updates cannot be captured.
        TrainingError: from `forward`, if the model's step cannot be captured.
    """

    def __init__(self, optimizer: TokenOptimizer, loss_of: Callable[[Batch], Tensor]) -> None:
        self._updates = CapturedUpdates(optimizer)
        self._loss_of = loss_of
        self._stream = torch.cuda.Stream()
        self._graphs: dict[Hashable, _Graph] = {}
        self._made_for: object = None
        self._ran: Counter[Hashable] = Counter()  # steps of each shape that ran kernel by kernel
        # What `forward` ran last: a graph; or kernel by kernel a step of this shape and loss. Its backward is next.
        self._replayed: _Graph | None = None
        self._waiting: tuple[Hashable, Tensor] | None = None

    def forward(self, batch: Batch) -> Tensor:
        """The loss, float32 of shape ().

        Args:
            batch: of one of few shapes. Values that are not tensors are part of the shape and have to be hashable.
        """
        shape, self._waiting = _shape_of(batch), None
        if self._graphs and self._made_for != self._updates.circumstances():
            self._forget()
        self._replayed = self._graphs.get(shape)
        if self._replayed is None and self._may_capture(shape):
            self._replayed = self._graphs[shape] = self._captured(batch)
            self._made_for = self._updates.circumstances()
        if self._replayed is not None:
            return self._replayed.forward(batch)
        with self._beside():
            loss = self._loss_of(batch)
        self._waiting = shape, loss
        return loss.detach()

    def backward(self) -> None:
        """Run backward and updates of the step whose loss `forward` has returned last."""
        if self._replayed is not None:
            self._replayed.backward()
            return
        assert self._waiting is not None
        with self._beside(), self._updates.within():
            (shape, loss), self._waiting = self._waiting, None
            loss.backward()
        self._ran[shape] += 1
        self._made_for = self._updates.circumstances()  # updates written in torch instead of Triton change it

    def leave_out(self) -> None:
        """Skip the step whose loss `forward` has returned last. Without a backward, it does not count as a first step."""
        self._waiting = None

    def _may_capture(self, shape: Hashable) -> bool:
        return self._ran.total() >= WARM_UP and self._ran[shape] > 0 and len(self._graphs) < MOST_GRAPHS

    def _forget(self) -> None:
        torch.cuda.synchronize()  # one may be running
        self._replayed = None
        self._graphs.clear()
        self._ran.clear()

    def _captured(self, batch: Batch) -> _Graph:
        pool = next(iter(self._graphs.values())).pool if self._graphs else torch.cuda.graph_pool_handle()
        try:
            with self._updates.within():
                return _Graph(batch, self._loss_of, self._updates, self._stream, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise TrainingError(
                "cuda_graphs=True: this model's step cannot be captured. A captured step must not wait for the device, as "
                f"models with experts do to count tokens. Set cuda_graphs=False. torch says: {first_line}"
            ) from error

    def _beside(self) -> AbstractContextManager[None]:
        return _Beside(self._stream)


class _Graph:
    """A captured step.

    Attributes:
        pool: of the memory that all graphs share.
    """

    def __init__(
        self,
        batch: Batch,
        loss_of: Callable[[Batch], Tensor],
        updates: CapturedUpdates,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.pool = pool
        self._updates = updates
        self._batch = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # With "thread_local", other threads, such as those of a data loader, can continue.
        settings: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local", "pool": pool}
        with torch.cuda.graph(self._forward, **settings):
            loss = loss_of(self._batch)
        with torch.cuda.graph(self._backward, **settings):
            loss.backward()
        self._captured = updates.after_capture()
        self._loss = loss.detach()

    def forward(self, batch: Batch) -> Tensor:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._batch[name].copy_(value, non_blocking=True)
        self._forward.replay()
        self._updates.before_replay()  # now, because later the host waits for the loss, and the device for backward
        return self._loss.clone()

    def backward(self) -> None:
        self._backward.replay()
        self._captured.after_replay()


class _Beside(AbstractContextManager[None]):
    """Runs the block on another stream, after everything launched before it and before everything launched after it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._within = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._within.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._within.__exit__(*exception)
        torch.cuda.current_stream().wait_stream(self._stream)


def _shape_of(batch: Batch) -> Hashable:
    return tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in batch.items()
    )
