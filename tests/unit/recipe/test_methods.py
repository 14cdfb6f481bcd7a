"""Every method really trains a tiny model, and is what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from sbft.data.sources import read_splits
from sbft.errors import MissingPackageError, ModelError
from sbft.models.load import load_model, load_tokenizer
from sbft.recipe import load_recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.build import prepare_model
from sbft.runs.measurement import measure
from sbft.runs.prepare import evaluation_rows
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run
from sbft.tokens import FINE_TUNING_HALF_LIFE
from tests.tiny import save_tiny

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(40)]
ADAPTERS = [name for name, method in METHODS.items() if method.lora_defaults is not None]
FULL = [name for name in METHODS if name not in ADAPTERS]

Train = Callable[..., RunRecord]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:34]), ("test", ROWS[34:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Optimizers(TrainerCallback):
    """Keeps the settings of the first parameter group of the optimizer that trained."""

    def __init__(self) -> None:
        self.name = ""
        self.group: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"
        self.group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        self.state = {
            (name, key): value.dtype
            for name, parameter in kwargs["model"].named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        self.arguments = args


@pytest.fixture
def train(tiny_dir: Path, data: Path, tmp_path: Path) -> Train:
    def make(method: str, *overrides: str, model: Path = tiny_dir, callbacks: Any = (), **options: Any) -> RunRecord:
        every = [f"data.eval={data / 'test.jsonl'}", "training.logging_steps=1", *overrides]
        recipe = load_recipe(
            None, every, model=str(model), data=str(data / "train.jsonl"),
            method=method, output_dir=str(tmp_path / method),
        )  # fmt: skip
        return run(recipe, callbacks=callbacks, **options)

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(iter(folder.glob("*model.safetensors"))))


HALF_LIFE = {"second_moment_half_life": round(FINE_TUNING_HALF_LIFE), "beta2": None}
PER_STEP = {"second_moment_half_life": None, "beta1": 0.9, "beta2": 0.95}
ABSOLUTE = {"scale_parameter": False, "relative_step": False}
EXPECTED: dict[str, tuple[str, dict[str, Any], torch.dtype, int]] = {
    "sbft": ("sbft.Adafactor", {**HALF_LIFE, "schedule": "half_life"}, torch.bfloat16, 1),
    **{
        f"sbft-{form}": ("sbft.Adafactor", {**HALF_LIFE, "schedule": "half_life"}, torch.bfloat16, 1)
        for form in ("int12", "int8", "int4")
    },
    "sgd": ("sbft.SGD", {"momentum": 0.0}, torch.bfloat16, 1),
    "adam": ("sbft.AdamW", {**HALF_LIFE, "beta1": 0.9}, torch.float32, 1),
    "adam-accum": ("sbft.AdamW", PER_STEP, torch.float32, 16),
    "adam-batch": ("sbft.AdamW", PER_STEP, torch.float32, 16),
    "muon": ("sbft.Muon", {**HALF_LIFE, "momentum": 0.95, "matrices": True}, torch.bfloat16, 1),
    "sinkgd": ("sbft.SinkGD", {**HALF_LIFE, "rest_optimizer": "adafactor", "matrices": True}, torch.bfloat16, 1),
    "row-adafactor": ("sbft.RowAdafactor", {**HALF_LIFE, "relative_step": True}, torch.bfloat16, 1),
    "adam8bit": ("bitsandbytes.AdamW", {"betas": (0.9, 0.999)}, torch.bfloat16, 16),
    "hf-adafactor": ("transformers.Adafactor", ABSOLUTE, torch.bfloat16, 1),
    "lora": ("torch.AdamW", {"betas": (0.9, 0.999), "fused": True}, torch.float32, 1),
    "qlora": ("torch.AdamW", {"betas": (0.9, 0.999), "fused": True}, torch.float32, 1),
}
"""The optimizer and its settings, the dtype in which the trained weights are saved, and the examples per step."""


ALIKE = ("hf-adafactor", "row-adafactor", "sinkgd", "muon", "sbft-int12", "adam8bit")
"""Methods whose parts are also trained by other tests."""


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.long] * (method in ALIKE)) for method in METHODS]
)
def test_every_method_trains_and_saves_what_it_measured(
    method: str, train: Train, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    optimizer, settings, dtype, examples = EXPECTED[method]
    # Rates at which a few steps have an effect on a tiny model with random weights.
    rates = {"sgd": 0.1, "sbft": 1e-2, "row-adafactor": 1e-2, "sinkgd": 1e-3, "lora": 1e-2, "qlora": 1e-2}
    rate = rates.get("sbft" if method.startswith("sbft-") else method, 5e-3)
    seen = Optimizers()
    # The model is also evaluated before training, which must not keep it from learning.
    record = train(method, f"training.learning_rate={rate}", "training.num_train_epochs=3", callbacks=[seen])
    assert (record.status, record.error, seen.name) == ("ok", None, optimizer)
    assert {key: seen.group[key] for key in settings} == settings
    assert record.per_device_batch_size * record.gradient_accumulation_steps == examples
    assert record.steps == 3 * -(-34 // examples)
    assert record.metrics["loss"] < record.metrics_before["loss"] - 0.3

    out = tmp_path / method
    saved = weights(out)
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    files = [path for path in out.iterdir() if path.suffix == ".safetensors"]
    assert record.saved_bytes == sum(path.stat().st_size for path in files)
    count = sum(tensor.numel() for tensor in saved.values())
    # A tied head is saved once, and counted once.
    assert record.trainable_parameters == count
    assert record.saved_bytes >= count * dtype.itemsize
    assert record.parameters == 139584 + (count if method in ADAPTERS else 0)
    assert (record.memory["optimizer_state"] or 0) > 0 or method == "sgd"
    assert (record.total_s or 0) > (record.train_s or 0) + (record.eval_s or 0) > 0

    recipe = resolve(load_recipe(out / "recipe.yaml"))
    rows = evaluation_rows(read_splits(recipe.data))
    assert rows is not None
    loaded = load_model(str(out), dtype=torch.float32 if method.startswith("adam-") else torch.bfloat16)
    again = measure(recipe, loaded, load_tokenizer(str(out)), rows)
    assert again["loss"] == pytest.approx(record.metrics["loss"], rel=1e-3)


def test_the_rivals_are_what_people_run(train: Train) -> None:
    seen = Optimizers()
    train("adam8bit", "training.max_steps=1", callbacks=[seen])
    moments = {dtype for (name, key), dtype in seen.state.items() if key == "state1" and "up_proj" in name}
    assert moments == {torch.uint8}
    moments = {dtype for (name, key), dtype in seen.state.items() if key == "state1" and "embed" in name}
    assert moments == {torch.float32}
    assert (seen.arguments.max_grad_norm, seen.arguments.logits_free_loss) == (1.0, False)
    train("hf-adafactor", "training.max_steps=1", callbacks=[seen])
    assert (seen.arguments.max_grad_norm, seen.arguments.logits_free_loss) == (1.0, False)


def test_one_name_of_a_layer_is_a_name_and_no_pattern(train: Train, tmp_path: Path) -> None:
    train("lora", "lora.target_modules=q_proj", "training.max_steps=1")
    assert {name.split(".")[-3] for name in weights(tmp_path / "lora")} == {"q_proj"}


def test_accumulating_and_batching_see_the_same_and_learn_the_same(train: Train, tmp_path: Path) -> None:
    one, other = (
        train(method, "training.learning_rate=1e-3", "training.num_train_epochs=2")
        for method in ("adam-accum", "adam-batch")
    )
    assert one.tokens == other.tokens == 2 * (one.data["tokens"] or 0) and one.steps == other.steps == 6
    assert [entry["tokens"] for entry in one.history] == [entry["tokens"] for entry in other.history]
    # The same sums in a different order; Adam's division by a small root enlarges rounding errors by orders of magnitude.
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-3)


def test_the_history_has_the_tokens_of_each_step_in_all_sessions_of_a_run(train: Train, tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise ZeroDivisionError("made on purpose")

    saving = ("training.max_steps=8", "training.save_strategy=steps", "training.save_steps=2")
    with pytest.raises(ZeroDivisionError):
        train("sbft", *saving, callbacks=[Break()])
    broken = RunRecord.load(tmp_path / "sbft")
    assert [entry["step"] for entry in broken.history] == [1, 2, 3, 4] and (broken.total_s or 0) > 0
    record = train("sbft", *saving, resume=True)
    assert [entry["step"] for entry in record.history] == list(range(1, 9))
    tokens = [entry["tokens"] for entry in record.history]
    assert tokens == sorted(set(tokens)) and tokens[-1] == record.tokens
    assert {entry["learning_rate"] for entry in record.history} == {record.learning_rate}
    assert record.train_loss is None and all(entry["loss"] > 0 for entry in record.history)
    assert (record.total_s or 0) > (broken.total_s or 0) and RunRecord.load(tmp_path / "sbft") == record


def test_a_record_of_a_run_under_way_says_so(train: Train, tmp_path: Path) -> None:
    found: list[RunRecord] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(RunRecord.load(tmp_path / "sbft"))

    train("sbft", "training.max_steps=1", callbacks=[Look()])
    assert (found[0].status, found[0].error) == ("unfinished", None)


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        ("sbft", True),
        ("sbft", False),
        pytest.param("adam", True, marks=pytest.mark.long),
        pytest.param("hf-adafactor", False, marks=pytest.mark.long),
    ],
)
def test_frozen_embeddings_keep_every_bit_while_the_rest_learns(
    method: str, tied: bool, train: Train, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", tied=tied)
    rate = 1e-2 if method == "sbft" else 5e-3
    overrides = (f"training.learning_rate={rate}", "training.num_train_epochs=3")
    record = train(method, "freeze=[embeddings]", *overrides, model=model)
    before, after = weights(model), weights(tmp_path / method)
    frozen = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, tensor in before.items():
        assert after[name].equal(tensor.to(after[name].dtype)) == (name in frozen), name
    assert record.metrics["loss"] < record.metrics_before["loss"] - 0.1
    kept = sum(before[name].numel() for name in frozen)
    size = 4 if method == "adam" else 2
    assert record.trainable_parameters == record.parameters - kept
    largest = max(tensor.numel() for name, tensor in before.items() if name not in frozen)
    held = largest if method == "sbft" else record.trainable_parameters
    assert record.memory["gradients"] == size * held


def test_patterns_freeze_the_parameters_that_they_name(tiny_dir: Path) -> None:
    recipe = resolve(load_recipe(None, ["freeze=['model.layers.0.*', '*norm*']"], model=str(tiny_dir), data="d.jsonl"))
    for name, parameter in prepare_model(recipe).named_parameters():
        assert parameter.requires_grad == (not name.startswith("model.layers.0.") and "norm" not in name), name


def test_a_tied_head_is_frozen_by_its_own_name(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, tied=True)
    prepared = prepare_model(resolve(load_recipe(None, ["freeze=[lm_head.weight]"], model=str(model), data="d")))
    still = [name for name, parameter in prepared.named_parameters() if not parameter.requires_grad]
    assert still == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("freeze", "said"), [("[nothing.*]", "'nothing.*', which matches no parameter"), ("['*']", "leaves no weight")]
)
def test_a_freeze_that_cannot_be_is_refused(freeze: str, said: str, tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match=said.replace("*", r"\*")):
        prepare_model(resolve(load_recipe(None, [f"freeze={freeze}"], model=str(tiny_dir), data="d.jsonl")))


def test_the_settings_of_an_adapter_reach_peft(train: Train, tmp_path: Path) -> None:
    settings = ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.1", "lora.rslora=true", "lora.dora=true")
    record = train("lora", "training.max_steps=2", "lora.target_modules=[q_proj]", *settings)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    assert [config[name] for name in names] == [4, 8, 0.1, True, True, ["q_proj"]]
    # Two layers of 64 x 64: two factors of rank 4, and the magnitudes of the rows.
    assert record.trainable_parameters == 2 * (4 * 64 + 64 * 4 + 64)


def test_embeddings_are_trained_whole_beside_the_adapter_and_a_tied_head_with_them(
    train: Train, tmp_path: Path
) -> None:
    tied_dir = save_tiny(tmp_path / "tied", tied=True)
    settings = (
        "training.max_steps=2",
        "training.learning_rate=1e-2",
        "lora.modules_to_save=[embed_tokens]",
        "dtype=float32",
    )
    record = train("lora", "lora.target_modules=[q_proj]", "lora.rank=4", *settings, model=tied_dir)
    assert record.trainable_parameters == 2 * (4 * 64 + 64 * 4) + 512 * 64
    trained = load_model(str(tmp_path / "lora"), dtype=torch.float32)
    embedding, head = trained.get_input_embeddings().weight, trained.get_output_embeddings().weight
    untrained = load_model(str(tied_dir), dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(embedding, head) and not torch.equal(embedding, untrained)


def test_dora_over_four_bits_trains(train: Train) -> None:
    record = train("qlora", "lora.dora=true", "training.learning_rate=5e-3", "training.num_train_epochs=2")
    assert record.metrics["loss"] < record.metrics_before["loss"]


@pytest.fixture
def in_four_bits(tiny_dir: Path) -> Any:
    return load_model(str(tiny_dir), dtype=torch.bfloat16, quantization="nf4")


def test_four_bits_weigh_a_quarter_and_leave_the_rest_as_it_was(in_four_bits: Any, train: Train) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = {name: module for name, module in in_four_bits.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 14 and "lm_head" not in layers
    assert all(
        layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers.values()
    )
    others = [p for name, p in in_four_bits.named_parameters() if name.rpartition(".")[0] not in layers]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}

    record = train("qlora", "training.max_steps=1")
    held = sum(layer.in_features * layer.out_features for layer in layers.values())
    adapter, rest = 4 * record.trainable_parameters, 2 * sum(parameter.numel() for parameter in others)
    # Half a byte per weight and a byte per block of 64. On top come rotary frequencies and, for each of 14 layers, the
    # scales of the scales and tables of 16 + 256 values of 4 bytes.
    least = held // 2 + held // 64 + adapter + rest
    assert least < (record.memory["weights"] or 0) < least + 14 * 4 * (16 + 256 + 16) + 1024


def test_four_bits_can_be_trained_after_they_were_evaluated(in_four_bits: Any) -> None:
    layer = in_four_bits.model.layers[0].mlp.down_proj
    inputs = torch.randn(1, 5, layer.in_features, dtype=torch.bfloat16, device=layer.weight.device)

    def gradient() -> Tensor:
        asked = inputs.clone().requires_grad_()
        layer.train()(asked).float().square().sum().backward()
        assert asked.grad is not None
        return asked.grad

    before = gradient()
    with torch.no_grad():
        evaluated = layer.eval()(inputs)
    assert evaluated.equal(layer.train()(inputs)) and gradient().equal(before)


def test_bitsandbytes_that_does_not_work_here_is_a_result_with_its_reason(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the native library was not found")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", broken)
    for method in ("qlora", "adam8bit"):
        with pytest.raises(MissingPackageError, match="does not work on this machine's"):
            train(method)
        record = RunRecord.load(tmp_path / method)
        assert record.status == "unsupported" and "the native library was not found" in (record.error or "")


def test_labels_are_scored_and_their_names_are_trained_on(train: Train, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {n} odd?", "completion": n % 2} for n in range(24)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = "data.label_names={0: 'no', 1: 'yes'}"
    source = f"data.train={tmp_path / 'odd.jsonl'}"
    overrides = (source, "data.eval=null", "data.validation_size=6", names, "evaluation.labels=auto")
    record = train("sbft", *overrides, "evaluation.metrics=[label_accuracy]", "training.max_steps=2")
    assert 0 <= record.metrics["label_accuracy"] <= 1 and "label_accuracy" in record.metrics_before
    written = (tmp_path / "sbft" / str(record.predictions)).read_text().splitlines()
    assert {json.loads(line)["reference"] for line in written} <= {"no", "yes"}


def test_a_method_names_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHODS["qlora"].missing_packages == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert METHODS["qlora"].missing_packages == ["peft", "bitsandbytes"] and METHODS["sbft"].missing_packages == []


def test_a_run_need_not_save_its_model(train: Train, tmp_path: Path) -> None:
    record = train("sbft", "save_model=false", "training.max_steps=1")
    assert (record.status, record.saved_bytes) == ("ok", None)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "run.json" in left and not any(name.endswith(".safetensors") for name in left)
