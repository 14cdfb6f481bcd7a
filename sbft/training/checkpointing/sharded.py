"""Checkpoints of a model that is sharded over processes: every rank writes its part, and any number of ranks can resume.

The parts are safetensors files of `torch.distributed.checkpoint`. Those of the weights are in the checkpoint's folder, where
transformers' `from_pretrained` can load them, and those of the optimizer's state are in `optimizer`. No tensor is gathered in
one process, neither for writing nor for reading. A checkpoint of whole tensors can be resumed too.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from sbft.errors import ModelError
from sbft.models.tensor_files import PARTS, TensorFiles, write_shards
from sbft.optim.base import TokenOptimizer
from sbft.optim.sharding import in_order_of, is_sharded, local, without_strides, zeros_beside
from sbft.training.arguments import SmallBatchArguments
from sbft.training.checkpointing.saving import saved_whole
from sbft.training.model_state import shard_again
from sbft.training.token_optimizers import inner_optimizer

if torch.distributed.is_available():
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

OPTIMIZER_FOLDER = "optimizer"
# While a file is written, memory holds a second copy of it.
FILE_BYTES = 2**31

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def in_parts(checkpoint: Path) -> bool:
    """Whether the weights of a checkpoint are parts that several ranks have written."""
    return any(checkpoint.glob(PARTS))


def write_parts(tensors: Mapping[str, Tensor], folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Write every rank's part of tensors to a folder, and wait until it is on the disk. All ranks have to call this.

    Args:
        tensors: by names, which are the same on all ranks. A plain tensor, which all ranks have, is written by one of them.
        folder: to write to.
        file_bytes: most bytes in one file, unless a single part is larger.

    Raises:
        Exception: on all ranks, the error that one of them got from the disk.
    """
    writer = HuggingFaceStorageWriter(str(folder), _files(tensors, file_bytes), save_distributed=True)
    try:
        dcp.save({name: without_strides(tensor.detach()) for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        raise _cause(error) from error


def read_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors in place from safetensors files that hold them whole or in parts. All ranks have to call this.

    Raises:
        Exception: on all ranks, the error that one of them got.
    """
    alone = not torch.distributed.is_initialized()
    read = {name: without_strides(tensor.detach()) for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read a checkpoint of several
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(read, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise _cause(error) from error
    with torch.no_grad():
        for name, tensor in tensors.items():
            if local(read[name]).data_ptr() != local(tensor).data_ptr():
                local(tensor).copy_(local(in_order_of(read[name], tensor)))


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Shapes of the whole tensors in the safetensors files of a folder, by name. Only the headers are read."""
    stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: metadata.size for name, metadata in stored.items()}


def save_weights(model: PreTrainedModel, folder: Path, *, main: bool) -> None:
    """Write a model's config and every rank's part of its weights."""
    shard_again(model)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    write_parts(model.state_dict(), folder)
    if main:  # last, because it may fail, and the others wait for this process until the weights are written
        model.config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read every rank's part of a model's weights from a checkpoint that holds them whole or in parts.

    Raises:
        ModelError: if the files lack a weight.
    """
    shard_again(model)
    stored = stored_shapes(folder)
    tensors, missing = {}, []
    for names, tensor in _by_tensor(model):
        name = next((name for name in names if name in stored), None)
        if name is not None:
            tensors[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            missing.append(names[0])
    if missing:
        raise ModelError(
            f"The checkpoint {folder} lacks {len(missing)} of the model's weights, the first {min(missing)}."
        )
    read_parts(tensors, folder)


def save_states(model: nn.Module, optimizer: TokenOptimizer, scheduler: Any, folder: Path, *, main: bool) -> None:
    """Write every rank's part of an optimizer's state; the main process adds its settings, its clock and the scheduler."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    if tensors:
        write_parts(tensors, folder / OPTIMIZER_FOLDER)
    if main:
        torch.save({**optimizer.state_dict(), "state": {}}, folder / OPTIMIZER_NAME)
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_states(model: nn.Module, optimizer: TokenOptimizer, scheduler: Any, folder: Path) -> None:
    """Read every rank's part of what `save_states` has written, with any number of ranks."""
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER_NAME, weights_only=True))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
    if not (folder / OPTIMIZER_FOLDER).is_dir():
        return
    stored: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, shape in stored_shapes(folder / OPTIMIZER_FOLDER).items():
        of, _, key = name.rpartition(".")
        stored[of][key] = shape
    tensors = {}
    for name, parameter in model.named_parameters():
        if name not in stored:
            continue
        made = optimizer.new_state(parameter)
        for key, shape in stored[name].items():
            # An average that the current settings do not have.
            value = (
                made[key]
                if key in made
                else zeros_beside(parameter)
                if shape == parameter.shape
                else torch.zeros(shape)
            )
            tensors[f"{name}.{key}"] = optimizer.state[parameter][key] = value
    read_parts(tensors, folder / OPTIMIZER_FOLDER)


class ShardedCheckpoints(_Base):
    """Put between `WholeCheckpoints` and a `Trainer`: checkpoints of a sharded model hold the parts of every rank."""

    args: Any
    model: Any
    push_in_progress: Any
    _writing: bool

    @property
    def _is_sharded(self) -> bool:
        """Whether the model has weights that are sharded over several processes."""
        return any(is_sharded(parameter) for parameter in self.model.parameters())

    @property
    def _trains_shards(self) -> bool:
        """Whether weights that are trained are sharded; an adapter on a sharded model is not."""
        return trains_shards(self.model)

    @property
    def _token_optimizer(self) -> TokenOptimizer | None:
        optimizer = inner_optimizer(self.optimizer)
        return optimizer if isinstance(optimizer, TokenOptimizer) else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`, which would gather the weights of a sharded model in one process."""
        if not (self._writing and self._trains_shards and isinstance(self.model, PreTrainedModel)):
            super()._save(output_dir, state_dict)
            return
        folder, main = Path(str(output_dir)), self.args.should_save
        save_weights(self.model, folder, main=main)
        if main:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in `Trainer`, which writes one rank's part of a sharded optimizer's state."""
        optimizer = self._token_optimizer
        if optimizer is None or not self._trains_shards:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_states(self.model, optimizer, self.lr_scheduler, Path(output_dir), main=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `Trainer`, which can neither load into a sharded model nor read the checkpoint of one."""
        if self._trains_shards or in_parts(Path(resume_from_checkpoint)):
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which expects whole weights in a checkpoint: they are put together from the parts.

        Raises:
            DiskError: if there is no space for them beside the checkpoint.
        """
        if self._pushes_now() and in_parts(Path(checkpoint_folder)):
            with saved_whole(Path(str(self.args.output_dir))) as folder:
                write_shards(TensorFiles(Path(checkpoint_folder)), folder, None, FILE_BYTES)
        super()._push_from_checkpoint(checkpoint_folder)

    def _pushes_now(self) -> bool:
        """Whether this rank pushes, and `Trainer` will not skip this push because the one before is not done."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return False
        return self.args.hub_always_push or self.push_in_progress is None or bool(self.push_in_progress.is_done())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`; from parts that several ranks have written, each rank reads its own."""
        optimizer = self._token_optimizer
        if checkpoint is None or optimizer is None or not in_parts(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif (Path(checkpoint) / OPTIMIZER_NAME).is_file():  # `save_only_model` leaves it out
            load_states(self.model, optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_best_model(self) -> None:
        """As in `Trainer`, which can neither load into a sharded model nor read the checkpoint of one."""
        best = Path(str(self.state.best_model_checkpoint))
        if self._trains_shards or in_parts(best):
            load_weights(self.model, best)
        else:
            super()._load_best_model()


@contextmanager
def sharded_checkpoints_allowed(passed: Iterable[Any]) -> Iterator[None]:
    """Around a trainer's `__init__`: let it accept arguments that save checkpoints of a model that is already sharded.

    `Trainer` refuses them, because it cannot save the optimizer's state of such a model. `ShardedCheckpoints` can save that of
    a token optimizer, and `Trainer` itself that of any optimizer which has none of the sharded weights.

    Args:
        passed: what the trainer is called with.
    """
    passed = list(passed)
    arguments = next((value for value in passed if isinstance(value, SmallBatchArguments)), None)
    model = next((value for value in passed if isinstance(value, nn.Module)), None)
    is_adapter = model is not None and any(map(is_sharded, model.parameters())) and not trains_shards(model)
    if arguments is None or (arguments.token_optimizer is None and not is_adapter):
        yield
        return
    settings: Any = arguments
    before, settings.save_only_model = settings.save_only_model, True
    try:
        yield
    finally:
        settings.save_only_model = before


def trains_shards(model: nn.Module) -> bool:
    """Whether a model has trained weights that are sharded over several processes."""
    return any(is_sharded(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _by_tensor(model: nn.Module) -> Iterable[tuple[list[str], Tensor]]:
    """The tensors of a model's state, each with all its names: tied ones have several."""
    names: dict[int, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    return [(shared, state[shared[0]]) for shared in names.values()]


def _files(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, int]:
    """For each tensor the number of its file, from 1; this rank's parts fill the files one after the other."""
    number, filled = 1, 0
    files = {}
    for name, tensor in tensors.items():
        part_bytes = local(tensor).nbytes
        if filled and filled + part_bytes > file_bytes:
            number, filled = number + 1, 0
        files[name] = number
        filled += part_bytes
    return files


def _cause(error: CheckpointException) -> BaseException:
    """The error of a rank. torch wraps it into a BaseException, which `except Exception` does not catch."""
    return next(iter(error.failures.values()))[0]
