"""What the runs of a suite require from a cluster: CPUs and GPUs, environment variables, and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbft.bench.ray.transfer import files_below
from sbft.bench.suite import Suite
from sbft.errors import ClusterError, RecipeError

_PASSED_ON = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH_", "SBFT_", "OMP_", "CUBLAS_")
"""Prefixes of environment variables that decide what a run loads and how it computes."""


@dataclass(frozen=True)
class Needs:
    """What each run requests from Ray: the same for all, so that their times can be compared."""

    cpus: int
    gpus: int


def needs(nodes: Sequence[Mapping[str, float]], jobs: int | None, *, use_gpus: bool) -> Needs:
    """The share of a machine for each run: one GPU where there are GPUs, else the CPUs divided by the runs per machine.

    Args:
        nodes: the resources of each machine, under Ray's names CPU and GPU.
        jobs: how many runs to make at the same time; one on each machine if None.
        use_gpus: use GPUs where there are any.

    Raises:
        ClusterError: if no machine has a whole CPU for runs.
    """
    with_gpus = [node for node in nodes if use_gpus and node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    if with_gpus:
        return Needs(max(min(int(node["CPU"] // node["GPU"]) for node in with_gpus), 1), 1)
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ClusterError("No machine of the Ray cluster has a CPU for runs. Add one: ray start --address=HOST:PORT")
    each = math.ceil((jobs or 1) / len(cpus))
    return Needs(max(min(cpus) // each, 1), 0)


def room(nodes: Sequence[Mapping[str, float]], needs: Needs) -> int:
    """How many runs fit on the machines at the same time."""
    fits = [
        min(node.get("CPU", 0) // needs.cpus, node.get("GPU", 0) // needs.gpus if needs.gpus else math.inf)
        for node in nodes
    ]
    return int(sum(fits))


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The runner's environment variables that runs receive, except paths, which are valid on its machine only."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(_PASSED_ON) and not value.startswith(("/", "~")))
        or (name == "CUDA_VISIBLE_DEVICES" and value == "")
    }


def local_files(suite: Suite, folder: Path) -> list[str]:
    """Names of the files that a suite's relative paths refer to, relative to `folder`.

    Raises:
        RecipeError: if a relative path leads out of the folder, where other machines cannot have it.
    """
    sources = {f"tasks.{name}.data.{part}": getattr(task.data, part) for name, task in suite.tasks.items()
               for part in ("train", "validation", "eval")}  # fmt: skip
    names: dict[str, None] = {}
    for key, source in {**sources, **{f"models ({model})": model for model in suite.models}}.items():
        # Absolute paths and `~` are left to each machine.
        if source is None or Path(source).is_absolute() or source.startswith("~") or not (folder / source).exists():
            continue
        if not (folder / source).resolve().is_relative_to(folder.resolve()):
            raise RecipeError(
                f"{key} is {source}, outside the folder that sbft was started in, {folder}. With --ray, only files below "
                "that folder are sent to the other machines. Start sbft further up, or give an absolute path that every "
                "machine has."
            )
        path = folder / source
        below = [str(Path(source) / name) for name in files_below(path)] if path.is_dir() else [source]
        names |= dict.fromkeys(below)
    return list(names)
