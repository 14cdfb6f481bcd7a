"""Launches of Triton programs that repeat from step to step.

`program[grid](...)` inspects every argument to find the compiled form: 30 to 60 microseconds of Python per launch. At batch 1
every weight of a model has up to four launches in every step. A `Launch` looks once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles one form for tensors that begin at a multiple of this, and one for others


class Launch:
    """A program with its grid and its compile-time arguments, for one device. The first call compiles.

    All calls must have tensors of the same dtypes, and the same numbers wherever the program is specialized for them.

    Args:
        program: a function under `triton.jit`, whose tensors come first in its signature and whose compile-time arguments last.
        grid: number of instances in three dimensions.
        constants: the compile-time arguments by name.
        options: for Triton, such as `num_warps`.
    """

    def __init__(
        self, program: Any, grid: tuple[int, int, int], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.program, self._grid, self._constants, self._options = program, grid, constants, options
        self._run: Any = None
        self._values: tuple[Any, ...] = ()  # of the constants
        self._aligned: tuple[int, ...] = ()  # tensors for whose alignment the program is specialized

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float | Tensor]) -> None:
        """Launch on the current stream of the current device.

        Args:
            tensors: the program's first arguments.
            numbers: the others: Python's numbers, or tensors of any alignment where the program takes an address.
        """
        if self._run is not None:
            pointers = [tensor.data_ptr() for tensor in tensors]
            if not any([pointers[i] % _ALIGNMENT for i in self._aligned]):
                self._run(*pointers, *numbers, *self._values)
                return
        compiled = self.program[self._grid](*tensors, *numbers, **self._constants, **self._options)
        if self._run is not None or compiled is None:  # the interpreter compiles nothing
            return
        parameters = self.program.params
        aligned = tuple(i for i in range(len(tensors)) if not parameters[i].do_not_specialize)
        if not any([tensors[i].data_ptr() % _ALIGNMENT for i in aligned]):
            names = [parameter.name for parameter in parameters[len(tensors) + len(numbers) :]]
            self._values = tuple(self._constants[name] for name in names)
            self._aligned = aligned
            self._run = compiled[self._grid]  # last: another thread may launch by it at once
