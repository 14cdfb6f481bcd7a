"""Steps as CUDA graphs: forward, and backward with its updates, launched at once for all batches of one shape.

A small model at batch size 1 keeps a GPU busy for a tenth of the time that the host needs to launch its thousand kernels one by
one. Forward and backward are two graphs, so that a loss that is not finite reaches no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sbft.errors import TrainingError
from sbft.optim.base import TokenOptimizer
from sbft.optim.capture import CapturedUpdates

Batch = dict[str, Any]
WARM_UP = 3
"""Steps of one shape before it is captured: libraries choose and load their kernels in the first."""


class GraphedSteps:
    """Runs steps, captures one once some of its shape have passed, and replays it for others of that shape.

    One shape is held at a time; a step of another one is left to the caller, until enough of those come in a row. Call
    `forward`, look at the loss, then call `backward`, which also updates the weights, or `leave_out`.

    Args:
        optimizer: it releases its gradients, on one CUDA device.
        loss_of: the loss of a batch, float32 of shape (), made without waiting for the device.

    Raises:
        ValueError: if the optimizer's updates cannot be captured.
        TrainingError: from `forward`, if the model's step cannot be.
    """

    def __init__(self, optimizer: TokenOptimizer, loss_of: Callable[[Batch], Tensor]) -> None:
        self._updates = CapturedUpdates(optimizer)
        self._loss_of = loss_of
        self._stream = torch.cuda.Stream()
        self._shape: object = None
        self._seen = 0  # in a row
        self._graph: _Graph | None = None
        self._loss: Tensor | None = None  # of the step that waits for its backward

    def forward(self, batch: Batch) -> Tensor | None:
        """The loss, float32 of shape (); None for a batch that the caller has to see to, backward and all.

        Args:
            batch: of equal shapes where the steps are to be graphed; what is no tensor is part of the shape.
        """
        shape = _shape_of(batch)
        if self._graph is not None and self._graph.shape == shape and self._updates.hold:
            self._seen = 0
            return self._graph.forward(batch)
        self._seen = self._seen + 1 if shape == self._shape else 1
        self._shape = shape
        if self._graph is not None and self._seen <= WARM_UP and self._graph.shape != shape:
            return None  # an odd one, such as the last of an epoch
        self._graph = None
        if self._seen > WARM_UP:
            self._graph = self._captured(batch)
            self._seen = 0
            return self._graph.forward(batch)
        with self._beside():
            self._loss = self._loss_of(batch)
        return self._loss.detach()

    def backward(self) -> None:
        """Backward and updates of the step whose loss `forward` has returned last."""
        if self._loss is None:
            assert self._graph is not None
            self._graph.backward()
            return
        with self._beside(), self._updates.within():
            loss, self._loss = self._loss, None
            loss.backward()

    def leave_out(self) -> None:
        """Forget the step whose loss `forward` has returned last; without its backward it has warmed nothing up."""
        if self._loss is not None:
            self._loss = None
            self._seen -= 1

    def _captured(self, batch: Batch) -> _Graph:
        try:
            with self._updates.within():
                return _Graph(batch, self._loss_of, self._updates, self._stream)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise TrainingError(
                "cuda_graphs=True: this model's step cannot be captured, as none can that waits for the device, like that of "
                f"experts which count their tokens. Set cuda_graphs=False. What torch says: {said}"
            ) from error

    def _beside(self) -> AbstractContextManager[None]:
        return _Beside(self._stream)


class _Graph:
    """A captured step."""

    def __init__(
        self, batch: Batch, loss_of: Callable[[Batch], Tensor], updates: CapturedUpdates, stream: torch.cuda.Stream
    ) -> None:
        self.shape = _shape_of(batch)
        self._updates = updates
        self._batch = {name: one.clone() if isinstance(one, Tensor) else one for name, one in batch.items()}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as those of a data loader, may go on.
        how: dict[str, Any] = {
            "stream": stream,
            "capture_error_mode": "thread_local",
            "pool": torch.cuda.graph_pool_handle(),
        }
        with torch.cuda.graph(self._forward, **how):
            loss = loss_of(self._batch)
        with torch.cuda.graph(self._backward, **how):
            loss.backward()
        updates.after_capture()
        self._loss = loss.detach()

    def forward(self, batch: Batch) -> Tensor:
        for name, one in batch.items():
            if isinstance(one, Tensor):
                self._batch[name].copy_(one, non_blocking=True)
        self._forward.replay()
        self._updates.before_replay()  # now, since the host will wait for the loss, and the device then for backward
        return self._loss.clone()

    def backward(self) -> None:
        self._backward.replay()
        self._updates.after_replay()


class _Beside(AbstractContextManager[None]):
    """On another stream: behind what was launched before, and before what is launched after."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._within = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._within.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._within.__exit__(*exception)
        torch.cuda.current_stream().wait_stream(self._stream)


def _shape_of(batch: Batch) -> object:
    return {name: (one.shape, one.dtype) if isinstance(one, Tensor) else one for name, one in batch.items()}
