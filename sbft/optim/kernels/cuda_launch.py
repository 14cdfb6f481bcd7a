"""Launches of Triton programs that repeat from step to step.

`program[grid](...)` looks at every argument anew to find out which compiled form it asks for: 30 to 60 microseconds of Python a
launch, where at batch 1 every weight of a model has four of them in every step. A `Launch` asks once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles one form for tensors that begin at a multiple of them, and one for others


class Launch:
    """A program with its grid and its compile-time arguments, for one device. The first call compiles.

    Every call has tensors of the same dtypes, and the same numbers wherever the program is specialized for them.

    Args:
        program: a function under `triton.jit`, whose tensors come first in its signature and whose compile-time arguments last.
        grid: how many instances, in three dimensions.
        constants: the compile-time arguments by name.
        options: for Triton, such as `num_warps`.
    """

    def __init__(
        self, program: Any, grid: tuple[int, int, int], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._program, self._grid, self._constants, self._options = program, grid, constants, options
        self._run: Any = None
        self._values: tuple[Any, ...] = ()  # of the constants
        self._aligned: tuple[int, ...] = ()  # tensors for whose alignment the program is specialized

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float | Tensor]) -> None:
        """Launch on the current device's current stream. Numbers are Python's own, or tensors where the program takes their
        addresses, of any alignment."""
        if self._run is not None:
            pointers = [tensor.data_ptr() for tensor in tensors]
            if not any([pointers[i] % _ALIGNMENT for i in self._aligned]):
                self._run(*pointers, *numbers, *self._values)
                return
        compiled = self._program[self._grid](*tensors, *numbers, **self._constants, **self._options)
        if self._run is not None or compiled is None:  # the interpreter compiles nothing
            return
        parameters = self._program.params
        aligned = tuple(i for i in range(len(tensors)) if not parameters[i].do_not_specialize)
        if not any([tensors[i].data_ptr() % _ALIGNMENT for i in aligned]):
            names = [parameter.name for parameter in parameters[len(tensors) + len(numbers) :]]
            self._values = tuple(self._constants[name] for name in names)
            self._aligned = aligned
            self._run = compiled[self._grid]  # last: another thread may launch by it at once
