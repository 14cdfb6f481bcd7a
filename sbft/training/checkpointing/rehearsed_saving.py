"""A trainer that finds out before its first step what could not be saved, and whose weights are saved whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from sbft.training.checkpointing.disk_errors import writing
from sbft.training.checkpointing.rehearsal import (
    SavingError,
    describe_unsaved,
    raise_if_nothing_can_be_saved,
    rehearse_saving,
    save_all_that_can_be,
    save_configs,
    save_generation_of_adapter,
)
from sbft.training.generation_config import settle_generation

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Callable

    _Base = Trainer
else:
    _Base = object


class RehearsedSaving(_Base):
    """Put before `WholeCheckpoints`: `train` begins with a rehearsal of the save, and no save loses the weights."""

    args: Any
    model: Any
    _is_sharded: bool
    _trains_shards: bool
    _writing: bool
    _together: Callable[..., list[Any]]
    warn_once: Callable[[str], None]
    _rehearsed: tuple[Any, Any] | None = None
    _within_checkpoint = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unsaved: dict[str, Exception] = {}
        # `Trainer` turns the cache off for training, in the outermost config alone, and would save it so.
        self._caches = _cache_settings((*args, *kwargs.values()))
        super().__init__(*args, **kwargs)
        if any(isinstance(one, str) for one in (*args[:1], kwargs.get("model"))):  # TRL's trainers load it by its name
            self._caches = _cache_settings_as_saved(self.model)
        self._set_caches(off=True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, once all that belongs to a checkpoint has been saved for a trial.

        Raises:
            SavingError: if some of it cannot be saved, and checkpoints are wanted; else that is a warning.
        """
        if self.model is not None:  # as it is not between the trials of a search, of which each makes its own
            self._rehearse_for_training()
        return super().train(*args, **kwargs)

    def _rehearse_for_training(self) -> None:
        saves = self.args.save_strategy != SaveStrategy.NO
        try:
            self.rehearse_saving(Path(str(self.args.output_dir)) if saves else None)
        except SavingError as error:
            if saves:
                raise
            logger.warning(f"save_model() will fail: {error}")

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in `Trainer`; the model of each training is one that can be saved, as the first is made by `train`."""
        model: nn.Module = super().call_model_init(*args, **kwargs)
        if self._rehearsed is not None:
            settle_generation(model, self.processing_class, say=self.warn_once)
        return model

    def rehearse_saving(self, folder: Path | None = None) -> None:
        """Save all but the weights for a trial, after the generation config was repaired; once for a model.

        Args:
            folder: where checkpoints will be written; None: it is not looked at.

        Raises:
            SavingError: if something cannot be saved.
            DiskError: if the folder cannot be written to.
        """
        processor = self.processing_class
        if self._rehearsed is not None and all(map(_is, self._rehearsed, (self.model, processor))):
            return
        settle_generation(self.model, processor, say=self.warn_once)
        self._together(lambda: self._rehearse(folder) if self.args.should_save else None)
        self._rehearsed = (self.model, processor)

    def _rehearse(self, folder: Path | None) -> None:
        if folder is None:
            rehearse_saving(self.model, self.processing_class, self.args)
            return
        with writing("A trial save", folder):
            rehearse_saving(self.model, self.processing_class, self.args, folder)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; what cannot be saved is raised when all else is.

        Raises:
            SavingError: if something beside the weights could not be saved.
        """
        super().save_model(output_dir, *args, **kwargs)
        if not self._within_checkpoint and self._unsaved:  # maybe one process alone was asked to
            raise self._taken(self._folder(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in `Trainer`; where it fails, whatever can be saved is, and the error waits until all is written."""
        try:
            with self.own_cache_setting():
                super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_generation_of_adapter(self.model, self._folder(output_dir))
        except Exception as error:
            raise_if_nothing_can_be_saved(error)
            in_parts = self._writing and self._trains_shards  # every process has written its part by now
            if not self.args.should_save or (self._is_sharded and not in_parts):
                raise
            folder = self._folder(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            what = (self.model, self.processing_class, folder, self.args)
            unsaved = save_configs(*what) if in_parts else save_all_that_can_be(*what, state_dict=state_dict)
            self._unsaved = unsaved or {"The model": error}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; a checkpoint that lacks something beside weights and optimizer is whole for resuming."""
        self._within_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._within_checkpoint = False
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=None)) / name

        def act() -> None:
            if self._unsaved:
                raise self._taken(folder)

        self._together(act)  # on all processes, or the others would wait for one that has raised

    @contextmanager
    def own_cache_setting(self) -> Iterator[None]:
        """Around a save: whether the model keeps keys and values is what it was before training."""
        self._set_caches(off=False)
        try:
            yield
        finally:
            self._set_caches(off=True)

    def _set_caches(self, *, off: bool) -> None:
        for config, own in self._caches:
            config.use_cache = self.args.use_cache if off else own

    def _folder(self, output_dir: str | None) -> Path:
        return Path(str(self.args.output_dir if output_dir is None else output_dir))

    def _taken(self, folder: Path) -> SavingError:
        unsaved, self._unsaved = self._unsaved, {}
        error = describe_unsaved(unsaved, folder)
        error.__cause__ = next(iter(unsaved.values()))
        return error


def _cache_settings(given: Iterable[Any]) -> list[tuple[PreTrainedConfig, bool]]:
    """`use_cache` of a model's configs: that of its text too, where it has one of its own."""
    model = next((one for one in given if isinstance(one, nn.Module)), None)
    config = getattr(model, "config", None)  # any module can be trained; an adapter hands on that of its model
    return _settings(config) if isinstance(config, PreTrainedConfig) else []


def _settings(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, bool]]:
    text = config.get_text_config()
    configs = [config] if text is config else [config, text]
    return [(one, one.use_cache) for one in configs if "use_cache" in vars(one)]


def _cache_settings_as_saved(model: Any) -> list[tuple[PreTrainedConfig, bool]]:
    """The same of a model that the trainer has loaded, from the files that it was loaded from."""
    now = _cache_settings([model])
    if not now:
        return []
    config = now[0][0]
    try:
        saved = type(config).from_pretrained(str(config.name_or_path), local_files_only=True)
    except OSError:  # gone since: what is saved then is what training set
        return now
    return [(one, was) for (one, _), (_, was) in zip(now, _settings(saved), strict=False)]


def _is(one: Any, other: Any) -> bool:
    return one is other
