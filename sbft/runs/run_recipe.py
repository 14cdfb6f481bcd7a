"""One recipe, from data to `run.json`: the story of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from sbft.data.collate import Collator
from sbft.data.format import FormatReport
from sbft.data.sources import Splits
from sbft.data.windows import TokenSplits, TokenWindows, collate_windows
from sbft.errors import Interrupted, MissingPackageError
from sbft.evaluation.generate import evaluate
from sbft.evaluation.likelihood import evaluate_loss, pad_token
from sbft.models.quantized import scales_bytes, write_note
from sbft.models.scratch import is_scratch
from sbft.native.memory import PeakMemory, device_name, model_bytes, optimizer_state_bytes
from sbft.native.memory_pool import pool_bytes
from sbft.planning.check.check_recipe import expected_memory, warnings_in_brief
from sbft.planning.check.examples import answer_ends
from sbft.planning.check.model import BEFORE_LOADING, find_in_model, refuse_errors
from sbft.recipe import Recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.best_checkpoint import LogWhereEvaluated, held_out_examples, held_out_part
from sbft.runs.build import prepare_model, training_arguments
from sbft.runs.card import write_card
from sbft.runs.failures import Stage, failures_recorded, resume_command
from sbft.runs.interrupt import StopBetweenSteps
from sbft.runs.output_folder import (
    RunFolder,
    check_nothing_needed_is_removed,
    check_output_folder,
    check_same_recipe,
    checkpoint_to_resume,
)
from sbft.runs.prepare import Prepared, evaluation_rows, prepare, rendering
from sbft.runs.processes import as_launched
from sbft.runs.ranks import check_agreed
from sbft.runs.record import RunRecord, git_commit, quantiles, versions
from sbft.training.batches.packing_probe import refuse_leaking_rows
from sbft.training.checkpointing.checkpoints import describe_damage, find_checkpoint, go_back_to
from sbft.training.checkpointing.rehearsal import describe_unsaved, save_all_that_can_be
from sbft.training.checkpointing.saving import saved_whole
from sbft.training.generation_config import settle_generation
from sbft.training.trainer import SmallBatchTrainer

PREDICTIONS_FILE = "predictions.jsonl"
_CHOSEN_ON_EVALUATION = (
    "the best checkpoint is chosen by the data that the result is reported on, which makes the result look better than "
    "it is. Write data.validation, or data.validation_size, to choose it by other data"
)
Say = Callable[[str], None]


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    say: Say = lambda line: None,
) -> RunRecord:
    """Train as a recipe says, and leave the model, its record, its predictions and its card in `output_dir`.

    Mistakes in the recipe, the data or the model are found before anything is written. After that, a record is written
    whatever happens.

    Args:
        recipe: as loaded; the method's defaults are filled in here.
        resume: resume from the last checkpoint in the output folder.
        overwrite: replace an earlier run in the output folder.
        callbacks: more callbacks for the trainer, such as a progress bar.
        say: called with a sentence when a new phase begins.

    Raises:
        SbftError: if the run cannot begin, or ended early: out of memory, interrupted, no finite loss.
    """
    begun = time.perf_counter()
    recipe, spread = as_launched(resolve(recipe))
    folder = Path(str(recipe.output_dir))
    check_output_folder(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        check_nothing_needed_is_removed(folder, recipe)
    if resume:
        check_same_recipe(folder, recipe)
    checkpoint, damaged = checkpoint_to_resume(folder) if resume else (None, {})
    record = _begin(recipe)
    arguments = training_arguments(recipe, folder)
    check_agreed(checkpoint)
    output = RunFolder(folder, resume, main=arguments.process_index == 0)
    if checkpoint is not None and damaged:
        say(f"Warning: {describe_damage(damaged, checkpoint)}")
    if spread is not None:
        say(spread)
    say(f"Reading {recipe.data.train}")
    prepared = prepare(recipe, arguments, say)
    part = held_out_part(prepared)
    arguments.per_device_eval_batch_size = recipe.evaluation.batch_size
    tokenizer, splits, report = prepared.tokenizer, prepared.splits, prepared.report
    say(_describe_tokens(prepared) if prepared.pretrains else _describe(report, splits))
    of_model = refuse_errors(find_in_model(prepared, BEFORE_LOADING))
    prediction, of_memory = expected_memory(prepared)
    for line in warnings_in_brief(prepared, of_memory, *of_model):
        say(line)
    if part == "eval" and arguments.load_best_model_at_end:
        say(f"Warning: {_CHOSEN_ON_EVALUATION}")
    if prediction is not None:
        record.memory["predicted_peak"] = prediction.peak_bytes
        record.memory["predicted_above_baseline"] = prediction.above_model_bytes
    with failures_recorded(recipe, record, output) as stage, _timed(record, begun):
        say(f"{'Making' if is_scratch(recipe.model) else 'Loading'} {recipe.model}")
        with _unsupported_is_a_result(recipe, record, output):
            model = prepare_model(recipe, tokenizer)
        stop = StopBetweenSteps()
        trainer = SmallBatchTrainer(
            model=model,
            args=arguments,
            train_dataset=prepared.examples,
            eval_dataset=held_out_examples(prepared, part),
            data_collator=collate_windows if prepared.pretrains else Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[*callbacks, stop, LogWhereEvaluated()],
        )
        trainer.remove_callback(PrinterCallback)
        if recipe.data.packing:
            refuse_leaking_rows(model, arguments.per_device_train_batch_size)
        settle_generation(model, tokenizer, answer_ends(prepared), say=trainer.warn_once)
        if recipe.save_model or arguments.save_strategy != SaveStrategy.NO:
            trainer.rehearse_saving()
        _describe_in_record(record, recipe, model, arguments.world_size, report, splits)
        former = _former_record(folder) if resume else None
        if former is not None:
            record.metrics_before, record.train_s = former.metrics_before, former.train_s
            record.total_s = former.total_s
        output.begin(recipe)
        if checkpoint is not None and output.main:
            go_back_to(checkpoint, damaged)
        output.save(record)
        rows = evaluation_rows(splits)
        if rows is not None and recipe.evaluation.before and not record.metrics_before:
            say("Measuring the untrained model")
            stage.evaluating = True
            record.metrics_before = _evaluate(recipe, model, tokenizer, splits, record)
            stage.evaluating = False
            output.save(record)
        if checkpoint is not None and _all_steps_done(trainer, checkpoint):
            say(f"All steps are done in {checkpoint}")
            _take_over(trainer, checkpoint, record, former)
        else:
            _train(trainer, stop, checkpoint, output, record, former, stage, say)
        best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
        if best is not None:
            say(f"The model of {Path(best).name} is kept: its loss on the {part} data was the lowest")
        # Before anything is measured: hours of training are not lost to what goes wrong there.
        if recipe.save_model and not output.main and recipe.distributed is not None:
            model.save_pretrained(folder, is_main_process=False)  # it has a part of every weight
        elif output.main and recipe.save_model:
            stage.trained = True
            with trainer.own_cache_setting():
                _save(model, tokenizer, recipe, folder)
            record.saved_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        stage.trained, stage.kept = True, recipe.save_model
        output.save(record)
        if rows is not None:
            if stop.requested:
                raise KeyboardInterrupt(stop.signal)  # it came in the last step
            say("Measuring the trained model")
            stage.evaluating = True
            predictions = folder / PREDICTIONS_FILE if output.main else None
            record.metrics = _evaluate(recipe, model, tokenizer, splits, record, predictions)
            stage.evaluating = False
        if output.main and recipe.save_model:
            write_card(record, folder)
        record.status, record.error = "ok", None
    output.save(record)
    return record


@contextmanager
def _timed(record: RunRecord, begun: float) -> Iterator[None]:
    """Adds the seconds since `begun` to those of the record's former sessions, however the run ends."""
    try:
        yield
    finally:
        record.total_s = (record.total_s or 0.0) + time.perf_counter() - begun


@contextmanager
def _unsupported_is_a_result(recipe: Recipe, record: RunRecord, output: RunFolder) -> Iterator[None]:
    """That a machine cannot run a method is left in the folder as a result, before there is anything to train."""
    try:
        yield
    except MissingPackageError:
        record.status = "unsupported"
        if not output.resume:
            output.begin(recipe)
        raise


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> None:
    quantization = METHODS[recipe.method].quantization
    with saved_whole(folder) as part:
        unsaved = save_all_that_can_be(model, tokenizer, part)
        if quantization is not None:
            write_note(part, quantization)
    if unsaved:
        raise describe_unsaved(unsaved, folder) from next(iter(unsaved.values()))


def _begin(recipe: Recipe) -> RunRecord:
    """A record of what will be run, of a run that has not finished."""
    training = recipe.training
    return RunRecord(
        method=recipe.method,
        model=recipe.model,
        dataset=recipe.data.train,
        seed=training["seed"],
        dtype=str(recipe.dtype),
        per_device_batch_size=training["per_device_train_batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        second_moment_half_life=recipe.optimizer.second_moment_half_life,
        learning_rate=float(training["learning_rate"]),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        git_commit=git_commit(),
    )


def _describe_in_record(
    record: RunRecord,
    recipe: Recipe,
    model: PreTrainedModel,
    world_size: int,
    report: FormatReport,
    splits: Splits | TokenSplits,
) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.numel() * parameter.element_size() for parameter in trainable]
    record.device = device_name(model.device)
    record.parameters = model.num_parameters()  # two to each byte of a 4-bit weight
    record.trainable_parameters = sum(parameter.numel() for parameter in trainable)
    record.world_size = world_size
    # Released, a gradient lives until its own update, so the largest decides.
    record.memory["gradients"] = max(gradients) if recipe.optimizer.gradient_release else sum(gradients)
    quantized = METHODS[recipe.method].quantization is not None
    record.memory["weights"] = model_bytes(model) + (scales_bytes(model) if quantized else 0)
    rows = evaluation_rows(splits)
    counts = {name: count for name, count in asdict(report).items() if name != "unread"}  # names, which were said
    record.data = {
        **counts,
        "dropped_overlap": splits.dropped_overlap,
        "evaluation_examples": None if rows is None else min(len(rows), recipe.evaluation.limit or len(rows)),
    }


def _describe_tokens(prepared: Prepared) -> str:
    windows, held_out = len(prepared.examples), len(prepared.splits.validation or ())
    length, steps = prepared.recipe.data.max_length, prepared.arguments.max_steps
    long = "" if steps < 0 else f"; {steps:,} steps"
    whole = f"{windows:,} windows of {length:,} tokens, {windows * length:,} in all"
    return f"{whole}{long}; the loss is measured on {held_out:,} others"


def _describe(report: FormatReport, splits: Splits | TokenSplits) -> str:
    told = [f"{report.examples} examples, {report.tokens} tokens, the longest {report.longest}"]
    if report.packed_into is not None:
        told.append(f"packed into {report.packed_into} rows")
    if report.truncated:
        told.append(f"{report.truncated} cut off at data.max_length")
    if report.dropped:
        told.append(f"{report.dropped} left out, because nothing to learn was left after the cut at data.max_length")
    if report.empty:
        told.append(f"{report.empty} left out, because they are empty")
    if report.unanswered:
        told.append(f"{report.unanswered} left out, because no turn in them is the assistant's to learn")
    if report.divided:
        told.append(f"{report.divided} conversations are several, as the chat template changes earlier answers in later ones")
    if splits.dropped_overlap:
        told.append(f"{splits.dropped_overlap} left out, because the evaluation asks the same")
    return "; ".join(told)


def _train(
    trainer: SmallBatchTrainer,
    stop: StopBetweenSteps,
    checkpoint: Path | None,
    output: RunFolder,
    record: RunRecord,
    former: RunRecord | None,
    stage: Stage,
    say: Say,
) -> None:
    """The training loop, and everything about it that is measured."""
    say("Training")
    begin = time.perf_counter()
    peak = PeakMemory(trainer.args.device)
    try:
        with peak, stop:
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception:
        # The trainer takes the wish back when it is fulfilled.
        stage.evaluating = stage.within_training = trainer.control.should_evaluate
        raise
    finally:
        elapsed = time.perf_counter() - begin
        record.train_s = (record.train_s or 0.0) + elapsed
        record.steps = trainer.state.global_step
        record.peak_memory_bytes, record.memory_kind = peak.peak_bytes, peak.kind
        record.memory["baseline"] = peak.baseline_bytes
        # Where the peak cannot be set back (`note`), it is that of the whole process, and says nothing of the loop.
        record.memory["above_baseline"] = None if peak.note else peak.peak_bytes - peak.baseline_bytes
        record.memory["reserved_peak"] = peak.reserved_peak_bytes
        pool = pool_bytes()
        record.memory["pool_peak"] = None if pool is None else pool.peak
        if trainer.optimizer is not None:
            record.memory["optimizer_state"] = optimizer_state_bytes(trainer.optimizer)
        record.tokens = trainer.tokens_seen
        record.skipped_steps = trainer.skipped_steps
        record.unlabelled_steps = trainer.unlabelled_steps
        record.step_s = quantiles(trainer.step_seconds)
        record.optimizer_s = quantiles(trainer.optimizer_seconds)
        record.tokens_per_s = trainer.tokens_of_this_session / elapsed
        record.history = _history(trainer.state)
        if former is not None:
            _keep_the_higher_peak(record, former)
    # The trainer's is the mean over this session's steps, and nobody has kept the losses of those before.
    record.train_loss = None if checkpoint is not None else outcome.training_loss
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            stop.signal,
            f" after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in "
            f"{find_checkpoint(output.folder)}. To resume, type: {resume_command(record, output)}",
        )


def _all_steps_done(trainer: SmallBatchTrainer, checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step, after which the trainer's loop would make one more."""
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= max_steps


def _take_over(trainer: SmallBatchTrainer, checkpoint: Path, record: RunRecord, former: RunRecord | None) -> None:
    """The weights of a checkpoint with nothing left to train, and what its run has measured of the training."""
    state = trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    record.steps = state.global_step
    record.tokens, record.skipped_steps = trainer.counted_in(state) or (0, 0)
    record.history = _history(state)
    if former is None:
        return
    record.memory = {**former.memory, **record.memory}
    for name in ("peak_memory_bytes", "memory_kind", "step_s", "optimizer_s", "tokens_per_s"):
        setattr(record, name, getattr(former, name))
    if former.steps == record.steps:
        record.train_loss = former.train_loss


def _history(state: TrainerState) -> list[dict[str, float]]:
    """What was logged in steps, those before a resumed checkpoint too, which keeps them; and the loss on held-out data
    (`eval_loss`) where it was measured.
    """
    names = {"step": "step", "tokens": "tokens_seen", "loss": "loss", "learning_rate": "learning_rate"}
    history = [{name: entry[key] for name, key in names.items()} for entry in state.log_history if "loss" in entry]
    measured = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    for entry in history:
        if entry["step"] in measured:
            entry["eval_loss"] = measured[entry["step"]]
    return history


def _keep_the_higher_peak(record: RunRecord, former: RunRecord) -> None:
    """The peak of a resumed run is the highest of its sessions, with what belongs to it."""
    if former.memory_kind == record.memory_kind and (former.peak_memory_bytes or 0) > (record.peak_memory_bytes or 0):
        record.peak_memory_bytes = former.peak_memory_bytes
        for part in ("baseline", "above_baseline", "reserved_peak"):
            record.memory[part] = former.memory.get(part)


def _evaluate(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits | TokenSplits,
    record: RunRecord,
    predictions: Path | None = None,
) -> dict[str, float]:
    rows = evaluation_rows(splits)
    if rows is None:
        return {}
    begin = time.perf_counter()
    with PeakMemory(model.device) as peak:
        metrics = measure(recipe, model, tokenizer, rows, predictions)
    record.eval_s = time.perf_counter() - begin
    record.memory["evaluation_peak"] = max(peak.peak_bytes, record.memory.get("evaluation_peak") or 0)
    record.evaluated_on = "eval" if splits.eval is not None else "validation"
    if predictions is not None and predictions.exists():
        record.predictions = predictions.name
    return metrics


def measure(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | TokenWindows,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measure a model on `rows` as a resolved recipe says; `predictions` is the JSONL file for its answers, if any."""
    settings = recipe.evaluation
    if isinstance(rows, TokenWindows):
        return evaluate_loss(model, rows.rows(), Collator(pad_token(tokenizer)), batch_size=settings.batch_size)
    return evaluate(
        model,
        tokenizer,
        rows,
        metrics=settings.metrics,
        metric_options=settings.metric_options,
        labels=settings.labels,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        limit=settings.limit,
        predictions_path=predictions,
        **rendering(recipe),
    )


def _former_record(folder: Path) -> RunRecord | None:
    """What the interrupted run in this folder has measured."""
    try:
        return RunRecord.load(folder)
    except FileNotFoundError:
        return None
