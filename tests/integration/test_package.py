"""The wheel, installed into another environment and run from another folder, has everything with it."""

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
    """Another environment, whose dependencies are this one's; its sbft is the wheel's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # A path in a .pth file is searched after the environment's own packages, and its own .pth files are not read: the
    # editable install of this checkout stays out of sight.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin"


def test_the_wheel_holds_recipes_metrics_types_and_licence_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sbft/py.typed", "sbft/metrics/exact_match/exact_match.py"} <= set(names)
    assert {f"sbft/recipes/{name}.yaml" for name in recipe_names()} <= set(names)
    assert {f"sbft/suites/{name}.yaml" for name in suite_names()} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sbft").rglob("*.py")}
    assert sources <= set(names)


def test_the_command_runs_from_another_folder_with_its_recipes(environment: Path, tmp_path: Path) -> None:
    listed = run(environment / "sbft", "recipes", "ls", cwd=tmp_path)
    assert all(name in listed for name in recipe_names())
    where = run(environment / "python", "-c", "import sbft; print(sbft.__file__)", cwd=tmp_path)
    assert str(environment.parent) in where


def test_a_metric_of_the_wheel_computes(environment: Path, tmp_path: Path) -> None:
    code = (
        "from sbft import metrics\nprint(metrics.compute('exact_match', predictions=['4', '5'], references=['4', '6']))"
    )
    assert run(environment / "python", "-c", code, cwd=tmp_path).strip() == "0.5"
