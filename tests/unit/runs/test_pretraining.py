"""Pretraining: a new model on every token of a text, from the recipe to the record."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.data.bpe import train_bpe
from sbft.data.token_files import TRAIN, VALIDATION, is_token_folder, read_token_files
from sbft.data.windows import collate_windows
from sbft.errors import DataError, RecipeError
from sbft.models.load import load_model, load_tokenizer
from sbft.planning.check.check_recipe import check
from sbft.recipe import Recipe, for_pretraining, load_recipe, resolve
from sbft.runs import token_data
from sbft.runs.build import prepare_model
from sbft.runs.prepare import prepare
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run
from sbft.runs.token_data import prepare_data
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_tokenizer

LENGTH = 32
WORDS = [f"def f{n}(x):\n    return x * {n} + {n * n}\n" for n in range(300)]

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe of pretraining on a small text; the tests share its tokens."""
    monkeypatch.setenv("SBFT_CACHE", str(cache))
    text = cache / "code.txt"
    if not text.exists():
        text.write_text("\n\n".join(WORDS))

    def made(*settings: str, folder: str = "run", model: str = "scratch:0.4m", **flags: Any) -> Recipe:
        shared = [
            "tokenizer=bpe:300", f"data.max_length={LENGTH}", "data.train_tokens=1000", "training.learning_rate=1e-3",
            "training.per_device_train_batch_size=4", "evaluation.before=false", "evaluation.limit=5", "method=adam",
        ]  # fmt: skip
        recipe = load_recipe(
            None, [*shared, *settings], model=model, data=str(text), output_dir=str(tmp_path / folder), **flags
        )
        return resolve(for_pretraining(recipe))

    return made


def validation_loss(folder: str, files: Any, windows: int) -> float:
    """The mean loss per token in float64, over evenly spread windows."""
    model = load_model(folder, dtype=torch.float32).double()
    ids = np.fromfile(files.path(VALIDATION), np.uint16).astype(np.int64)
    whole = len(ids) // LENGTH
    chosen = torch.from_numpy(
        ids[: whole * LENGTH].reshape(whole, LENGTH)[[i * whole // windows for i in range(windows)]]
    )
    with torch.no_grad():
        probabilities = model(chosen).logits.log_softmax(-1)
    return -float(probabilities[:, :-1].gather(2, chosen[:, 1:, None]).mean())


def test_a_run_from_the_text_to_the_record(make: Make) -> None:
    recipe = make("training.eval_strategy=steps", "training.eval_steps=4")
    record = run(recipe)
    files = read_token_files(next(p for p in (Path(recipe.data.train).parent / "tokens").iterdir()))
    assert files.tokens[VALIDATION] >= LENGTH * 6  # more windows than are measured
    assert (record.status, record.steps, record.tokens) == ("ok", 8, 8 * 4 * LENGTH)  # of 1,000 tokens, rounded up
    assert record.data["examples"] == files.tokens[TRAIN] // LENGTH and record.data["evaluation_examples"] == 5
    assert record.evaluated_on == "validation" and record.second_moment_half_life == 10_000_000
    assert record.step_s["median"] and record.tokens_per_s and record.metrics_before == {}
    folder = str(recipe.output_dir)
    assert record.metrics["loss"] == pytest.approx(validation_loss(folder, files, 5), rel=1e-5)
    measured = {entry["step"]: entry["eval_loss"] for entry in record.history if "eval_loss" in entry}
    assert measured.keys() == {4, 8} and measured[8] == pytest.approx(record.metrics["loss"], rel=1e-5)
    assert record.metrics["loss"] < math.log(300) + 0.5  # the loss of a new model, whose logits have a variance of 1
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("return x")["input_ids"]) == "return x"
    assert "pretrained on" in (Path(folder) / "README.md").read_text()
    # The cosine ends at zero, after 5% of warm-up: one step of 8.
    assert recipe.training["lr_scheduler_type"] == "cosine" and recipe.training["warmup_steps"] == 0.05
    assert RunRecord.load(folder).recipe["data"]["train_tokens"] == 1000


class Stop(TrainerCallback):
    """Ends the run after a step, as an error would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("the power went")


def test_what_is_resumed_ends_in_the_same_bits(make: Make, tmp_path: Path) -> None:
    settings = ["training.save_strategy=steps", "training.save_steps=3", "method=sbft"]
    whole = run(make(*settings, folder="whole"))
    with pytest.raises(RuntimeError, match="the power went"):
        run(make(*settings, folder="cut"), callbacks=[Stop()])
    resumed = run(make(*settings, folder="cut"), resume=True)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert resumed.metrics == whole.metrics and resumed.tokens == whole.tokens


def test_every_window_is_seen_once_an_epoch_in_an_order_of_the_seed(make: Make, tmp_path: Path) -> None:
    def order(seed: int) -> list[list[int]]:
        prepared = prepare(make(f"training.seed={seed}"))
        model = prepare_model(prepared.recipe, prepared.tokenizer)
        trainer = SmallBatchTrainer(
            model=model, args=prepared.arguments, train_dataset=prepared.examples, data_collator=collate_windows
        )
        batches = list(trainer.get_train_dataloader())
        assert {tuple(sorted(batch)) for batch in batches} == {("input_ids", "labels")}
        return [row.tolist() for batch in batches for row in batch["input_ids"]]

    first, again, other = order(0), order(0), order(1)
    windows = [one["input_ids"].tolist() for one in prepare(make()).splits.train]
    assert first == again and sorted(first) == sorted(other) == sorted(windows)
    assert first != other and first != windows


def test_the_steps_are_those_of_the_budget(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(*settings: str) -> int:
        return prepare(make(*settings)).arguments.max_steps

    assert steps() == math.ceil(1000 / (4 * LENGTH))
    assert steps("training.gradient_accumulation_steps=3", "data.train_tokens=3841") == 11
    assert steps("training.max_steps=5") == 5
    # Embedding of 300 tokens, and 12 width^2 in each of two layers.
    parameters = 300 * 96 + 2 * 12 * 96**2
    assert steps("data.train_tokens=null", "data.tokens_per_parameter=0.5") == math.ceil(parameters / 2 / (4 * LENGTH))
    assert steps("data.train_tokens=null", "training.num_train_epochs=2") == -1
    monkeypatch.setattr(SmallBatchTrainingArguments, "world_size", 2)
    assert steps() == math.ceil(1000 / (2 * 4 * LENGTH))


def test_what_pretraining_starts_from() -> None:
    def content(*settings: str, **flags: Any) -> dict[str, Any]:
        given = {"model": "scratch:1m", "data": "builtin:python-stdlib", **flags}
        return for_pretraining(load_recipe(None, list(settings), **given)).model_dump(exclude_unset=True)

    plain = content()
    assert plain["data"]["tokens_per_parameter"] == 20 and plain["data"]["max_length"] == 512
    assert plain["training"] == {"lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    assert plain["optimizer"] == {"second_moment_half_life": 10_000_000}
    assert content(method="sgd")["optimizer"] == {}
    assert content("optimizer.beta2=0.95", method="adam")["optimizer"] == {"beta2": 0.95}
    assert content("optimizer.schedule=power")["optimizer"] == {"schedule": "power"}
    assert "tokens_per_parameter" not in content("training.max_steps=3")["data"]
    assert content("training.lr_scheduler_type=linear")["training"]["lr_scheduler_type"] == "linear"
    whole = resolve(for_pretraining(load_recipe("pretrain-stdlib")))
    assert resolve(whole) == whole and "num_train_epochs" not in whole.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.eval=my.jsonl"], "data.eval has no effect here, because"),
        (["evaluation.metrics=[exact_match]"], "evaluation.metrics has no effect here, because"),
        (["data.prompt=question"], "data.prompt has no effect here, because"),
        (["method=lora"], "method trains an adapter, which is useless on a new model"),
        (["distributed.fsdp_size=2"], "distributed shards a checkpoint"),
        (["data.train_tokens=5", "data.tokens_per_parameter=2"], "but they set the same thing"),
        (["data.train_tokens=5", "training.num_train_epochs=2"], "both set the length of training"),
        (["model=some/model", "tokenizer=bpe:300"], "tokenizer is given, but the model some/model has its own"),
    ],
)
def test_what_does_not_go_with_pretraining_is_said(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, settings, model="scratch:1m", data="builtin:python-stdlib")


def test_a_fine_tuning_recipe_is_not_pretrained() -> None:
    with pytest.raises(RecipeError, match="which is not pretraining. Type sbft train instead of sbft pretrain"):
        for_pretraining(load_recipe("quickstart"))


def test_questions_and_answers_are_not_text(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(
        DataError, match="no column 'text' with text to pretrain on; its columns are 'prompt', 'completion'"
    ):
        prepare(make(f"data.train={path}"))
    with pytest.raises(DataError, match="no built-in text 'builtin:perl', only builtin:python-stdlib"):
        prepare(make("data.train=builtin:perl"))


def test_text_of_the_hub_is_prepared_first(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    with pytest.raises(
        DataError, match="tokenizer is bpe:300, which is trained on local text, and allenai/c4 is streamed"
    ):
        prepare(make("data.train=allenai/c4"))
    recipe = make("data.train=allenai/c4", f"tokenizer={tokenizer}")
    with pytest.raises(
        DataError, match="not prepared on this machine .* Type sbft prepare-data with this recipe first"
    ):
        prepare(recipe)

    from datasets import IterableDataset

    asked: list[Any] = []

    def load(*where: Any, **how: Any) -> IterableDataset:
        asked.append((where, how))
        return IterableDataset.from_generator(lambda: ({"text": text, "url": "u"} for text in WORDS))

    monkeypatch.setattr("datasets.load_dataset", load)
    files = prepare_data(recipe)
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert 1000 <= files.tokens[TRAIN] < 1100 and files.tokens[VALIDATION] > 0
    own = tiny_tokenizer()
    ids = np.fromfile(files.path(TRAIN), np.uint16).tolist()
    first = own(WORDS[0])["input_ids"]
    assert ids[: len(first) + 1] == [*first, own.eos_token_id]
    with pytest.raises(DataError, match="validation part of allenai/c4 has .* fewer than one window"):
        prepare(make("data.train=allenai/c4", f"tokenizer={tokenizer}", "data.max_length=900"))


def test_of_two_that_need_the_tokens_at_once_one_makes_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    monkeypatch.setenv("SBFT_CACHE", str(tmp_path / "fresh"))
    trained: list[int] = []

    def train(texts: Any, size: int) -> Any:
        trained.append(size)
        time.sleep(0.1)
        return train_bpe(texts, size)

    monkeypatch.setattr(token_data, "train_bpe", train)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: token_data.load_tokens(recipe)[1].train.path, range(2))
    assert first == second and trained == [300]
    to = tmp_path / "to"
    to.mkdir()
    with FileLock(to / ".lock"), pytest.raises(DataError, match="Another process is preparing tokens in"):
        prepare_data(recipe, to)


def test_a_checkpoint_goes_on_with_its_own_tokenizer(make: Make, tiny_dir: Path, tmp_path: Path) -> None:
    recipe = make("tokenizer=null", "training.max_steps=2", "method=sbft", model=str(tiny_dir))
    record = run(recipe)
    assert record.status == "ok" and record.tokens == 2 * 4 * LENGTH and record.dtype == "bfloat16"
    other = prepare_data(make(), tmp_path / "others")
    assert is_token_folder(other.folder)
    with pytest.raises(DataError, match=r"made by the tokenizer bpe:300, which is not that of"):
        prepare(make("tokenizer=null", f"data.train={other.folder}", model=str(tiny_dir)))
    with pytest.raises(DataError, match="tokenizer is bpe:300, but the tokens in .* come with their own"):
        prepare(make(f"data.train={other.folder}"))
    assert len(prepare(make("tokenizer=null", f"data.train={other.folder}")).examples) == other.tokens[TRAIN] // LENGTH


def test_a_check_of_pretraining(make: Make) -> None:
    found = check(make())
    assert found.length.steps == 8 and found.length.tokens == 8 * 4 * LENGTH
    assert found.prediction is not None and found.prediction.parts["weights"] > 0
    assert not {"end-not-learned", "begin-token-missing", "examples-truncated"} & {one.key for one in found.findings}


def test_the_verbs(make: Make, tmp_path: Path) -> None:
    recipe = make("training.max_steps=1", "save_model=false")
    path = tmp_path / "my.yaml"
    path.write_text(recipe.to_yaml())
    shell = CliRunner()
    done = shell.invoke(app, ["prepare-data", str(path), "--to", str(tmp_path / "tokens")])
    assert done.exit_code == 0 and "tokens to train on" in done.output and is_token_folder(tmp_path / "tokens")
    again = shell.invoke(app, ["prepare-data", str(path), "--to", str(tmp_path / "tokens")])
    assert again.exit_code == 2 and "holds tokens already" in again.output
    assert shell.invoke(app, ["pretrain", str(path)]).exit_code == 0
    assert RunRecord.load(tmp_path / "run").steps == 1
    refused = shell.invoke(app, ["pretrain", "quickstart"])
    assert refused.exit_code == 2 and "is not pretraining" in refused.output
