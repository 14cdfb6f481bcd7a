"""A run from beginning to end: one recipe, from its data to `run.json`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from sbft.data.collate import Collator
from sbft.data.windows import collate_windows
from sbft.errors import MissingPackageError
from sbft.models.load import check_model
from sbft.models.quantized import write_note
from sbft.models.scratch import is_scratch
from sbft.planning.check.check_recipe import expected_memory, warnings_in_brief
from sbft.planning.check.examples import answer_ends
from sbft.planning.check.model import BEFORE_LOADING, find_in_model, refuse_errors
from sbft.planning.memory.predict import Prediction
from sbft.recipe import Recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.best_checkpoint import LogWhereEvaluated, held_out_examples, held_out_part
from sbft.runs.build import prepare_model, training_arguments
from sbft.runs.card import write_card
from sbft.runs.description import describe_data, describe_in_record, new_record
from sbft.runs.failures import failures_recorded
from sbft.runs.interrupt import StopBetweenSteps
from sbft.runs.measurement import measure_and_record, measure_watched
from sbft.runs.output_folder import (
    RunFolder,
    check_nothing_needed_is_removed,
    check_output_folder,
    check_same_recipe,
    checkpoint_to_resume,
)
from sbft.runs.prepare import Prepared, evaluation_rows, prepare
from sbft.runs.processes import as_launched
from sbft.runs.ranks import check_agreed
from sbft.runs.record import RunRecord
from sbft.runs.session import Say, Session, train
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.batches.packing_probe import refuse_leaking_rows
from sbft.training.checkpointing.checkpoints import describe_damage, go_back_to
from sbft.training.checkpointing.saving import saved_whole
from sbft.training.checkpointing.trial_save import describe_unsaved, save_all_that_can_be
from sbft.training.generation_config import settle_generation
from sbft.training.trainer import SmallBatchTrainer

PREDICTIONS_FILE = "predictions.jsonl"
_BEST_BY_EVALUATION = (
    "the best checkpoint is chosen on the data that the result is reported on, which makes the result look better than "
    "it is. Set data.validation or data.validation_size to choose it on other data"
)


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
        SbftError: if the run cannot start, or ended early: out of memory, interrupted, no finite loss.
    """
    return run_resolved(resolve(recipe), resume=resume, overwrite=overwrite, callbacks=callbacks, say=say)


def run_resolved(
    recipe: Recipe, *, resume: bool, overwrite: bool, callbacks: Iterable[TrainerCallback], say: Say
) -> RunRecord:
    """As `run`, for a recipe that `resolve` has checked and completed."""
    begun = time.perf_counter()
    recipe, sharding = as_launched(recipe)
    folder = Path(str(recipe.output_dir))
    checkpoint, damaged = _check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    record = new_record(recipe)
    arguments = training_arguments(recipe, folder)
    check_agreed(checkpoint)
    output = RunFolder(folder, resume, main=arguments.process_index == 0)
    if checkpoint is not None and damaged:
        say(f"Warning: {describe_damage(damaged, checkpoint)}")
    if sharding is not None:
        say(sharding)
    prepared = _prepare(recipe, arguments, record, say)
    with failures_recorded(recipe, record, output) as stage, _timed(record, begun):
        model = _load_model(prepared, record, output, say)
        stop = StopBetweenSteps()
        trainer = _make_trainer(prepared, model, [*callbacks, stop, LogWhereEvaluated()])
        describe_in_record(record, prepared, model)
        former = _continue_record(record, folder) if resume else None
        session = Session(prepared, output, record, stage, model, trainer, stop, checkpoint, former, say)
        _open_folder(session, damaged)
        _measure_untrained(session)
        train(session)
        _keep_model(session)
        _measure_trained(session)
        if output.main and recipe.save_model:
            write_card(record, folder)
        record.status, record.error = "ok", None
    output.save(record)
    return record


def _check_folder(
    folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool
) -> tuple[Path | None, dict[Path, str]]:
    """Refuse a folder that the run may not write to; the checkpoint to resume from, and what is wrong with newer ones."""
    check_output_folder(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        check_nothing_needed_is_removed(folder, recipe)
    if not resume:
        return None, {}
    check_same_recipe(folder, recipe)
    return checkpoint_to_resume(folder)


def _prepare(recipe: Recipe, arguments: SmallBatchTrainingArguments, record: RunRecord, say: Say) -> Prepared:
    """Read the data, and find what can be found before the model is loaded; the predicted peak goes into the record."""
    check_model(recipe.model)
    say(f"Reading {recipe.data.train}")
    prepared = prepare(recipe, arguments, say)
    part = held_out_part(prepared)
    arguments.per_device_eval_batch_size = recipe.evaluation.batch_size
    say(describe_data(prepared))
    findings = refuse_errors(find_in_model(prepared, BEFORE_LOADING))
    prediction, memory_finding = expected_memory(prepared)
    for line in warnings_in_brief(prepared, memory_finding, *findings):
        say(line)
    if part == "eval" and arguments.load_best_model_at_end:
        say(f"Warning: {_BEST_BY_EVALUATION}")
    _decide_streamed_layers(arguments, recipe, prediction, say)
    if prediction is not None:
        record.memory["predicted_peak"] = prediction.peak_bytes
        record.memory["predicted_above_baseline"] = prediction.above_model_bytes
    return prepared


def _decide_streamed_layers(
    arguments: SmallBatchTrainingArguments, recipe: Recipe, prediction: Prediction | None, say: Say
) -> None:
    """Stream as many layers as the prediction does, where the recipe leaves their number to it."""
    offload = recipe.offloaded
    if offload is None or offload.layers != "auto" or prediction is None:
        return
    if prediction.streaming is None:
        arguments.offload = None
        say("All layers fit on the device: none is streamed")
        return
    arguments.offload = {"layers": prediction.streaming.layers, "activations": offload.activations}
    say(f"Layers streamed from the host's memory: {prediction.streaming.layers}")


@contextmanager
def _timed(record: RunRecord, begun: float) -> Iterator[None]:
    """Add the seconds since `begun` to those of the record's earlier sessions, however this one ends."""
    try:
        yield
    finally:
        record.total_s = (record.total_s or 0.0) + time.perf_counter() - begun


def _load_model(prepared: Prepared, record: RunRecord, output: RunFolder, say: Say) -> PreTrainedModel:
    """The model, trainable. A method that this machine cannot run is a result, and is left as one in the folder."""
    recipe = prepared.recipe
    say(f"{'Making' if is_scratch(recipe.model) else 'Loading'} {recipe.model}")
    try:
        return prepare_model(recipe, prepared.tokenizer)
    except MissingPackageError:
        record.status = "unsupported"
        if not output.resume:
            output.begin(recipe)
        raise


def _make_trainer(
    prepared: Prepared, model: PreTrainedModel, callbacks: list[TrainerCallback]
) -> SmallBatchTrainer:
    """The trainer, after a look at whether model and data can be trained and saved as the recipe says."""
    recipe, arguments, tokenizer = prepared.recipe, prepared.arguments, prepared.tokenizer
    trainer = SmallBatchTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        eval_dataset=held_out_examples(prepared, held_out_part(prepared)),
        data_collator=collate_windows if prepared.pretrains else Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.data.packing:
        refuse_leaking_rows(model, arguments.per_device_train_batch_size)
    settle_generation(model, tokenizer, answer_ends(prepared), say=trainer.warn_once)
    if recipe.save_model or arguments.save_strategy != SaveStrategy.NO:
        trainer.try_saving()
    return trainer


def _continue_record(record: RunRecord, folder: Path) -> RunRecord | None:
    """Take over the times and the untrained model's metrics of the session that is resumed; its record, if it left one."""
    try:
        former = RunRecord.load(folder)
    except FileNotFoundError:
        return None
    record.metrics_before, record.train_s, record.total_s = former.metrics_before, former.train_s, former.total_s
    record.watched = former.watched
    return former


def _open_folder(session: Session, damaged: dict[Path, str]) -> None:
    """Take possession of the output folder; from here on the run leaves a record."""
    session.output.begin(session.prepared.recipe)
    if session.checkpoint is not None and session.output.main:
        go_back_to(session.checkpoint, damaged)
    session.output.save(session.record)


def _measure_untrained(session: Session) -> None:
    """Measure the model before training, unless the recipe skips it or an earlier session has done it.

    What is watched is always measured: otherwise nothing could be said of what is forgotten.
    """
    prepared, record = session.prepared, session.record
    own = evaluation_rows(prepared.splits) is not None and prepared.recipe.evaluation.before and not record.metrics_before
    watched = any("metrics_before" not in record.watched.get(name, {}) for name in prepared.watched)
    if not (own or watched):
        return
    session.say("Measuring the untrained model")
    session.stage.evaluating = True
    if own:
        record.metrics_before = measure_and_record(prepared, session.model, record)
    measure_watched(prepared, session.model, record, "metrics_before")
    session.stage.evaluating = False
    session.output.save(record)


def _keep_model(session: Session) -> None:
    """Save the trained model before anything is measured: what goes wrong there must not cost hours of training."""
    prepared, output, record, trainer = session.prepared, session.output, session.record, session.trainer
    recipe, folder = prepared.recipe, output.folder
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best is not None:
        session.say(f"The model of {Path(best).name} is kept: its loss on the {held_out_part(prepared)} data was the lowest")
    if recipe.save_model and not output.main and recipe.distributed is not None:
        session.model.save_pretrained(folder, is_main_process=False)  # every process holds a shard of each weight
    elif output.main and recipe.save_model:
        session.stage.trained = True
        with trainer.own_cache_setting():
            _save(session.model, prepared, folder)
        record.saved_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    session.stage.trained, session.stage.kept = True, recipe.save_model
    output.save(record)


def _save(model: PreTrainedModel, prepared: Prepared, folder: Path) -> None:
    quantization = METHODS[prepared.recipe.method].quantization
    with saved_whole(folder) as part:
        unsaved = save_all_that_can_be(model, prepared.tokenizer, part)
        if quantization is not None:
            write_note(part, quantization)
    if unsaved:
        raise describe_unsaved(unsaved, folder) from next(iter(unsaved.values()))


def _measure_trained(session: Session) -> None:
    """Measure the model after training, if there is anything to measure it on, and keep its answers."""
    prepared, output, record = session.prepared, session.output, session.record
    own = evaluation_rows(prepared.splits) is not None
    if not own and not prepared.watched:
        return
    if session.stop.requested:
        raise KeyboardInterrupt(session.stop.signal)  # the signal came during the last step
    session.say("Measuring the trained model")
    session.stage.evaluating = True
    if own:
        predictions = output.folder / PREDICTIONS_FILE if output.main else None
        record.metrics = measure_and_record(prepared, session.model, record, predictions)
    measure_watched(prepared, session.model, record, "metrics")
    session.stage.evaluating = False
