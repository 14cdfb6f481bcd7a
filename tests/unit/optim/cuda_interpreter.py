"""Makes Triton's interpreter run the kernels, and run them ten times faster. Import this before `triton`."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch(tensor: Any, scope: Any) -> None:
    # NumPy 2.4 no longer turns an array of one element into an int, which `range(count)` needs.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_splat(self: Any, result: Any, scalar: Any) -> Any:
    # The original takes the dtype of a comparison from its operands, so a comparison of floats is not usable as a mask.
    data = np.full(result.shape, scalar.data, dtype=interpreter._get_np_dtype(result))
    return interpreter.TensorHandle(data, result.scalar)


def _already_patched(fn: Any) -> Any:
    return interpreter._LangPatchScope() if _HAS_SCOPES else None  # nothing to restore


_HAS_SCOPES = hasattr(interpreter, "_LangPatchScope")  # not in Triton 3.5, which is used with a NumPy before 2.4
if _HAS_SCOPES:
    interpreter._patch_lang_tensor = _patch
interpreter.InterpreterBuilder.create_splat = _create_splat
# The original patches the language again at every call of every function; once is enough if everything is interpreted.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = _already_patched
# Half the time goes into integer overflow checks, which the compiled kernels do not have.
object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
