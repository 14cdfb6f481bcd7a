"""What cannot be trained with layers in the host's memory, said before anything is loaded."""

from __future__ import annotations

from typing import Any

from sbft.recipe.offload import offload_of
from sbft.training.offload import link


def why_arguments_refuse(args: Any) -> str | None:
    """A sentence on what in the trainer's arguments does not go with `offload`, and what to set; None if nothing.

    Args:
        args: a `SmallBatchTrainingArguments`, or of a class with its fields.
    """
    try:
        offload = offload_of(args.offload)
    except ValueError as error:
        return f"offload is {args.offload!r}; {error}."
    if offload is None:
        return None
    others = vars(args)
    unsupported = {
        "cuda_graphs=True, whose graphs hold addresses of weights": args.cuda_graphs,
        "torch_compile=True, which traces no hooks on layers": others.get("torch_compile"),
        f"fsdp={others.get('fsdp')!r}, which has weights of its own on every device": others.get("fsdp"),
        "fp16_full_eval=True, which moves the whole model to the device": others.get("fp16_full_eval"),
        "bf16_full_eval=True, which moves the whole model to the device": others.get("bf16_full_eval"),
        "deepspeed, which keeps weights in a form of its own": others.get("deepspeed"),
        "parallelism_config, which shards weights over devices": others.get("parallelism_config"),
    }
    found = next((what for what, is_set in unsupported.items() if is_set), None)
    if found is not None:
        return f"offload={args.offload!r} does not go with {found}. Leave out one of them."
    if args.token_optimizer is not None and not args.gradient_release:
        return (
            f"offload={args.offload!r} needs gradient_release=True: a layer can leave the device only when its weights were "
            "updated in backward. Set it, or leave offload out."
        )
    if offload.activations and not args.checkpoints_activations:
        return (
            f"offload={args.offload!r} asks for activations, which are the layers' inputs that checkpointing saves. Set "
            "gradient_checkpointing=True, or leave activations out."
        )
    try:
        link.link_to(args.device)
    except link.OffloadError as error:
        return str(error)
    return None
