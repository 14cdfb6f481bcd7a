"""What the command line does before and after its imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Whether the last garbage collection of the process will visit modules. What is registered first is called last.
CODE = """
import atexit, gc, sys
atexit.register(lambda: print("passed over" if gc.get_freeze_count() else "reached"))
from sbft.cli.shared.starting import starting
with starting():
    sys.modules.update({name: sys for name in sys.argv[1:]})
assert gc.get_freeze_count() and gc.isenabled()
"""


@pytest.mark.parametrize(("modules", "said"), [(["triton._C.libtriton"], "reached"), ([], "passed over")])
def test_triton_is_not_passed_over_at_the_end_of_the_process(modules: list[str], said: str) -> None:
    """Skipping the last collection saves half a second, but Triton would then print a page about leaks."""
    command = [sys.executable, "-c", CODE, *modules]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == said
