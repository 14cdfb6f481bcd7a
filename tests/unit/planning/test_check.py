"""Warnings before a run begins: every sign of a run that goes wrong is found, and similar settings are not."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sbft.data.collate import Collator
from sbft.errors import DataError, ModelError, RecipeError, SbftError
from sbft.native.memory import device_name
from sbft.planning.check import processor
from sbft.planning.check.check_recipe import check, expected_memory, find, warnings_in_brief
from sbft.planning.check.finding import Finding
from sbft.planning.check.length import duration, row_sizes, rows_per_step, run_length
from sbft.planning.check.memory import fit
from sbft.planning.check.settings import COMPUTE_BOUND_TOKENS, unused_graphs
from sbft.planning.memory.predict import PlanError
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.prepare import Prepared, prepare
from sbft.runs.record import RunRecord
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import BOS, CHATML, EOS, PAD, save_tiny, tiny_model, tiny_tokenizer
from tests.unit.data.test_chats import RICH

GIB = 2**30
ROWS: list[dict[str, Any]] = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(24)]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]
# Marks the token that ends an answer as not written by the assistant.
END_LEFT_OUT = CHATML.replace(
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
LINEAR = "training.lr_scheduler_type=linear"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Predicted:
    """A prediction; `asked` has the arguments it was made with."""

    peak_bytes: int = GIB
    parts: dict[str, int] = field(default_factory=lambda: {"weights": GIB // 4, "activations": 3 * GIB // 4})
    phase: str = "backward"
    asked: dict[str, Any] = field(default_factory=dict)

    def __call__(self, recipe: Recipe, **asked: Any) -> Predicted:
        self.asked = asked
        return self


Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def no_note_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """These examples have too few tokens to keep a GPU busy, which is not the subject of these tests."""
    monkeypatch.setattr("sbft.planning.check.settings.COMPUTE_BOUND_GPU_TOKENS", 0)


@pytest.fixture
def make(tiny_dir: Path, tmp_path: Path) -> Make:
    """Makes resolved recipes with a tiny model, tiny data and the given overrides."""

    def recipe(*overrides: str, rows: list[dict[str, Any]] = ROWS, model: Path = tiny_dir) -> Recipe:
        data = write_rows(tmp_path / "train.jsonl", rows)
        flags = {"model": str(model), "data": str(data), "output_dir": str(tmp_path / "runs" / "mine")}
        return resolve(load_recipe(None, list(overrides), **flags))

    return recipe


def keys(recipe: Recipe) -> set[str]:
    return {finding.key for finding in find(prepare(recipe))}


def the(recipe: Recipe, key: str) -> Finding:
    (found,) = (finding for finding in find(prepare(recipe)) if finding.key == key)
    return found


def as_overrides(fix: str) -> list[str]:
    """The overrides that stand for a line of `sbft train` flags."""
    flags = iter(shlex.split(fix))
    return [next(flags) if flag == "--set" else f"{flag.removeprefix('--')}={next(flags)}" for flag in flags]


SIGNS: list[tuple[str, list[str], list[str]]] = [
    ("beta2-not-scaled", ["method=adam", "optimizer.beta2=0.95"], ["method=adam"]),
    ("beta2-not-scaled", ["optimizer.beta2=0"], ["optimizer.schedule=power", "optimizer.beta2=0.8"]),
    # The average's half-life in examples is 1 / -log2(beta2): 98.7 and 101.6.
    ("beta2-not-scaled", ["optimizer.beta2=0.993"], ["optimizer.beta2=0.9932"]),
    ("beta2-not-scaled", ["method=adam-accum", "training.gradient_accumulation_steps=1"], ["method=adam-accum"]),
    ("beta2-not-scaled", ["method=adam-batch", "training.per_device_train_batch_size=2"], ["method=adam-batch"]),
    ("beta2-not-scaled", ["method=lora", "optimizer.beta2=0.95"], ["method=lora"]),
    ("no-stochastic-rounding", ["optimizer.stochastic_rounding=false"], []),
    ("no-stochastic-rounding", ["method=adam", "dtype=bfloat16"], ["method=adam"]),
    ("no-stochastic-rounding", ["method=hf-adafactor"], ["method=sgd"]),
    ("no-stochastic-rounding", ["method=adam8bit"], ["method=lora"]),
    ("no-stochastic-rounding", ["optimizer.stochastic_rounding=false"], ["dtype=float32"]),
    ("accumulation-on-one-device", ["method=adam-accum"], ["method=adam-batch"]),
    (
        "accumulation-on-one-device",
        ["optimizer.gradient_release=false", "training.gradient_accumulation_steps=2"],
        ["optimizer.gradient_release=false", "training.per_device_train_batch_size=2"],
    ),
    (
        "accumulation-on-one-device",
        ["method=adam", "optimizer.beta2=0.95", "training.gradient_accumulation_steps=16"],
        ["method=adam"],
    ),
    ("relative-step-too-large", ["training.learning_rate=1.1e-3"], ["training.learning_rate=1e-3"]),
    (
        "relative-step-too-large",
        ["training.learning_rate=3e-3"],
        ["training.learning_rate=3e-3", "optimizer.relative_step=false"],
    ),
    (
        "relative-step-too-large",
        ["training.learning_rate=3e-3"],
        ["training.learning_rate=3e-3", "method=hf-adafactor"],
    ),
    ("warmup-longer-than-run", [LINEAR, "training.warmup_steps=24"], [LINEAR, "training.warmup_steps=23"]),
    ("warmup-longer-than-run", [LINEAR, "training.warmup_steps=5", "training.max_steps=4"], [LINEAR]),
    ("warmup-without-effect", ["training.warmup_steps=2"], [LINEAR, "training.warmup_steps=2"]),
]
"""A sign, settings that show it, and similar settings that do not."""


@pytest.mark.parametrize(("key", "found", "silent"), SIGNS)
def test_a_sign_is_found_its_like_is_not_and_what_is_to_be_typed_takes_it_away(
    key: str, found: list[str], silent: list[str], make: Make
) -> None:
    finding = the(make(*found), key)
    assert finding.severity == "warning" and finding.title and finding.why.endswith(".")
    assert key not in keys(make(*silent))
    assert finding.fix is not None and finding.fix.startswith("--")
    mended = keys(make(*found, *as_overrides(finding.fix)))
    assert key not in mended
    # A fix must not lead to other warnings.
    assert mended & {one for one, _, _ in SIGNS} <= keys(make(*found))


def test_a_short_half_life_is_short_in_tokens_too(make: Make) -> None:
    # At 0.95 the half-life is 13.5 steps: 27,000 tokens of these rows, 13,500 of rows half as long.
    rows = [{"text": f"{n} " + "the dog sleeps on and " * 400} for n in range(4)]
    settings = ("data.chat_template=false", "optimizer.beta2=0.95")
    assert "beta2-not-scaled" not in keys(make(*settings, "data.max_length=2000", rows=rows))
    assert "beta2-not-scaled" in keys(make(*settings, "data.max_length=1000", rows=rows))


def test_methods_that_are_there_to_be_compared_with_say_so(make: Make) -> None:
    assert "hf-adafactor is defined this way" in the(make("method=hf-adafactor"), "no-stochastic-rounding").why
    assert "adam-accum is defined this way" in the(make("method=adam-accum"), "accumulation-on-one-device").why
    assert "defined this way" not in the(make("optimizer.stochastic_rounding=false"), "no-stochastic-rounding").why


def test_accumulation_between_devices_may_pay(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make("method=adam-accum"))
    assert "accumulation-on-one-device" in {finding.key for finding in find(prepared)}
    monkeypatch.setattr(type(prepared.arguments), "world_size", 2)
    assert "accumulation-on-one-device" not in {finding.key for finding in find(prepared)}


@pytest.mark.parametrize(
    ("sizes", "readers"),
    [
        ([], 4),
        (["distributed.fsdp_size=4"], 4),
        (["distributed.tp_size=4"], 1),
        (["distributed.fsdp_size=2", "distributed.tp_size=2"], 2),
    ],
)
def test_processes_that_share_the_work_on_an_example_count_it_once(
    sizes: list[str], readers: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, prepared = prepare(make()), prepare(make(*sizes))
    monkeypatch.setattr(type(prepared.arguments), "world_size", 4)
    length = run_length(prepared)
    assert rows_per_step(prepared) == readers
    assert (length.tokens, length.rows) == (alone.report.tokens, alone.report.examples)
    assert length.steps == math.ceil(alone.report.examples / readers)


def test_a_half_life_beyond_the_run_is_a_note(make: Make) -> None:
    tokens = prepare(make()).report.tokens
    found = the(make(f"optimizer.second_moment_half_life={10 * tokens}"), "half-life-longer-than-run")
    assert found.severity == "note" and found.fix is None and "Harmless" in found.why
    assert keys(make(f"optimizer.second_moment_half_life={10 * tokens - 1}")) == set()


def test_graphs_that_cannot_be_are_told_of(make: Make) -> None:
    def on(device: str, **changes: Any) -> Prepared:
        return replace(asked, arguments=SimpleNamespace(device=torch.device(device)), **changes)

    asked = prepare(make("optimizer.cuda_graphs=true"))
    found = unused_graphs(on("cpu"))
    assert found is not None and found.severity == "note" and "on this machine" in found.title
    assert unused_graphs(on("cuda")) is None
    asked = prepare(make("optimizer.cuda_graphs=true", "data.packing=true"))
    found = unused_graphs(on("cuda"))
    assert found is not None and found.severity == "warning" and "packed examples" in found.title
    assert found.fix is not None and unused_graphs(on("cuda", recipe=make(*as_overrides(found.fix)))) is None
    assert unused_graphs(on("cuda", recipe=make())) is None
    assert ("graphs-not-used" in keys(make("optimizer.cuda_graphs=true"))) and "graphs-not-used" not in keys(make())


@pytest.mark.parametrize("multiplies", [False, True])
def test_bfloat16_that_torch_multiplies_by_itself_is_warned_of(
    make: Make, monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(processor, "type_of", lambda: "cpu")
    key = "slow-bfloat16"
    assert (key in keys(make())) is (key in keys(make("method=lora"))) is not multiplies
    assert key not in keys(make("method=adam"))  # in float32
    if not multiplies:
        fix = the(make(), key).fix
        assert fix is not None and key not in keys(make(*as_overrides(fix)))
        monkeypatch.setattr(processor, "type_of", lambda: "cuda")
        assert key not in keys(make())


def test_few_tokens_for_the_device_are_a_note(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make("training.per_device_train_batch_size=2"))
    tokens = 2 * prepared.report.tokens / prepared.report.examples
    device = prepared.arguments.device.type
    monkeypatch.setitem(COMPUTE_BOUND_TOKENS, device, int(4 * tokens) + 1)
    (note,) = (one for one in find(prepared) if one.key == "far-under-compute-bound")
    assert note.severity == "note" and f"about {tokens:.0f} tokens" in note.title and "sbft batch-size" in note.why
    monkeypatch.setitem(COMPUTE_BOUND_TOKENS, device, int(4 * tokens))
    assert "far-under-compute-bound" not in {one.key for one in find(prepared)}


# The examples


def test_truncated_examples_and_the_length_that_they_need(make: Make) -> None:
    longest = prepare(make()).report.longest
    assert "examples-truncated" not in keys(make(f"data.max_length={longest}"))
    found = the(make(f"data.max_length={longest - 1}"), "examples-truncated")
    assert "cut off" in found.title and found.fix == f"--set data.max_length={longest}"
    # So short that some rows have no answer left.
    found = the(
        make(f"data.max_length={longest - 2}", rows=[*ROWS, {"prompt": "?" * 90, "completion": "!"}]), found.key
    )
    assert "1 example left out" in found.title and found.title.endswith("of 25")


def test_what_is_not_read_is_named(make: Make) -> None:
    assert "data-not-read" not in keys(make())
    found = the(make(rows=[{**row, "id": 1, "system": "be brief"} for row in ROWS]), "data-not-read")
    assert found.severity == "warning" and found.title == "Columns not read: id, system"
    chats = [{"messages": [{**message, "train": False} for message in row["messages"]]} for row in CHATS]
    assert the(make(rows=chats), "data-not-read").title == "Part of the data not read: messages[].train"


def test_conversations_that_became_several_examples(make: Make, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tiny_tokenizer(RICH))
    turns = [CHATS[0]["messages"][0], {**CHATS[0]["messages"][1], "reasoning_content": "hm"}]
    found = the(make(model=folder, rows=[{"messages": turns * 2}] * 3), "conversations-divided")
    assert found.title == "3 conversations became several examples, 6 in all" and found.severity == "note"
    assert "conversations-divided" not in keys(make(model=folder, rows=[{"messages": turns}] * 3))


def test_a_chat_template_that_writes_the_date(make: Make, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert "any other day" in the(make(model=folder), "date-in-template").why
    assert "date-in-template" not in keys(make("data.chat_template=false", model=folder))


def test_examples_longer_than_the_model_reads_are_to_be_divided(make: Make, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 64}))
    found = the(make("data.max_length=32", model=folder, rows=[{"prompt": "?" * 90, "completion": "!"}, *ROWS]),
        "examples-truncated")  # fmt: skip
    assert found.fix is not None and "more than 64 tokens" in found.fix and "data.max_length=64" in found.fix


def test_questions_of_the_evaluation_in_training(make: Make, tmp_path: Path) -> None:
    shared = write_rows(tmp_path / "shared.jsonl", [*ROWS[:3], {"prompt": "And the fox?", "completion": "jumps"}])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "And the fox?", "completion": "jumps"}])
    found = the(make(f"data.eval={shared}", "data.allow_overlap=true"), "evaluation-in-training")
    assert found.title == "3 of 4 evaluation questions are in the training data"
    assert "evaluation-in-training" not in keys(make(f"data.eval={other}", "data.allow_overlap=true"))
    # Overlap that is not allowed is refused when the data is read.
    assert found.fix == "--set data.allow_overlap=false"
    with pytest.raises(DataError, match="shares 3 questions"):
        check(make(f"data.eval={shared}"), Predicted())


def folder_with(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str = "model") -> Path:
    folder = tmp_path / name
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_pad_equal_to_eos(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(template)
    tokenizer.pad_token = EOS
    return tokenizer


@pytest.mark.parametrize("packing", ["false", "true"])
def test_answers_whose_end_is_masked(packing: str, make: Make, tmp_path: Path) -> None:
    packed = f"data.packing={packing}"
    folder = folder_with(tmp_path, with_pad_equal_to_eos(END_LEFT_OUT))
    found = the(make(packed, model=folder, rows=CHATS), "end-not-learned")
    assert found.title == "The end of the answer is not learned in 24 examples of 24"
    assert "is also the pad token" in found.why and "endgeneration" in str(found.fix)
    # In prompts and completions, sbft itself finds the answer.
    assert "end-not-learned" not in keys(make(packed, model=folder))
    # Pad and end are the same token here too, but every answer ends in it, with a label.
    whole = folder_with(tmp_path, with_pad_equal_to_eos(CHATML), "whole")
    assert "end-not-learned" not in keys(make(packed, model=whole, rows=CHATS))


def test_answers_that_have_no_end_for_want_of_an_end_token(make: Make, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    found = the(make(model=folder_with(tmp_path, tokenizer)), "end-not-learned")
    assert "no end token" in found.why and "eos_token" in str(found.fix)
    assert "end-not-learned" not in keys(make(model=folder_with(tmp_path, tiny_tokenizer(None), "whole")))


def test_the_end_of_examples_that_were_cut_off_is_another_matter(make: Make) -> None:
    longest = prepare(make()).report.longest
    found = keys(make(f"data.max_length={longest - 1}"))
    assert "examples-truncated" in found and "end-not-learned" not in found


@pytest.mark.parametrize("packing", ["false", "true"])
def test_padding_that_came_with_the_data(packing: str, make: Make, tmp_path: Path) -> None:
    packed = f"data.packing={packing}"

    def completed(row: dict[str, Any], behind: str) -> dict[str, Any]:
        return {**row, "completion": row["completion"] + behind}

    padded = [*ROWS[:20], *(completed(row, 2 * PAD) for row in ROWS[20:])]
    found = the(make(packed, rows=padded), "padding-trained")
    assert found.title == "Padding is learned in 4 examples of 24" and PAD in found.why
    assert "padding-trained" not in keys(make(packed, rows=[completed(row, PAD) for row in ROWS]))
    # The end token in the data is followed by the one that is added to every answer.
    folder = folder_with(tmp_path, with_pad_equal_to_eos(CHATML))
    assert "padding-trained" not in keys(make(packed, model=folder, rows=[completed(row, EOS) for row in ROWS]))
    found = the(make(packed, model=folder, rows=[completed(row, 2 * EOS) for row in ROWS]), "padding-trained")
    assert "the end token too" in found.why


def test_the_padding_of_batches_is_not_learned(make: Make, tmp_path: Path) -> None:
    prepared = prepare(make(model=folder_with(tmp_path, with_pad_equal_to_eos(CHATML))))
    batch = Collator(prepared.tokenizer.pad_token_id)([prepared.examples[0], prepared.examples[20]])
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    assert "padding-trained" not in {finding.key for finding in find(prepared)}


def beginning(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_chat_template_without_the_begin_token(packing: str, make: Make, tmp_path: Path) -> None:
    packed = f"data.packing={packing}"
    folder = folder_with(tmp_path, beginning(CHATML))
    found = the(make(packed, model=folder), "begin-token-missing")
    assert found.title == f"24 examples of 24 do not begin with {BOS}" and "chat template" in found.why
    assert "begin-token-missing" not in keys(make(packed, *as_overrides(str(found.fix)), model=folder))
    chats = the(make(packed, model=folder, rows=CHATS), "begin-token-missing")
    assert chats.fix == f"Put {BOS} at the start of the tokenizer's chat template."
    whole = folder_with(tmp_path, beginning("{{ bos_token }}" + CHATML), "whole")
    assert "begin-token-missing" not in keys(make(packed, model=whole, rows=CHATS))


def test_a_begin_token_that_the_configuration_asks_for_in_vain(make: Make, tmp_path: Path, tiny_dir: Path) -> None:
    folder = save_tiny(tmp_path / "model", chat_template=None)
    assert "begin-token-missing" not in keys(make(model=folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    found = the(make(model=folder), "begin-token-missing")
    assert "tokenizer.json does not add it" in found.why and "post_processor" in str(found.fix)
    folder = folder_with(tmp_path, beginning(None), "whole")
    assert "begin-token-missing" not in keys(make(model=folder))


# The length of the run


def trainer_of(prepared: Prepared) -> SmallBatchTrainer:
    collator = Collator(prepared.tokenizer.pad_token_id)
    return SmallBatchTrainer(tiny_model(), prepared.arguments, collator, prepared.examples)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["training.num_train_epochs=2.5"],
        ["training.max_steps=50"],
        ["training.per_device_train_batch_size=5"],
        ["training.per_device_train_batch_size=5", "training.num_train_epochs=1.3"],
        ["training.per_device_train_batch_size=5", "training.dataloader_drop_last=true"],
        ["method=adam-accum", "training.num_train_epochs=3"],
        ["method=adam-accum", "training.gradient_accumulation_steps=7", "training.per_device_train_batch_size=2"],
        ["method=adam-accum", "training.gradient_accumulation_steps=100"],
        ["data.packing=true", "data.max_length=128"],
    ],
)
def test_the_steps_are_those_of_the_trainer(settings: list[str], make: Make) -> None:
    prepared = prepare(make(*settings))
    trainer = trainer_of(prepared)
    *_, steps = trainer.set_initial_training_values(prepared.arguments, trainer.get_train_dataloader())
    assert run_length(prepared).steps == steps


@pytest.mark.parametrize(
    ("settings", "steps", "rows", "exact"),
    [
        (["training.num_train_epochs=2", "training.gradient_accumulation_steps=7"], 8, 48, True),
        (["training.max_steps=5", "training.gradient_accumulation_steps=7"], 5, 31, False),
    ],
)
def test_the_length_is_what_a_run_then_comes_to(
    settings: list[str], steps: int, rows: int, exact: bool, make: Make
) -> None:
    prepared = prepare(make("method=adam", *settings))
    length, trainer = run_length(prepared), trainer_of(prepared)
    trainer.train()
    assert (trainer.state.global_step, length.steps, length.rows, length.exact) == (steps, steps, rows, exact)
    # Within an epoch, the order decides which rows are seen; all have nearly the same length.
    assert trainer.tokens_seen == (length.tokens if exact else pytest.approx(length.tokens, rel=0.03))


def test_the_sizes_of_rows(make: Make) -> None:
    for settings, multiple in (([], 16), (["data.packing=true", "data.max_length=128"], 1)):
        prepared = prepare(make(*settings))
        lengths = [len(row) for row in prepared.examples["input_ids"]]
        labels = [sum(label != -100 for label in row) for row in prepared.examples["labels"]]
        widths = {math.ceil(one / multiple) for one in lengths}
        padded = any(one < max(widths) * multiple and math.ceil(one / multiple) == max(widths) for one in lengths)
        assert row_sizes(prepared) == (max(lengths), padded, max(labels), len(widths), len(set(labels)))


@pytest.mark.parametrize(
    ("lengths", "batch", "padded"),
    [((32, 32), "1", False), ((32, 16), "1", False), ((32, 31), "1", True), ((31, 31), "1", True)]
    + [((32, 32), "2", False), ((32, 16), "2", True), ((32, 16), "doubling", True)],
)
def test_the_widest_batch_holds_padding_if_rows_differ_or_do_not_fill_a_width(
    lengths: tuple[int, ...], batch: str, padded: bool, make: Make
) -> None:
    schedule = "batch_schedule={doubling_examples: 4, largest: 8}"
    setting = schedule if batch == "doubling" else f"training.per_device_train_batch_size={batch}"
    prepared = prepare(make("method=adam", setting))
    rows = Dataset.from_dict({name: [[7] * one for one in lengths] for name in ("input_ids", "labels")})
    assert row_sizes(replace(prepared, examples=rows)).padded is padded


def record(prepared: Prepared, folder: Path, **changed: Any) -> None:
    recipe = prepared.recipe
    known: dict[str, Any] = {
        "method": recipe.method, "model": recipe.model, "dataset": recipe.data.train, "seed": 0, "status": "ok",
        "device": device_name(), "dtype": str(recipe.dtype), "tokens_per_s": 100.0,
        "started_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    RunRecord(**{**known, **changed}).save(folder)


def test_the_time_is_that_of_a_run_which_was_alike(make: Make, tmp_path: Path) -> None:
    prepared = prepare(make())
    length = run_length(prepared)
    runs = tmp_path / "runs"
    assert duration(prepared, length) is None
    for index, changed in enumerate(
        [
            {"status": "error"}, {"tokens_per_s": None}, {"device": "another"}, {"method": "adam"}, {"model": "another"},
            {"dtype": "float32"}, {"per_device_batch_size": 2}, {"gradient_accumulation_steps": 2}, {"world_size": 2},
        ]
    ):  # fmt: skip
        record(prepared, runs / f"unlike-{index}", **changed)
    (runs / "foreign").mkdir()
    (runs / "foreign" / "run.json").write_text('{"loss": 3}')
    assert duration(prepared, length) is None
    record(prepared, runs / "other", dataset="another", tokens_per_s=300.0, started_at="2026-03-01T00:00:00+00:00")
    found = duration(prepared, length)
    assert found is not None and not found.same_data and found.source == str(runs / "other")
    record(prepared, runs / "old", tokens_per_s=50.0)
    record(prepared, runs / "mine", tokens_per_s=200.0, started_at="2026-02-01T00:00:00+00:00")
    found = duration(prepared, length)
    assert found is not None and found.same_data and found.source == str(runs / "mine")
    assert found.train_s == pytest.approx(prepared.report.tokens / 200)


# Whether it fits


def test_a_peak_beside_the_memory_there_is(make: Make) -> None:
    prepared, predicted = prepare(make()), Predicted(90, {"weights": 20, "activations": 70})
    assert fit(prepared, predicted, 95) is None
    hardly = fit(prepared, predicted, 94)
    assert hardly is not None and (hardly.key, hardly.severity) == ("hardly-fits", "warning")
    at_most = fit(prepared, predicted, 90)
    assert at_most is not None and at_most.severity == "warning"
    over = fit(prepared, predicted, 89)
    assert over is not None and (over.key, over.severity) == ("does-not-fit", "error")


@pytest.mark.parametrize(
    ("settings", "parts", "switch"),
    [
        ([], {"weights": 1, "gradients": 1, "activations": 6}, "training.gradient_checkpointing=true (a third slower)"),
        (["method=adam"], {"weights": 2, "gradients": 2, "optimizer_state": 4}, "method=sbft"),
        (["optimizer.gradient_release=false"], {"weights": 1, "gradients": 7}, "optimizer.gradient_release=true"),
    ],
)
def test_the_switch_is_that_of_the_largest_part(
    settings: list[str], parts: dict[str, int], switch: str, make: Make
) -> None:
    found = fit(prepare(make(*settings)), Predicted(8 * GIB, {name: n * GIB for name, n in parts.items()}), 4 * GIB)
    assert found is not None and found.fix == f"--set {switch}"
    assert "8.00 GiB are needed" in found.why and "backward" in found.why and "4.00 GiB are available" in found.why


def available(size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.planning.check.check_recipe.available_bytes", lambda: size_bytes)


@pytest.mark.parametrize(
    ("settings", "free", "code"),
    [([], 8 * GIB, 0), (["optimizer.stochastic_rounding=false"], 8 * GIB, 1), ([], GIB + 1, 1), ([], GIB - 1, 2)],
)
def test_the_exit_code_is_that_of_the_worst(
    settings: list[str], free: int, code: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(free, monkeypatch)
    predicted = Predicted()
    assert check(make(*settings), predicted).exit_code == code
    assert predicted.asked["longest"] > predicted.asked["labelled"] > 0


def failing(error: SbftError) -> Callable[..., Predicted]:
    def predict(recipe: Recipe, **asked: Any) -> Predicted:
        raise error

    return predict


def test_a_model_that_cannot_be_traced_is_a_note_and_one_that_cannot_be_made_an_error(make: Make) -> None:
    untraced = check(make(), failing(PlanError("It cannot be traced.")))
    assert (untraced.prediction, untraced.exit_code) == (None, 0)
    assert "It cannot be traced." in [finding.why for finding in untraced.findings]
    assert check(make(), failing(ModelError("It has no layer of that name."))).exit_code == 2


# The whole check


def test_every_problem_is_told_at_once(make: Make, tmp_path: Path) -> None:
    with pytest.raises(SbftError) as caught:
        check(make(f"data.eval={tmp_path / 'none.jsonl'}", model=tmp_path / "none"))
    told = str(caught.value)
    assert told.startswith("2 problems:\n- There is no folder") and "\n- There is no file" in told
    with pytest.raises(DataError, match="There is no file"):
        check(make(f"data.eval={tmp_path / 'none.jsonl'}"))


def test_an_output_folder_in_use_is_a_note_and_one_that_cannot_be_made_an_error(make: Make, tmp_path: Path) -> None:
    recipe = make()
    record(prepare(recipe), tmp_path / "runs" / "mine")
    found = check(recipe, Predicted())
    assert found.exit_code == 0 and "--overwrite" in next(
        finding.why for finding in found.findings if finding.key == "output-folder-in-use"
    )
    (tmp_path / "runs" / "file").write_text("")
    taken = recipe.model_copy(update={"output_dir": str(tmp_path / "runs" / "file" / "mine")})
    assert check(taken, Predicted()).exit_code == 2


def test_training_is_told_of_warnings_in_a_line_each(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make("optimizer.stochastic_rounding=false", "data.max_length=20"))
    available(GIB - 1, monkeypatch)
    assert {finding.key for finding in find(prepared)} >= {"examples-truncated", "half-life-longer-than-run"}
    prediction, of_memory = expected_memory(prepared, Predicted())
    lines = warnings_in_brief(prepared, of_memory)
    assert prediction is not None and prediction.peak_bytes == GIB
    assert all(line.startswith("Warning: ") and "\n" not in line for line in lines)
    # Left out: what the run itself says about its data, and what is harmless.
    assert [line.split()[1] for line in lines] == ["bfloat16", "It"]
    assert "--set optimizer.stochastic_rounding=true" in lines[0] and "will not fit" in lines[1]
    _, of_model = expected_memory(prepared, failing(ModelError("It has no layer of that name.")))
    # The run itself ends with this error, so it gets no line.
    assert of_model is not None and "It has no layer of that name." in of_model.why
    assert len(warnings_in_brief(prepared, of_model)) == 1


def test_a_recipe_that_is_none_is_refused_before_anything_is_read(make: Make) -> None:
    with pytest.raises(RecipeError, match="2 problems"):
        make("method=sbtf", "data.max_lenght=3")
