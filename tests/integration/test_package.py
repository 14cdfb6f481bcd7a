"""The wheel, installed into another environment and run from another folder, contains everything."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sbft.bench.suite import suite_names
from sbft.recipe import recipe_names

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT, cwd=folder)
    return next(folder.glob("sbft-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another environment with the dependencies of this one and the sbft of the wheel."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # A path in a .pth file is searched after the environment's own packages, and the .pth files in it are not read: so the
    # editable install of this checkout is not found.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin"


def test_the_wheel_holds_recipes_metrics_types_and_licence_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sbft/py.typed", "sbft/metrics/exact_match/exact_match.py"} <= set(names)
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    suites = {path.name for path in (ROOT / "benchmarks" / "suites").glob("*.yaml")}
    assert {f"sbft/{path}" for path in recipes} | {f"sbft/suites/{name}" for name in suites} <= set(names)
    assert len(recipes) == len(recipe_names()) and len(suites) == len(suite_names())
    # Nothing but the package and its metadata.
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sbft"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sbft").rglob("*.py")}
    assert sources <= set(names)


def test_an_editable_install_copies_no_recipe() -> None:
    # Force-included files would be copied once, and would not follow changes in the checkout.
    from hatchling.builders.wheel import WheelBuilder

    assert WheelBuilder(str(ROOT)).config.get_force_include() == {}


def test_the_command_runs_from_another_folder_with_its_recipes(environment: Path, tmp_path: Path) -> None:
    listed = run(environment / "sbft", "recipes", "ls", cwd=tmp_path)
    assert all(name in listed for name in recipe_names())
    assert "qwen3-4b-full" in run(environment / "sbft", "recipes", "show", "qwen3-4b-full", cwd=tmp_path)
    where = run(environment / "python", "-c", "import sbft; print(sbft.__file__)", cwd=tmp_path)
    assert str(environment.parent) in where


def test_a_metric_of_the_wheel_computes(environment: Path, tmp_path: Path) -> None:
    code = (
        "from sbft import metrics\nprint(metrics.compute('exact_match', predictions=['4', '5'], references=['4', '6']))"
    )
    assert run(environment / "python", "-c", code, cwd=tmp_path).strip() == "0.5"
