"""What to type where a package is missing: sbft's own script in a checkout, pip elsewhere."""

from __future__ import annotations

from pathlib import Path

SETUP = Path(__file__).parent.parent / "scripts" / "setup.sh"
"""Installs what the methods and the built-in model need; it is there in a checkout only."""


def how_to_install(pip_arguments: str) -> str:
    """The end of a message about a missing package.

    Args:
        pip_arguments: what installs it where sbft itself was installed by pip, such as `'sbft[lora]'`.
    """
    if not SETUP.is_file():
        return f"Type: pip install {pip_arguments}"
    script = SETUP.relative_to(Path.cwd()) if SETUP.is_relative_to(Path.cwd()) else SETUP
    return f"Type: bash {script}"
