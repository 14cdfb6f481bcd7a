"""How a recipe is spread over the processes that were started for it, and what `accelerate launch` asks of them."""

from __future__ import annotations

import os

from sbft.errors import RecipeError
from sbft.recipe import Recipe, resolve
from sbft.recipe.schema import DistributedConfig

_USES_FSDP = "ACCELERATE_USE_FSDP"
# Otherwise transformers loads the weights only on rank 0, for accelerate to shard.
_LOADS_ON_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_OTHER_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "Set it to false: the weights stay on the device"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "Set it to false, and write training.gradient_checkpointing: true into the recipe",
    ),
}
# Set by torchrun, and by those MPIs whose variables accelerate reads.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def over_processes(recipe: Recipe, processes: int) -> tuple[Recipe, str | None]:
    """A resolved recipe as several processes can train it, and a sentence on what that changes, if anything.

    With gradient release, and without `distributed`, the model is sharded: replicas would need all gradients at the same
    time, to average them.

    Raises:
        RecipeError: if that is not possible.
    """
    if processes == 1:
        return recipe, None
    if recipe.batch_schedule is not None:
        raise RecipeError(
            f"The recipe has a batch_schedule, which works in one process only, and {processes} are asked for. Leave one of "
            "them out."
        )
    if recipe.distributed is not None or not recipe.optimizer.gradient_release:
        return recipe, None
    released = "gradients are released in backward, before replicas could average them"
    try:
        sharded = _sharded(recipe, processes)
    except RecipeError as error:
        raise RecipeError(
            f"{processes} processes are asked for, but {released}, and {recipe.model} cannot be sharded with method "
            f"{recipe.method}. Add --set optimizer.gradient_release=false to replicate it, or train in one process."
        ) from error
    return sharded, (
        f"The model is sharded over {processes} processes (distributed.fsdp_size={processes}): {released}. To replicate it, "
        "add --set optimizer.gradient_release=false"
    )


def _sharded(recipe: Recipe, processes: int) -> Recipe:
    return resolve(recipe.model_copy(update={"distributed": DistributedConfig(fsdp_size=processes)}))


def as_launched(recipe: Recipe) -> tuple[Recipe, str | None]:
    """A resolved recipe for the processes that were started, and a sentence on what that changes, if anything.

    accelerate's launch config comes first, then `over_processes`. accelerate would shard the model when training begins, and
    only on GPUs. The recipe's `distributed` shards it while it is loaded, on any device. So FSDP in the launch config becomes
    `distributed`, and is removed from this process's environment.

    Raises:
        RecipeError: if the launch config asks for what sbft does not support, or the recipe's method cannot be sharded.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which accelerate launch always sets
        return over_processes(recipe, processes)
    for variable, engine in _OTHER_ENGINES.items():
        if _is_on(variable):
            raise RecipeError(
                f"accelerate's launch config asks for {engine}, which sbft does not support. Use a config without it, "
                "and write distributed.fsdp_size into the recipe to shard the model."
            )
    if "MASTER_ADDR" in os.environ and not any(variable in os.environ for variable in _WORLD_SIZES):
        raise RecipeError(
            "accelerate launch was asked for several processes and has started only one: on CPUs it leaves that to mpirun. "
            "Type: sbft train RECIPE --num-processes N, or: torchrun --nproc-per-node N -m sbft train RECIPE."
        )
    if not _is_on(_USES_FSDP):
        return over_processes(recipe, processes)
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(
            "accelerate's launch config asks for FSDP 1, and sbft supports only FSDP2. Write fsdp_version: 2 into its "
            "fsdp_config, or leave FSDP out of it and write distributed.fsdp_size into the recipe."
        )
    for variable, (setting, instead) in _OTHER_SETTINGS.items():
        if _is_on(variable):
            raise RecipeError(
                f"accelerate's launch config has {setting}: true, which sbft does not support. {instead}."
            )
    os.environ[_USES_FSDP] = os.environ[_LOADS_ON_ONE] = "false"
    if recipe.distributed is not None or processes == 1:
        return recipe, None
    note = f"The model is sharded over {processes} processes, as accelerate's launch config asks"
    return _sharded(recipe, processes), note


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
