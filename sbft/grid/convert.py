"""Putting the weights of a model on grids, one at a time."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sbft.errors import ModelError
from sbft.grid.formats import GRIDS, NAMED, Grid, fits
from sbft.grid.weight import GridWeight
from sbft.native.mapped import MappedFiles

DEFAULT = "default"
KEPT = "bfloat16"
"""The format of weights that stay off the grid."""
SMALLEST_ELEMENTS = 4096
"""Smaller weights stay in bfloat16: together they are a negligible part of a model."""


def check_formats(weights: str | Mapping[str, str]) -> dict[str, str]:
    """The formats of a model's weights by pattern, `default` among them.

    Args:
        weights: see `put_on_grids`.

    Raises:
        ModelError: if a format is none of `int4`, `int8`, `int12` and `bfloat16`.
    """
    formats = {DEFAULT: weights} if isinstance(weights, str) else {DEFAULT: KEPT, **weights}
    for pattern, name in formats.items():
        if name not in (*NAMED, KEPT):
            meant = difflib.get_close_matches(str(name), [*GRIDS, KEPT], n=1)
            hint = f" Did you mean {meant[0]}?" if meant else ""
            raise ModelError(
                f"There is no format {name!r} for weights ({pattern}); expected {', '.join(GRIDS)} or {KEPT}.{hint}"
            )
    return formats


def put_on_grids(
    model: nn.Module, weights: str | Mapping[str, str], *, smallest_elements: int = SMALLEST_ELEMENTS
) -> dict[str, str]:
    """Replace a model's bfloat16 weights by weights on a grid, one after the other, so that no second model exists.

    Biases, norms, weights with fewer than `smallest_elements` elements, and those whose rows do not divide by 32 stay as they
    are; so do weights in float32, in which some models keep a few. Tied weights stay tied. A frozen weight stays frozen.

    Args:
        model: is changed in place; before adapters are put on it, and before an optimizer is made.
        weights: a format (`int4`, `int8`, `int12`, or one of `VARIANTS`) for all weights, or formats by pattern, such as
            `{"default": "int4", "lm_head": "int8", "*.layers.0.*": "bfloat16"}`. A pattern (of `fnmatch`) is matched against
            a parameter's name and against any part of that name between dots. If several match, the first one applies;
            `default` (bfloat16 if it is left out) applies where none matches.
        smallest_elements: see above.

    Returns:
        The format of every weight that is now on a grid, by its name (the first name of a tied weight).

    Raises:
        ModelError: if a format is unknown, a pattern matches no weight that could be on a grid, the model is quantized
            already, sharded, or not in bfloat16.
    """
    formats = check_formats(weights)
    shared = _by_parameter(model)
    _check_model(shared)
    suited = [parameter for parameter in shared if _is_suited(parameter.tensor, smallest_elements)]
    for pattern in formats:
        if pattern != DEFAULT:
            _check_pattern(pattern, shared, suited)
    put = {}
    files = MappedFiles()
    for parameter in suited:
        name = _format_of(parameter.names, formats)
        if name != KEPT:
            address, size_bytes = parameter.tensor.data_ptr(), parameter.tensor.nbytes
            parameter.replace(NAMED[name])
            files.forget(address, size_bytes)
            put[parameter.names[0]] = name
    return put


class _Parameter:
    """A parameter with all its names and places; it is read from its module, so that nothing here keeps it alive."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._places: list[tuple[nn.Module, str]] = []

    def add(self, name: str, module: nn.Module, attribute: str) -> None:
        self.names.append(name)
        self._places.append((module, attribute))

    @property
    def tensor(self) -> Tensor:
        module, attribute = self._places[0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    def replace(self, grid: Grid) -> None:
        old = self.tensor
        on_meta = old.device.type == "meta"
        weight = GridWeight.empty(old.shape, grid, old.device) if on_meta else GridWeight.of(old, grid)
        new = nn.Parameter(weight, requires_grad=old.requires_grad)
        for module, attribute in self._places:
            module._parameters[attribute] = new


def _by_parameter(model: nn.Module) -> list[_Parameter]:
    by_id: dict[int, _Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                by_id.setdefault(id(parameter), _Parameter()).add(name, module, attribute)
    return list(by_id.values())


def _is_suited(tensor: Tensor, smallest_elements: int) -> bool:
    return tensor.dtype == torch.bfloat16 and fits(tensor.shape) and tensor.numel() >= smallest_elements


def _matches(names: list[str], pattern: str) -> bool:
    forms = (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*")
    return any(fnmatchcase(name, form) for name in names for form in forms)


def _format_of(names: list[str], formats: Mapping[str, str]) -> str:
    matching = (name for pattern, name in formats.items() if pattern != DEFAULT and _matches(names, pattern))
    return next(matching, formats[DEFAULT])


def _check_model(parameters: list[_Parameter]) -> None:
    for parameter in parameters:
        tensor, name = parameter.tensor, parameter.names[0]
        if isinstance(tensor, GridWeight):
            raise ModelError(f"The weight {name} is already on the grid {tensor.grid.name}. Load the model again.")
        if type(tensor).__module__.startswith("bitsandbytes"):
            raise ModelError(
                f"The weight {name} is quantized by bitsandbytes, but only bfloat16 weights can be put on a grid. Leave out "
                "the quantization or `weights`."
            )
        if _is_sharded(tensor):
            raise ModelError(
                f"The weight {name} is sharded over several processes, which weights on a grid cannot be. Leave out "
                "`distributed`, or write `weights: bfloat16`."
            )
    dtypes = {parameter.tensor.dtype for parameter in parameters if parameter.tensor.is_floating_point()}
    if dtypes and torch.bfloat16 not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(
            f"The model's weights are {names}, but only bfloat16 can be put on a grid. Load it in bfloat16."
        )


def _is_sharded(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _check_pattern(pattern: str, parameters: list[_Parameter], suited: list[_Parameter]) -> None:
    if any(_matches(parameter.names, pattern) for parameter in suited):
        return
    matched: list[str] = [parameter.names[0] for parameter in parameters if _matches(parameter.names, pattern)]
    if matched:
        raise ModelError(
            f"The pattern {pattern!r} of `weights` matches only weights that cannot be on a grid, the first {matched[0]}: they "
            "are norms, biases, small, not in bfloat16, or their rows do not divide by 32. Leave it out."
        )
    parts = sorted({part for parameter in suited for name in parameter.names for part in name.split(".")})
    near = difflib.get_close_matches(pattern, parts, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ModelError(
        f"The pattern {pattern!r} of `weights` matches no weight of the model, whose weights have names such as "
        f"{suited[-1].names[0] if suited else parameters[0].names[0]}.{hint}"
    )
