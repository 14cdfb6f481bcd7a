"""The generation config that is saved with a model: valid, and with every token that ends a trained answer."""

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

# Settings on which it depends whether other settings are valid.
_FIRST = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def settle_generation(
    model: Any, processor: Any, ends: Iterable[int] = (), *, say: Callable[[str], None] = logger.warning
) -> None:
    """Repair a model's generation config so that it can be saved, and add the tokens at which trained answers end.

    Its own end tokens stay. One warning says what was repaired.

    Args:
        model: a transformers model or an adapter on one; others are left alone.
        processor: the tokenizer, or what contains one; its end token, the end tokens of its chat template and its pad token
            are added.
        ends: further tokens at which answers end in the training data.
        say: called with the warning.
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
    """Add further end tokens behind those that a config has."""
    known = config.eos_token_id
    before = list(known) if isinstance(known, (list, tuple)) else [] if known is None else [known]
    after = list(dict.fromkeys([*before, *ends]))
    if after != before:
        config.eos_token_id = after if len(after) > 1 else after[0]
        # Older transformers would replace it by one made from the model's config, with its end token.
        config._from_model_config = False


def repaired(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """A generation config that transformers saves, and what was changed in it; the same object if nothing was."""
    if _can_be_saved(config):
        return config, []
    if config.do_sample is None:
        # Older checkpoints hold sampling settings without do_sample.
        sampling = copy.deepcopy(config)
        sampling.do_sample = True
        if _can_be_saved(sampling):
            return sampling, ["do_sample: true is added, without which its sampling settings have no effect"]
    kept = type(config)()
    left_out = []
    names = [name for name, value in vars(config).items() if value is not None and not name.startswith("_")]
    for name in sorted(names, key=lambda name: name not in _FIRST):
        default, value = vars(kept).get(name), vars(config)[name]
        if value == default:
            continue
        setattr(kept, name, value)
        if not _can_be_saved(kept):
            setattr(kept, name, default)
            left_out.append(f"{name} ({value!r})")
    return kept, [f"settings that contradict one another are left out: {', '.join(left_out)}"]


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
        config.to_json_string()
    except (ValueError, TypeError, AttributeError):  # AttributeError: a value has the wrong type
        return False
    return True


def _ends_of(tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> list[int]:
    if tokenizer.chat_template and not ends_of_turns(tokenizer):
        say(
            "No token was found that ends an assistant's turn in the chat template: generation will end at the tokenizer's "
            "own end token alone."
        )
    return stop_tokens(tokenizer)


def generator_of(model: Any) -> PreTrainedModel | None:
    """The model, or the one inside an adapter, if it has a generation config; else None."""
    base = unwrap(model)
    if isinstance(base, PreTrainedModel) and base.can_generate() and base.generation_config is not None:
        return base
    return None
