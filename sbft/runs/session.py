"""One session of a run: its training loop, and what the loop costs.

A run that is interrupted and resumed has several sessions. Its record sums them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sbft.errors import Interrupted
from sbft.native.memory import PeakMemory, optimizer_state_bytes
from sbft.native.memory_pool import pool_bytes
from sbft.runs.failures import Stage, resume_command
from sbft.runs.interrupt import StopBetweenSteps
from sbft.runs.output_folder import RunFolder
from sbft.runs.prepare import Prepared
from sbft.runs.record import RunRecord, quantiles
from sbft.training.checkpointing.checkpoints import find_checkpoint
from sbft.training.trainer import SmallBatchTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What the phases of a run share, from the loaded model to the record."""

    prepared: Prepared
    output: RunFolder
    record: RunRecord
    stage: Stage
    model: PreTrainedModel
    trainer: SmallBatchTrainer
    stop: StopBetweenSteps
    checkpoint: Path | None
    """Where training resumes; None if it starts from the beginning."""
    former: RunRecord | None
    """The record that the previous session left."""
    say: Say


def train(session: Session) -> None:
    """Train to the last step; where the checkpoint is that of the last step, only load it.

    Raises:
        Interrupted: if somebody stopped the run between two steps; a checkpoint is in the output folder.
    """
    checkpoint = session.checkpoint
    if checkpoint is not None and _all_steps_done(session.trainer, checkpoint):
        session.say(f"All steps are done in {checkpoint}")
        _take_over(session, checkpoint)
    else:
        session.say("Training")
        _train(session)


def _train(session: Session) -> None:
    trainer, stop, record, checkpoint = session.trainer, session.stop, session.record, session.checkpoint
    begin = time.perf_counter()
    peak = PeakMemory(trainer.args.device)
    try:
        with peak, stop:
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception:
        # The trainer clears this flag once the evaluation is done, so here it is set if the evaluation failed.
        session.stage.evaluating = session.stage.within_training = trainer.control.should_evaluate
        raise
    finally:
        _record_loop(session, peak, time.perf_counter() - begin)
    # The trainer's figure is the mean over this session's steps; the losses of earlier sessions are not kept.
    record.train_loss = None if checkpoint is not None else outcome.training_loss
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            stop.signal,
            f" after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in "
            f"{find_checkpoint(session.output.folder)}. To resume, type: {resume_command(record, session.output)}",
        )


def _record_loop(session: Session, peak: PeakMemory, elapsed_s: float) -> None:
    """Record what the training loop has cost, whether or not it came to its end."""
    trainer, record = session.trainer, session.record
    record.train_s = (record.train_s or 0.0) + elapsed_s
    record.steps = trainer.state.global_step
    record.peak_memory_bytes, record.memory_kind = peak.peak_bytes, peak.kind
    record.memory["baseline"] = peak.baseline_bytes
    # With a `note` the peak could not be reset: it is that of the whole process and says nothing about the loop.
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
    record.tokens_per_s = trainer.tokens_of_this_session / elapsed_s
    record.history = _history(trainer.state)
    if session.former is not None:
        _keep_the_higher_peak(record, session.former)


def _all_steps_done(trainer: SmallBatchTrainer, checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step; resumed from it, the trainer's loop would make one more."""
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= max_steps


def _take_over(session: Session, checkpoint: Path) -> None:
    """Load the weights of a finished training, and copy what the previous session has measured of it."""
    trainer, record, former = session.trainer, session.record, session.former
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
    """The logged steps, also those before a resumed checkpoint; `eval_loss` where held-out data was measured."""
    names = {"step": "step", "tokens": "tokens_seen", "loss": "loss", "learning_rate": "learning_rate"}
    history = [{name: entry[key] for name, key in names.items()} for entry in state.log_history if "loss" in entry]
    measured = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    for entry in history:
        if entry["step"] in measured:
            entry["eval_loss"] = measured[entry["step"]]
    return history


def _keep_the_higher_peak(record: RunRecord, former: RunRecord) -> None:
    """The peak of a resumed run is the highest of its sessions, together with the figures that belong to it."""
    if former.memory_kind == record.memory_kind and (former.peak_memory_bytes or 0) > (record.peak_memory_bytes or 0):
        record.peak_memory_bytes = former.peak_memory_bytes
        for part in ("baseline", "above_baseline", "reserved_peak"):
            record.memory[part] = former.memory.get(part)
