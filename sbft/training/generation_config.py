"""What is saved for `generate()`: settings that can be saved, and every token at which a trained answer ends."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sbft.data.chat import ends_of_turns
from sbft.data.format import stop_tokens
from sbft.training.peft_models import unwrap

logger = logging.getLogger(__name__)

# Settings that decide whether others go with them.
_FIRST = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def settle_generation(
    model: Any, processor: Any, ends: Iterable[int] = (), *, say: Callable[[str], None] = logger.warning
) -> None:
    """Make a model's generation config one that can be saved, and that ends where training taught the model to end.

    Ids that are there stay. One warning says what had to be repaired; what the model is saved with says the rest.

    Args:
        model: a transformers model or an adapter on one; others are left alone.
        processor: the tokenizer, or what holds one; its end token, its chat template's and its padding are taken over.
        ends: further tokens at which answers end in the training data.
        say: told the warning.
    """
    generator = generator_of(model)
    if generator is None:
        return
    config, repairs = repaired(generator.generation_config)
    if repairs:
        say(
            f"The generation config of {generator.config.name_or_path or type(generator).__name__} cannot be saved as it is. "
            f"For what is saved, {' and '.join(repairs)}."
        )
        generator.generation_config = config
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        ends = [*ends, *_ends_of(tokenizer, say)]
        if config.pad_token_id is None and tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id
    add_ends(config, ends)


def add_ends(config: GenerationConfig, ends: Iterable[int]) -> None:
    """Let generation end at further tokens; the ids that are there stay, and stay first."""
    known = config.eos_token_id
    listed = list(known) if isinstance(known, (list, tuple)) else [] if known is None else [known]
    wanted = list(dict.fromkeys([*listed, *ends]))
    if wanted != listed:
        config.eos_token_id = wanted if len(wanted) > 1 else wanted[0]
        config._from_model_config = False  # older transformers take one that is for the model config's, whose end is another


def repaired(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """A generation config that transformers saves, and what was changed in it; the same one where it is so already."""
    if _can_be_saved(config):
        return config, []
    if config.do_sample is None:
        # Older checkpoints give the values to sample with, and leave out that they are to be used.
        sampling = copy.deepcopy(config)
        sampling.do_sample = True
        if _can_be_saved(sampling):
            return sampling, ["do_sample: true is added, without which its sampling settings mean nothing"]
    kept = type(config)()
    left_out = []
    names = [name for name, value in vars(config).items() if value is not None and not name.startswith("_")]
    for name in sorted(names, key=lambda one: one not in _FIRST):
        former, value = vars(kept).get(name), vars(config)[name]
        if value == former:
            continue
        setattr(kept, name, value)
        if not _can_be_saved(kept):
            setattr(kept, name, former)
            left_out.append(f"{name} ({value!r})")
    return kept, [f"what does not go together is left out: {', '.join(left_out)}"]


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
        config.to_json_string()
    except (ValueError, TypeError, AttributeError):  # AttributeError: of a value that has another type than it should
        return False
    return True


def _ends_of(tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> list[int]:
    if tokenizer.chat_template and not ends_of_turns(tokenizer):
        say(
            "No token was found with which the chat template ends an assistant's turn: generation will end at the tokenizer's "
            "own end token alone."
        )
    return stop_tokens(tokenizer)


def generator_of(model: Any) -> PreTrainedModel | None:
    """The model that has a generation config, if there is one: this one, or the one that an adapter is on."""
    base = unwrap(model)
    if isinstance(base, PreTrainedModel) and base.can_generate() and base.generation_config is not None:
        return base
    return None
