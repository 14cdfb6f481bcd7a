"""The fallback of the compiled updates to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

import sbft.optim.kernels.reference as reference
from sbft.optim.sharding import Shard

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Update = Callable[_Arguments, _Result]


def or_reference(
    covers: Callable[[Any, Tensor, Shard | None], bool], after: Callable[[Shard | None, Any], None] | None = None
) -> Callable[[_Update[_Arguments, _Result]], _Update[_Arguments, _Result]]:
    """Make a compiled update fall back to the function of the same name in `reference`.

    Args:
        covers: whether the compiled update can do this one; called with the weight, its gradient and its shard.
        after: called with the shard and the result, after the reference has run.
    """

    def decorate(update: _Update[_Arguments, _Result]) -> _Update[_Arguments, _Result]:
        @functools.wraps(update)
        def covered_or_reference(*args: _Arguments.args, **settings: _Arguments.kwargs) -> _Result:
            weight: Any = args[0]
            grad: Any = args[1]
            shard: Any = settings.get("shard")
            if covers(weight, grad, shard):
                return update(*args, **settings)
            result: _Result = getattr(reference, update.__name__)(*args, **settings)
            if after is not None:
                after(shard, result)
            return result

        return covered_or_reference

    return decorate
