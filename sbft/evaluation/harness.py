"""Public benchmarks: run a loaded model through EleutherAI's lm-evaluation-harness, and save the results."""

from __future__ import annotations

import difflib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbft.errors import DataError, MissingPackageError
from sbft.files import replacing
from sbft.models.hub import hub_reachable, hub_state, offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_NAME = "harness.json"

LoadedTasks = list[Any]
"""Tasks and groups of tasks, as the harness has them."""


@dataclass(frozen=True)
class Score:
    """One figure of a task."""

    metric: str
    filter: str
    """How answers were extracted from the model's output; "none" for the raw output."""
    value: float
    stderr: float | None
    """Standard error over the examples; None if the harness gives none."""
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What the harness measured on a task, or on a group of tasks."""

    task: str
    version: Any
    """Version of the task: figures of different versions are not comparable."""
    shots: int | None
    """Solved examples in each prompt."""
    examples: int | None
    """Examples measured; None for a group."""
    scores: list[Score]


def load_tasks(names: list[str], folder: Path | None = None) -> LoadedTasks:
    """Find tasks by name and load their data, so that mistakes show before a model is loaded.

    Args:
        names: tasks, groups or tags of the harness, or patterns such as mmlu_*.
        folder: a folder with YAML files of more tasks.

    Raises:
        MissingPackageError: if lm-evaluation-harness, or a package that a task needs, is not installed.
        DataError: if there is no such task or folder, or its data cannot be loaded.
    """
    try:
        from lm_eval.tasks.manager import TaskManager  # since 0.4.12
    except ImportError as error:
        raise MissingPackageError(
            "--harness hands the model to EleutherAI's lm-evaluation-harness 0.4.12 or later, which is not installed "
            f"({error}). Type: pip install 'lm-eval>=0.4.12'"
        ) from error
    if folder is not None and not folder.is_dir():
        raise DataError(f"There is no folder {folder} of tasks. Give --harness-tasks a folder with YAML files.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    selected: dict[str, None] = {}
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            raise _unknown_task(name, manager, folder)
        selected |= dict.fromkeys(matched)
    try:
        with offline_if_unreachable():
            loaded = manager.load(list(selected))
    except ImportError as error:
        raise MissingPackageError(
            f"A task among {', '.join(names)} needs a package that is not installed: {error}. Install it with pip."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _not_loaded(names, error) from error
    inside = {child for children in loaded["group_map"].values() for child in children}
    everything = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in everything.items() if name not in inside]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    chat_template: bool = False,
) -> list[TaskResult]:
    """Measure a model on tasks, with the prompts, shots and metrics that the harness defines for each.

    Args:
        model: a causal language model, with or without a LoRA adapter, on the device where it runs.
        tokenizer: its tokenizer.
        tasks: as `load_tasks` returns them.
        limit: use only this many examples of each task; for a quick look, not for a result.
        batch_size: examples per batch.
        chat_template: ask in the model's chat template; published figures of base models do not.

    Raises:
        DataError: if a task would execute code that the model writes, or the tokenizer lacks the chat template that was
            asked for.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskManager

    from sbft.evaluation.likelihood import evaluating

    if chat_template and not tokenizer.chat_template:
        raise DataError("--chat-template is given, but the tokenizer has no chat template. Leave it out.")
    for task in tasks:
        _refuse_unsafe(task)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        measured = simple_evaluate(
            wrapped,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # the default takes seconds to list all tasks again
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            log_samples=False,
        )
    return _results(measured)


def save(results: list[TaskResult], path: Path, **run: Any) -> None:
    """Write results as JSON, by task. Results of other tasks that are in the file stay there.

    Args:
        results: as `run_tasks` returns them.
        path: the file.
        **run: what else to save with each result, such as the limit.

    Raises:
        DataError: if the file exists and holds something else, or cannot be written.
    """
    kept = read(path)
    noted = {
        **run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")},
    }
    for result in results:
        kept[result.task] = {**{name: value for name, value in asdict(result).items() if name != "task"}, **noted}
    with replacing(path, shared=True) as part:
        part.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """What `save` has written; empty if there is no file.

    Raises:
        DataError: if the file holds something else, or cannot be written to.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"The results cannot be written to {path}. Type --output FILE, in a folder that exists and can be written."
        )
    if not path.exists():
        return {}
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and all(isinstance(result, dict) and "scores" in result for result in kept.values()):
            return kept
    raise DataError(f"{path} exists and holds no results of the harness. Choose another file with --output.")


def _unknown_task(name: str, manager: Any, folder: Path | None) -> DataError:
    known = manager.all_tasks
    near = difflib.get_close_matches(name, known, n=3) or [task for task in known if name.lower() in task.lower()][:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    own = ""
    if folder is not None:
        readable = [task for task, entry in manager.task_index.items() if entry.yaml_path and folder in _parents(entry)]
        own = f" {folder} has {', '.join(sorted(readable)) or 'no task that can be read'}."
    return DataError(
        f"lm-evaluation-harness {version('lm_eval')} has no task {name!r} among its {len(known)}.{hint}{own} "
        "To list them, type: lm_eval ls tasks"
    )


def _parents(entry: Any) -> list[Path]:
    return list(Path(entry.yaml_path).parents)


def _not_loaded(names: list[str], error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300]
    failure = f"The data of {', '.join(names)} could not be loaded"
    if not hub_reachable():
        return DataError(
            f"{failure}: it is not, or not completely, in this machine's cache, and {hub_state()} ({reason}). Run the same "
            "command once with a connection to the hub, or give --harness-tasks a folder of tasks with local files."
        )
    return DataError(f"{failure}: {type(error).__name__}: {reason}. Check the names, and the task's own YAML file.")


def _refuse_unsafe(item: Any) -> None:
    """Refuse tasks that run code which the model writes; `item` is a task or a group of them."""
    tasks = item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(
                f"The task {task.task_name} runs code that the model writes, which sbft does not do on your "
                "machine. Leave it out, or use lm_eval directly, with --confirm_run_unsafe_code."
            )


def _results(measured: dict[str, Any]) -> list[TaskResult]:
    results = []
    for task, figures in measured["results"].items():
        better = measured["higher_is_better"].get(task, {})
        scores = []
        for key, value in figures.items():
            metric, comma, chosen_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = figures.get(f"{metric}_stderr,{chosen_filter}")
            stderr = float(error) if isinstance(error, Real) else None
            scores.append(Score(metric, chosen_filter, float(value), stderr, better.get(metric)))
        examples = measured["n-samples"].get(task, {}).get("effective")
        shots = measured["n-shot"].get(task)
        if scores:  # a group that has no mean over its tasks has no scores
            results.append(TaskResult(task, measured["versions"].get(task), shots, examples, scores))
    return results
