"""Saving that loses no weights: a trial save before the first step, and partial saves if a part fails."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from sbft.training.checkpointing.disk_errors import writing
from sbft.training.checkpointing.trial_save import (
    SavingError,
    describe_unsaved,
    raise_if_nothing_can_be_saved,
    save_all_that_can_be,
    save_configs,
    save_generation_of_adapter,
    try_saving,
)
from sbft.training.generation_config import settle_generation

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Callable

    _Base = Trainer
else:
    _Base = object


class FailSafeSaving(_Base):
    """Put before `WholeCheckpoints`: `train` starts with a trial save, and if a part cannot be saved, the weights still are."""

    args: Any
    model: Any
    _is_sharded: bool
    _trains_shards: bool
    _writing: bool
    _together: Callable[..., list[Any]]
    warn_once: Callable[[str], None]
    _tried_with: tuple[Any, Any] | None = None
    _within_checkpoint = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unsaved: dict[str, Exception] = {}
        # `Trainer` turns the cache off for training, in the outermost config only, and would save that setting.
        self._caches = _cache_settings((*args, *kwargs.values()))
        super().__init__(*args, **kwargs)
        if any(isinstance(model, str) for model in (*args[:1], kwargs.get("model"))):  # TRL's trainers load it by name
            self._caches = _cache_settings_as_saved(self.model)
        self._set_caches(off=True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, after a trial save of everything that belongs to a checkpoint.

        Raises:
            SavingError: if a part cannot be saved and the arguments ask for checkpoints; without checkpoints it is a warning.
        """
        if self.model is not None:  # None between the trials of a search, each of which makes its own
            self._try_saving_before_training()
        return super().train(*args, **kwargs)

    def _try_saving_before_training(self) -> None:
        saves = self.args.save_strategy != SaveStrategy.NO
        try:
            self.try_saving(Path(str(self.args.output_dir)) if saves else None)
        except SavingError as error:
            if saves:
                raise
            logger.warning(f"save_model() will fail: {error}")

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in `Trainer`; the generation config of each new model is repaired as that of the first one is."""
        model: nn.Module = super().call_model_init(*args, **kwargs)
        if self._tried_with is not None:
            settle_generation(model, self.processing_class, say=self.warn_once)
        return model

    def try_saving(self, folder: Path | None = None) -> None:
        """Repair the generation config and make a trial save without the weights; once for each model.

        Args:
            folder: where checkpoints will be written; None: it is not tried.

        Raises:
            SavingError: if a part cannot be saved.
            DiskError: if the folder cannot be written to.
        """
        processor = self.processing_class
        if self._tried_with is not None and all(map(operator.is_, self._tried_with, (self.model, processor))):
            return
        settle_generation(self.model, processor, say=self.warn_once)
        self._together(lambda: self._try_saving(folder) if self.args.should_save else None)
        self._tried_with = (self.model, processor)

    def _try_saving(self, folder: Path | None) -> None:
        if folder is None:
            try_saving(self.model, self.processing_class, self.args)
            return
        with writing("A trial save", folder):
            try_saving(self.model, self.processing_class, self.args, folder)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; an error is raised only after everything that can be saved is saved.

        Raises:
            SavingError: if a part other than the weights could not be saved.
        """
        super().save_model(output_dir, *args, **kwargs)
        if not self._within_checkpoint and self._unsaved:  # perhaps on one process only
            raise self._pop_saving_error(self._folder(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in `Trainer`; if it fails, everything that can be saved is saved, and the error is kept for later."""
        try:
            with self.own_cache_setting():
                super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_generation_of_adapter(self.model, self._folder(output_dir))
        except Exception as error:
            raise_if_nothing_can_be_saved(error)
            in_parts = self._writing and self._trains_shards  # then every process has already written its part
            if not self.args.should_save or (self._is_sharded and not in_parts):
                raise
            folder = self._folder(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            parts = (self.model, self.processing_class, folder, self.args)
            unsaved = save_configs(*parts) if in_parts else save_all_that_can_be(*parts, state_dict=state_dict)
            self._unsaved = unsaved or {"The model": error}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; if a part other than weights and optimizer fails, the checkpoint can still be resumed.

        Raises:
            SavingError: after such a checkpoint was written.
        """
        self._within_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._within_checkpoint = False
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=None)) / name

        def raise_if_unsaved() -> None:
            if self._unsaved:
                raise self._pop_saving_error(folder)

        self._together(raise_if_unsaved)  # on all processes, since the others would wait for one that has raised

    @contextmanager
    def own_cache_setting(self) -> Iterator[None]:
        """Around a save: set `use_cache` to what it was before training."""
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

    def _pop_saving_error(self, folder: Path) -> SavingError:
        unsaved, self._unsaved = self._unsaved, {}
        error = describe_unsaved(unsaved, folder)
        error.__cause__ = next(iter(unsaved.values()))
        return error


def _cache_settings(passed: Iterable[Any]) -> list[tuple[PreTrainedConfig, bool]]:
    """`use_cache` of a model's config, and of its text config if that is another one."""
    model = next((value for value in passed if isinstance(value, nn.Module)), None)
    config = getattr(model, "config", None)  # any module can be trained; an adapter passes on the config of its model
    return _settings(config) if isinstance(config, PreTrainedConfig) else []


def _settings(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, bool]]:
    text = config.get_text_config()
    configs = [config] if text is config else [config, text]
    return [(config, config.use_cache) for config in configs if "use_cache" in vars(config)]


def _cache_settings_as_saved(model: Any) -> list[tuple[PreTrainedConfig, bool]]:
    """The same for a model that the trainer has loaded: its configs, with the settings in the files it was loaded from."""
    now = _cache_settings([model])
    if not now:
        return []
    config = now[0][0]
    try:
        saved = type(config).from_pretrained(str(config.name_or_path), local_files_only=True)
    except OSError:  # the files are gone: the setting of training is saved
        return now
    return [(config, own) for (config, _), (_, own) in zip(now, _settings(saved), strict=False)]
