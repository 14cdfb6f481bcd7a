"""Contradictions in a recipe: a value given in two ways, and settings that its method does not use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from sbft.errors import how_to_install
from sbft.grid.formats import DTYPES
from sbft.recipe.defaults import EXCLUSIVE, complete
from sbft.recipe.draft import Key
from sbft.recipe.methods import METHODS, Method
from sbft.recipe.pretraining import problems_of_pretraining
from sbft.recipe.schema import SECTIONS
from sbft.recipe.settings import MATRIX_OPTIMIZERS, OPTIMIZERS
from sbft.recipe.training_keys import REPORTERS, reporters

_DEFAULTS = {
    section: {
        name: field.get_default(call_default_factory=True) for name, field in SECTIONS[section].model_fields.items()
    }
    for section in ("data", "evaluation")
}


def given_twice(content: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """Key and message for each pair of settings that exclude each other and are both given."""
    for section, first, second in EXCLUSIVE:
        values = content.get(section, {})
        if values.get(first) is not None and values.get(second) is not None and values.get(first) != -1:
            yield (
                (section, second),
                f"and {section}.{first} are both given, but they set the same thing. Keep one.",
            )
    optimizer = content.get("optimizer", {})
    if optimizer.get("schedule") == "power" and optimizer.get("second_moment_half_life") is not None:
        yield (
            ("optimizer", "second_moment_half_life"),
            "is given, but optimizer.schedule power has no half-life. Leave it out, or write schedule: half_life.",
        )


def contradictions(content: dict[str, Any], name: str) -> Iterator[tuple[Key, str]]:
    """Key and message for each setting that contradicts another one or the recipe's method, called `name`."""
    method = METHODS[name]
    yield from _missing_packages(content, name, method)
    yield from _settings_of_other_optimizers(content.get("optimizer", {}), name, method)
    yield from _settings_of_other_weights(content, name, method)
    yield from _stored_weights(content, name, method)
    yield from _sharding(content, name, method)
    if (schedule := content.get("batch_schedule")) is not None:
        yield from _schedule_contradictions(schedule, content, method)
    yield from problems_of_pretraining(content, _DEFAULTS)
    yield from _offloaded(content, name, method)
    if isinstance(content.get("data", {}).get("train"), str):
        whole = complete(content)
        yield from _release_contradictions(whole, name)
        yield from _unused_first_moment(whole["optimizer"])


def _missing_packages(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    for package in method.missing_packages:
        yield (
            ("method",),
            f"is {name}, which requires the package {package}. " + how_to_install(f"'sbft[{method.packages[package]}]'"),
        )
    for reporter in reporters(content.get("training", {}).get("report_to")):
        reporters_package = REPORTERS.get(reporter)
        if reporters_package is not None and importlib.util.find_spec(reporters_package) is None:
            yield (
                ("training", "report_to"),
                f"is {reporter}, whose package is not installed. Type: pip install {reporters_package}",
            )


def _settings_of_other_optimizers(optimizer: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    for key, value in optimizer.items():
        if value is not None and key not in method.settings:
            users = [other for other in METHODS if key in METHODS[other].settings]
            yield (
                ("optimizer", key),
                f"has no effect on the optimizer of method {name}. Leave it out, or choose a method that uses it: "
                f"{', '.join(users)}.",
            )


def _settings_of_other_weights(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    if content.get("lora") is not None and method.lora_defaults is None:
        yield (
            ("lora",),
            f"is given, but method {name} trains all weights. Leave it out, or write method: lora or method: qlora.",
        )
    if content.get("freeze") and method.lora_defaults is not None:
        whole = [other for other in METHODS if METHODS[other].lora_defaults is None]
        yield (
            ("freeze",),
            f"is given, but method {name} trains an adapter, not the model's own weights. Leave it out, or choose a method "
            f"that trains them: {', '.join(whole)}.",
        )


def _stored_weights(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    weights, dtype = content.get("weights", method.weights), content.get("dtype")
    if weights is None:
        return
    formats = list(weights.values()) if isinstance(weights, dict) else [weights]
    grids = [form for form in formats if form not in DTYPES]
    if isinstance(weights, str) and weights in DTYPES:
        if dtype is not None and dtype != weights:
            yield ("weights",), f"is {weights}, but dtype is {dtype}. Leave dtype out."
        return
    if dtype == "float32" or "float32" in formats:
        yield ("weights",), "has formats of 12 bits or less, which compute in bfloat16. Leave float32 out."
    if grids and method.optimizer not in OPTIMIZERS:
        users = [other for other in METHODS if METHODS[other].optimizer in OPTIMIZERS]
        yield (
            ("weights",),
            f"has the format {grids[0]}, but the optimizer of method {name} cannot update it. Choose a method whose optimizer "
            f"is sbft's own: {', '.join(users)}.",
        )
    if grids and content.get("distributed") is not None:
        yield (
            ("weights",),
            f"has the format {grids[0]}, but distributed shards weights in bfloat16 or float32. Leave out one of them.",
        )


def _sharding(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    sizes = content.get("distributed")
    if sizes is None:
        return
    if method.optimizer in MATRIX_OPTIMIZERS:
        yield (
            ("distributed",),
            f"is given, but method {name} works on whole matrices, which sharding would split. Leave it out, or write method: "
            "sbft.",
        )
    if method.quantization is not None:
        yield (
            ("distributed",),
            f"is given, but method {name} holds the model in 4 bits, which cannot be sharded. Leave it out (--num-processes "
            "then replicates the model), or write method: lora.",
        )
    elif method.lora_defaults is not None:
        if (sizes.get("tp_size") or 1) > 1:
            yield (
                ("distributed", "tp_size"),
                f"is {sizes['tp_size']}, but method {name} trains an adapter, which requires whole matrices. Write fsdp_size "
                "instead, to shard the model under the adapter.",
            )
        if (content.get("lora") or {}).get("dora"):
            yield (
                ("lora", "dora"),
                "is true together with distributed, but DoRA requires the norms of whole matrices. Leave one of them out.",
            )


def _offloaded(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    value = content.get("offload")
    if value is None:
        return
    optimizer, training = content.get("optimizer", {}), content.get("training", {})
    trains_all = method.lora_defaults is None
    if trains_all and method.optimizer not in OPTIMIZERS:
        users = [other for other in METHODS if METHODS[other].lora_defaults or METHODS[other].optimizer in OPTIMIZERS]
        yield (
            ("offload",),
            f"is given, but the optimizer of method {name} updates all weights at once, after backward. Take a method that "
            f"updates layer by layer, or trains an adapter: {', '.join(users)}.",
        )
    elif trains_all and not {**method.optimizer_defaults, **optimizer}.get("gradient_release"):
        yield (
            ("offload",),
            "is given, but a layer can leave the device only when its weights are updated in backward. Write "
            "optimizer.gradient_release: true.",
        )
    if optimizer.get("cuda_graphs"):
        yield (
            ("offload",),
            "is given with optimizer.cuda_graphs, whose graphs hold addresses of weights. Leave one out.",
        )
    if content.get("distributed") is not None:
        yield ("offload",), "is given with distributed, and works in one process. Leave out one of them."
    if training.get("torch_compile"):
        yield (
            ("offload",),
            "is given with training.torch_compile, which traces no hooks on layers. Leave out one of them.",
        )
    checkpoints = any(training.get(f"{what}_checkpointing") for what in ("gradient", "activation"))
    if isinstance(value, dict) and value.get("activations") and not checkpoints:
        yield (
            ("offload",),
            "asks for activations, which are the layers' inputs that checkpointing saves. Write "
            "training.gradient_checkpointing: true.",
        )


def _schedule_contradictions(
    schedule: dict[str, Any], content: dict[str, Any], method: Method
) -> Iterator[tuple[Key, str]]:
    training = {**method.defaults()["training"], **content.get("training", {})}
    first, accumulated = int(training["per_device_train_batch_size"]), int(training["gradient_accumulation_steps"])
    if schedule.get("largest") is not None and int(schedule["largest"]) < first:
        yield (
            ("batch_schedule", "largest"),
            f"is {schedule['largest']}, less than the first batch, training.per_device_train_batch_size {first}.",
        )
    if accumulated > 1:
        yield (
            ("batch_schedule",),
            f"makes the batch larger itself, and training.gradient_accumulation_steps is {accumulated}. Write 1.",
        )
    if content.get("distributed") is not None:
        yield ("batch_schedule",), "is given with distributed, but works in one process only. Leave out one of them."


def _unused_first_moment(optimizer: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    for key in ("beta1", "first_moment_half_life"):
        if optimizer.get("rest_optimizer") == "adafactor" and optimizer.get(key) is not None:
            yield (
                ("optimizer", key),
                "is given, but optimizer.rest_optimizer is adafactor, which has no first moment. Leave it out, or write "
                "rest_optimizer: adamw.",
            )


def _release_contradictions(whole: dict[str, Any], name: str) -> Iterator[tuple[Key, str]]:
    if not whole["optimizer"].get("gradient_release"):
        return
    steps, norm = whole["training"].get("gradient_accumulation_steps", 1), whole["training"].get("max_grad_norm", 0)
    off = "write optimizer.gradient_release: false, which keeps all gradients in memory"
    if int(steps) > 1:
        yield (
            ("training", "gradient_accumulation_steps"),
            f"is {steps}, but method {name} releases each gradient during the backward pass, so there is nothing to "
            f"accumulate. Write 1 (small batches need no accumulation), or {off}.",
        )
    if float(norm or 0) > 0:
        yield (
            ("training", "max_grad_norm"),
            f"is {norm}, but clipping by the global norm requires all gradients, and method {name} releases each during the "
            f"backward pass. Write 0 (Adafactor clips each update by itself), or {off}.",
        )
