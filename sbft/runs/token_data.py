"""The tokens that a pretraining recipe trains on. Local text is tokenized on first use, text from the hub beforehand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from sbft.data.bpe import PREFIX as BPE
from sbft.data.bpe import train_bpe, vocabulary_of
from sbft.data.corpus import PYTHON_SOURCES, SUBSETS, HubCorpus, LocalCorpus, hub_texts, python_sources, text_rows
from sbft.data.files import looks_like_file
from sbft.data.format import FormatReport
from sbft.data.token_files import (
    Encode,
    TokenFiles,
    is_token_folder,
    read_token_files,
    save_tokenizer,
    write_token_files,
)
from sbft.data.windows import TokenSplits
from sbft.errors import DataError
from sbft.files import cache_dir
from sbft.models.load import load_config, load_tokenizer
from sbft.models.scratch import counted_parameters, is_scratch, scratch_config
from sbft.recipe import Recipe
from sbft.training.arguments import SmallBatchTrainingArguments

OFFLINE_TOKENIZER = f"{BPE}2048"
HUB_TOKENIZER = "openai-community/gpt2"
"""The tokenizers of a new model whose recipe names none, for local text and for data from the hub."""
_CACHE_VERSION = 1  # raise it when the same text would give different files, so that older ones are not used
_LOCK = ".lock"

Say = Callable[[str], None]


def load_tokens(
    recipe: Recipe, say: Say = lambda line: None
) -> tuple[PreTrainedTokenizerBase, TokenSplits, FormatReport]:
    """The tokenizer, the windows and their counts, for a resolved pretraining recipe.

    Local text and the standard library are tokenized into sbft's cache on first use. A second process waits for the first.

    Raises:
        SbftError: if the data cannot be read, come from the hub and are not prepared, or were tokenized for another
            checkpoint than the one to train.
    """
    data = recipe.data
    _refuse_validation(recipe)
    if is_token_folder(data.train):
        files = read_token_files(data.train)
        if recipe.tokenizer is not None:
            raise DataError(
                f"tokenizer is {recipe.tokenizer}, but the tokens in {data.train} come with their own. Leave it out."
            )
    else:
        files = _cached(recipe, say)
    tokenizer = load_tokenizer(str(files.tokenizer_folder))
    if not is_scratch(recipe.model):
        own = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
        if own.get_vocab() != tokenizer.get_vocab():
            raise DataError(
                f"The tokens in {files.folder} were made by the tokenizer {files.tokenizer}, which is not that of "
                f"{recipe.model}. Prepare the text with this recipe: write its source under data.train and type sbft "
                "prepare-data."
            )
    splits = TokenSplits(files, data.max_length, recipe.evaluation.limit)
    windows, length = len(splits.train), data.max_length
    report = FormatReport(windows, windows * length, windows * (length - 1), 0, 0, length, None)
    return tokenizer, splits, report


def set_length(recipe: Recipe, arguments: SmallBatchTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set `max_steps` from the recipe's token budget, unless the recipe sets it."""
    budget = budget_tokens(recipe, tokenizer)
    if budget is None or arguments.max_steps > 0:
        return
    if arguments.batch_schedule is not None:
        arguments.max_steps = arguments.batch_schedule.steps(math.ceil(budget / recipe.data.max_length))
        return
    readers = recipe.readers(arguments.world_size)
    windows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * readers
    arguments.max_steps = math.ceil(budget / (windows * recipe.data.max_length))


def budget_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that a recipe trains on; None if it does not say."""
    if recipe.data.train_tokens is not None or recipe.data.tokens_per_parameter is None:
        return recipe.data.train_tokens
    if is_scratch(recipe.model):
        config = scratch_config(recipe.model, tokenizer)
    else:
        config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    parameters = counted_parameters(config, trust_remote_code=recipe.trust_remote_code)
    return math.ceil(recipe.data.tokens_per_parameter * parameters)


def prepare_data(recipe: Recipe, folder: Path | None = None, say: Say = lambda line: None) -> TokenFiles:
    """Make the token files of a resolved recipe, or finish what an interrupted process began.

    Args:
        recipe: a pretraining recipe.
        folder: where to put them; if None, in sbft's cache, where the recipe finds them.
        say: called with a sentence about the progress.

    Raises:
        SbftError: if the data or the tokenizer cannot be read, or another process is writing to the folder.
    """
    source = recipe.data.train
    _refuse_validation(recipe)
    if is_token_folder(source):
        raise DataError(
            f"{source} holds tokens already, so there is nothing to prepare. Type sbft pretrain with the recipe."
        )
    if folder is None:
        return _cached(recipe, say, stream=True)
    if is_token_folder(folder):
        raise DataError(f"{folder} holds tokens already. Choose another --to, or remove it first.")
    return _write(recipe, folder, say, wait=False)


def is_from_hub(recipe: Recipe) -> bool:
    """Whether a recipe's text is a data set of the hub, neither built in nor a local file."""
    source = recipe.data.train
    return not (source.startswith("builtin:") or looks_like_file(source) or Path(source).expanduser().exists())


def _refuse_validation(recipe: Recipe) -> None:
    data = recipe.data
    local = not (data.train == PYTHON_SOURCES or is_token_folder(data.train) or is_from_hub(recipe))
    if data.validation is not None and not local:
        raise DataError(
            f"data.validation is {data.validation}, but {data.train} comes with its own validation part. Leave it out."
        )


def _cached(recipe: Recipe, say: Say, *, stream: bool = False) -> TokenFiles:
    folder = cache_dir() / "tokens" / f"{_stem(recipe.data.train)}-{_key(recipe)}"
    if is_token_folder(folder):
        return read_token_files(folder)
    if is_from_hub(recipe) and not stream:
        raise DataError(
            f"The tokens of {recipe.data.train} are not prepared on this machine (there is no {folder}). Type sbft "
            "prepare-data with this recipe first; it streams the text from the hub, and continues if it was interrupted."
        )
    return _write(recipe, folder, say, wait=True)


def _write(recipe: Recipe, folder: Path, say: Say, *, wait: bool) -> TokenFiles:
    """Prepare into a folder that this process has locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        with lock.acquire(timeout=-1 if wait else 0):
            if is_token_folder(folder):  # another process was faster
                return read_token_files(folder)
            return _write_locked(recipe, folder, say)
    except Timeout as error:
        raise DataError(f"Another process is preparing tokens in {folder}. Wait for it, or choose another --to.") from error
    except OSError as error:
        raise DataError(
            f"The tokens of {recipe.data.train} cannot be written to {folder} ({error.strerror or error}). Free some space, or "
            "name another folder: sbft prepare-data RECIPE --to DIR, or SBFT_CACHE for sbft's cache. What has been written "
            "so far is kept."
        ) from error


def _write_locked(recipe: Recipe, folder: Path, say: Say) -> TokenFiles:
    name = _tokenizer_name(recipe)
    size = None if is_from_hub(recipe) else vocabulary_of(name)
    corpus = _corpus(recipe)
    if size is None:
        made = _checkpoint_tokenizer(recipe)
        save_tokenizer(folder, made.save_pretrained)
    else:
        assert isinstance(corpus, LocalCorpus)
        say(f"Training a tokenizer of {size:,} tokens on {recipe.data.train}, once")
        save_tokenizer(folder, lambda part: train_bpe(corpus.training_texts(), size).save_pretrained(part))
    # Loaded as every later process loads it.
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {name} has no end token to put between documents. Set eos_token in its configuration."
        )
    say(f"Writing the tokens of {recipe.data.train} to {folder}, once")
    return write_token_files(
        folder,
        corpus,
        _encoder(tokenizer),
        end_token=int(tokenizer.eos_token_id),
        vocabulary=len(tokenizer),
        tokenizer=name,
        content=_key(recipe),
        limit=budget_of_stream(recipe, tokenizer) if isinstance(corpus, HubCorpus) else None,
        say=say,
    )


def budget_of_stream(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Training tokens to stream: the recipe's budget, or as many as its steps need; None for all, if it sets neither."""
    budget = budget_tokens(recipe, tokenizer)
    training, steps = recipe.training, int(recipe.training.get("max_steps") or -1)
    if steps > 0:
        size = int(training["per_device_train_batch_size"]) * int(training["gradient_accumulation_steps"])
        return steps * size * recipe.data.max_length
    return budget


def _corpus(recipe: Recipe) -> LocalCorpus | HubCorpus:
    data = recipe.data
    if data.train == PYTHON_SOURCES:
        return python_sources()
    if data.train.startswith("builtin:"):
        raise DataError(f"There is no built-in text {data.train!r}, only {PYTHON_SOURCES}.")
    if Path(data.train).expanduser().is_dir():
        raise DataError(
            f"The folder {data.train} holds no finished tokens. Name the folder that sbft prepare-data filled, or a text file."
        )
    if not is_from_hub(recipe):
        return text_rows(data.train, data.text, data.validation)
    return hub_texts(data.train, data.subset or SUBSETS.get(data.train), data.train_split, data.text)


def _key(recipe: Recipe) -> str:
    """A digest of everything that the content of the files depends on."""
    data = recipe.data
    name = _tokenizer_name(recipe)
    made_by = name if vocabulary_of(name) is not None else _digest_of(_checkpoint_tokenizer(recipe))
    inputs: list[object] = [_CACHE_VERSION, data.train, made_by]
    if is_from_hub(recipe):
        # A stream is cut after as many tokens as are asked for, so that number is one of the inputs.
        limit = budget_of_stream(recipe, _checkpoint_tokenizer(recipe))
        inputs += [data.subset or SUBSETS.get(data.train), data.train_split, data.text, limit]
    else:
        corpus = _corpus(recipe)
        assert isinstance(corpus, LocalCorpus)
        inputs.append(corpus.content)
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token]
    if tokenizer.is_fast:
        content.append(tokenizer.backend_tokenizer.to_str())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _tokenizer_name(recipe: Recipe) -> str:
    if not is_scratch(recipe.model):
        return recipe.model
    return recipe.tokenizer or (HUB_TOKENIZER if is_from_hub(recipe) else OFFLINE_TOKENIZER)


def _checkpoint_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    name = _tokenizer_name(recipe)
    if vocabulary_of(name) is not None:
        raise DataError(
            f"tokenizer is {name}, which is trained on local text, and {recipe.data.train} is streamed. Name an existing "
            f"tokenizer, such as {HUB_TOKENIZER}."
        )
    return load_tokenizer(name, trust_remote_code=recipe.trust_remote_code)


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """A function from texts to token ids; what looks like a special token in a text stays plain text."""
    if not tokenizer.is_fast:
        return lambda texts: [
            tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            for text in texts
        ]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _stem(source: str) -> str:
    return Path(source.removeprefix("builtin:").rstrip("/")).stem
