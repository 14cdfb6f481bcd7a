"""constraints.txt and constraints-oldest.txt: they contradict neither pyproject.toml nor what the pinned packages require."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]


def pins(name: str) -> dict[str, str]:
    """The version of each package that the file pins for this Python."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    held = [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate()]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in held}


def required_by_sbft() -> list[Requirement]:
    """The requirements in pyproject.toml with all its extras, read as text: Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text()
    needed = text.split("\ndependencies = [\n")[1].split("\n]")[0]
    optional = text.split("\n[project.optional-dependencies]\n")[1].split("\n[")[0]
    lines = [line for line in f"{needed}\n{optional}".splitlines() if not line.lstrip().startswith("#")]
    return [Requirement(line) for line in "\n".join(lines).split('"')[1::2]]


def test_the_pins_admit_what_the_pinned_packages_require() -> None:
    held = pins("constraints.txt")
    compared = 0
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if held.get(name) != distribution.version.split("+")[0]:
            continue  # not the pinned version: its requirements say nothing about the pins
        for line in distribution.requires or []:
            requirement = Requirement(line)
            pin = held.get(canonicalize_name(requirement.name))
            if pin is None or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            compared += 1
            assert requirement.specifier.contains(pin), f"{name} {distribution.version} requires {line}; pinned is {pin}"
    if held["torch"] == importlib.metadata.version("torch").split("+")[0]:
        assert compared > 100


def test_both_files_hold_every_package_that_sbft_asks_for() -> None:
    held, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    elsewhere = {"lm-eval", "ray"}  # extras that setup.sh does not install
    unbounded = {"pandas-stubs", "types-pyyaml"}  # only for type checking
    for requirement in required_by_sbft():
        name = canonicalize_name(requirement.name)
        if name in elsewhere:
            continue
        # A pin with a marker is absent on Python 3.10.
        assert name not in held or requirement.specifier.contains(held[name]), f"{name}: pinned outside {requirement}"
        assert name in unbounded or name in oldest, f"{name} is missing in constraints-oldest.txt"


@pytest.mark.parametrize("name", sorted(pins("constraints-oldest.txt")))
def test_the_oldest_are_the_lower_bounds(name: str) -> None:
    bounds = [
        {specifier.operator: specifier.version for specifier in requirement.specifier}[">="]
        for requirement in required_by_sbft()
        if canonicalize_name(requirement.name) == name
    ]
    # 2.9 and 2.9.0 are the same version.
    exactly = Requirement(f"{name}=={pins('constraints-oldest.txt')[name]}").specifier
    assert bounds and all(exactly.contains(bound) for bound in bounds), f"pyproject.toml: {bounds}"
