"""Public tasks: hands a loaded model to EleutherAI's lm-evaluation-harness, and keeps what it measures."""

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
"""Tasks and groups of tasks, as the harness keeps them."""


@dataclass(frozen=True)
class Score:
    """One figure of a task."""

    metric: str
    filter: str
    """How answers were read out of what the model wrote; "none": as they stand."""
    value: float
    stderr: float | None
    """Standard error over the examples, where the harness knows one."""
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What the harness measured on a task, or on a group of tasks."""

    task: str
    version: Any
    """The task's own version: figures of different versions cannot be compared."""
    shots: int | None
    """Solved examples in each prompt."""
    examples: int | None
    """Examples measured; None for a group."""
    scores: list[Score]


def load_tasks(names: list[str], folder: Path | None = None) -> LoadedTasks:
    """Finds tasks by name and loads their data, before a model is loaded for them.

    Args:
        names: tasks, groups or tags of the harness, or patterns of them such as mmlu_*.
        folder: a folder with YAML files of further tasks.

    Raises:
        MissingPackageError: lm-evaluation-harness is not installed, or what a task needs besides it.
        DataError: no such task, no such folder, or data that cannot be loaded.
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
    chosen: dict[str, None] = {}
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            raise _unknown_task(name, manager, folder)
        chosen |= dict.fromkeys(matched)
    try:
        with offline_if_unreachable():
            loaded = manager.load(list(chosen))
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
    """Measures a model on tasks, each with the prompts, shots and metrics that the harness has for it.

    Args:
        model: a causal language model, on the device where it shall run; with a LoRA adapter or without.
        tokenizer: its tokenizer.
        tasks: as `load_tasks` gives them.
        limit: only the first so many examples of each task: a try, not a result.
        batch_size: examples at once.
        chat_template: put questions as turns of a chat; published figures of base models are without.

    Raises:
        DataError: a task that the harness refuses to run, such as one that executes what the model writes; or a chat
            template asked for that the tokenizer does not have.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskManager

    from sbft.evaluation.likelihood import evaluating

    if chat_template and not tokenizer.chat_template:
        raise DataError("--chat-template was given, but the tokenizer has no chat template. Leave it out.")
    for task in tasks:
        _refuse_unsafe(task)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        measured = simple_evaluate(
            wrapped,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # else it looks for all tasks once more, for seconds
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            log_samples=False,
        )
    return _results(measured)


def save(results: list[TaskResult], path: Path, **run: Any) -> None:
    """Writes results as JSON, by task; those of other tasks that are in the file already stay.

    Args:
        results: as `run_tasks` gives them.
        path: the file.
        **run: what else to note beside each result, such as the limit.

    Raises:
        DataError: the file is there and holds something else, or cannot be written.
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
    """What `save` has written; nothing where there is no file.

    Raises:
        DataError: the file holds something else, or cannot be written to.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"The results cannot be written to {path}. Type --output FILE with a folder that exists.")
    if not path.exists():
        return {}
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and all(isinstance(one, dict) and "scores" in one for one in kept.values()):
            return kept
    raise DataError(f"{path} is there and holds no results of the harness. Type --output with another file.")


def _unknown_task(name: str, manager: Any, folder: Path | None) -> DataError:
    known = manager.all_tasks
    near = difflib.get_close_matches(name, known, n=3) or [one for one in known if name.lower() in one.lower()][:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    own = ""
    if folder is not None:
        there = [one for one, entry in manager.task_index.items() if entry.yaml_path and folder in _parents(entry)]
        own = f" {folder} has {', '.join(sorted(there)) or 'no task that can be read'}."
    return DataError(
        f"lm-evaluation-harness {version('lm_eval')} has no task {name!r} (it has {len(known)} others).{hint}{own} "
        "lm_eval ls tasks lists them."
    )


def _parents(entry: Any) -> list[Path]:
    return list(Path(entry.yaml_path).parents)


def _not_loaded(names: list[str], error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300]
    told = f"The data of {', '.join(names)} could not be loaded"
    if not hub_reachable():
        return DataError(
            f"{told}: it is not in this machine's cache, or not whole, and {hub_state()} ({reason}). Run the same "
            "command once where there is a hub, or give --harness-tasks a folder of tasks with local files."
        )
    return DataError(f"{told}: {type(error).__name__}: {reason}. Check the names, and the task's own YAML file.")


def _refuse_unsafe(item: Any) -> None:
    """Refuses tasks that run code which the model has written; `item` is a task or a group of them."""
    tasks = item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(
                f"The task {task.task_name} runs code that the model has written, which sbft does not do on your "
                "machine. Leave it out, or use lm_eval itself, with --confirm_run_unsafe_code."
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
        if scores:  # a group that takes no mean over its tasks has none
            results.append(TaskResult(task, measured["versions"].get(task), shots, examples, scores))
    return results
