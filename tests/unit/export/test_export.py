"""Models written for other tools: whole, merged, and as an adapter made from the difference to their base."""

from __future__ import annotations

import json
import resource
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import DiskError, ExportError, ModelError
from sbft.export import checkpoint as export
from sbft.export import low_rank
from sbft.export.checkpoint import export_model
from sbft.export.low_rank import decompose, extract_lora
from sbft.models.load import load_model
from sbft.models.quantized import write_note
from sbft.models.tensor_files import TensorFiles
from sbft.recipe import load_recipe, resolve
from sbft.runs.record import RunRecord
from tests.tiny import KINDS, save_tiny, tiny_tokenizer

peft = pytest.importorskip("peft")

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(8)]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
Change = Callable[[str, Tensor], Tensor]


def noise(name: str, weight: Tensor) -> Tensor:
    """Change a weight as training does: at full rank, and always alike for the same name."""
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
    return (weight.float() + 0.05 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def linear_only(name: str, weight: Tensor) -> Tensor:
    return noise(name, weight) if name.split(".")[-2] in LINEAR else weight


def fine_tuned(base: Path, folder: Path, change: Change = noise) -> Path:
    """A copy of a checkpoint whose weights have been changed."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: change(name, weight).contiguous() for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def with_adapter(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(3, 40, device=model.device)[None]).logits
    return result.cpu()  # a model in 4 bits is on the GPU if there is one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """The folder of a run of full fine-tuning, with files that do not belong to the model."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    fine_tuned(tiny_dir, folder, linear_only)
    data = folder.parent / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = resolve(
        load_recipe(
            None,
            ["evaluation.metrics=[exact_match]", "evaluation.max_new_tokens=4", "evaluation.limit=6"],
            model=str(tiny_dir),
            data=str(data),
            eval_data=str(data),
        )
    )
    recipe.data.allow_overlap = True
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    record = RunRecord(method="sbft", model=str(tiny_dir), dataset=str(data), seed=0, status="ok")
    record.metrics, record.metrics_before = {"loss": 1.25, "exact_match": 0.75}, {"loss": 6.5}
    record.save(folder)
    (folder / "predictions.jsonl").write_text("secret")
    (folder / "README.md").write_text("The card")
    return folder


# Whole models.


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_the_same_model_in_its_new_folder(kind: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "run", kind)
    written = export_model(source, tmp_path / "out")
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], weight) and after[name].dtype == weight.dtype for name, weight in before.items()
    )
    assert (written.files, written.merged_into) == (1, None)
    assert written.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_it_goes_with_its_tokenizer_and_card_but_not_with_what_is_private(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not {"run.json", "recipe.yaml", "predictions.jsonl"} & names
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", run))
    assert ours.chat_template == theirs.chat_template and ours("A fox")["input_ids"] == theirs("A fox")["input_ids"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [tmp_path / "out", *(tmp_path / "out").iterdir()])


def test_another_dtype_is_that_of_the_weights_and_of_the_config(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "wide", dtype="float32")
    export_model(tmp_path / "wide", tmp_path / "half", dtype="float16")
    before, wide, half = (weights_of(folder) for folder in (run, tmp_path / "wide", tmp_path / "half"))
    for name, weight in before.items():
        assert torch.equal(wide[name], weight.float()) and wide[name].dtype == torch.float32
        assert torch.equal(half[name], weight.half()) and half[name].dtype == torch.float16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_weights_too_large_for_float16_are_refused_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    def large(name: str, weight: Tensor) -> Tensor:
        return weight + 1e5 if name == "model.norm.weight" else weight

    source = fine_tuned(run, tmp_path / "large", large)
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds 9.984e\+04.*--dtype bfloat16"):
        export_model(source, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


class Watched:
    """Counts the tensors that were read from files and are still in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[int, int] = {}
        self.most = self.most_bytes = self.read = 0
        original = TensorFiles.read

        def read(files: TensorFiles, name: str, dtype: torch.dtype | None = None) -> Tensor:
            tensor = original(files, name, dtype)
            self.read += 1
            self.held[self.read] = tensor.nbytes
            weakref.finalize(tensor, self.held.pop, self.read)
            self.most, self.most_bytes = max(self.most, len(self.held)), max(self.most_bytes, sum(self.held.values()))
            return tensor

        monkeypatch.setattr(TensorFiles, "read", read)


def test_several_files_of_a_size_hold_the_same_and_one_is_in_memory_at_a_time(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    written = export_model(run, tmp_path / "many", max_shard_bytes=50_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert written.files == len(files) > 3
    largest = max(weight.nbytes for weight in weights_of(run).values())
    # The tensors of one file may still be held while the first of the next file is read.
    assert watched.most_bytes <= 2 * max(50_000, largest) < sum(file.stat().st_size for file in files)
    before, after = weights_of(run), weights_of(tmp_path / "many")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    # The files are read as one checkpoint again.
    assert export_model(tmp_path / "many", tmp_path / "one").files == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(tmp_path / "one").items())


def test_what_lies_at_the_destination_is_kept_unless_it_is_a_model_and_may_go(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ExportError, match="not empty. Add --overwrite"):
        export_model(run, out)
    with pytest.raises(ExportError, match="which has no model"):
        export_model(run, out, overwrite=True)
    assert (out / "precious").exists()
    (out / "config.json").touch()
    export_model(run, out, overwrite=True)
    assert not (out / "precious").exists() and weights_of(out) and [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "run.json").touch()
    with pytest.raises(ExportError, match="which is the folder of a run"):
        export_model(run, out, overwrite=True)
    for destination in (run, run.parent, run / ".." / "mine"):
        with pytest.raises(ExportError, match="would replace"):
            export_model(run, destination, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file"):
        export_model(run, tmp_path / "file")
    with pytest.raises(ExportError, match="expected one of bfloat16, float32, float16; the nearest is bfloat16"):
        export_model(run, tmp_path / "new", dtype="bfloat")


def test_an_interrupted_export_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(run, tmp_path / "out")
    monkeypatch.setattr(export, "write_shards", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    for destination in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            export_model(run, tmp_path / destination, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and weights_of(tmp_path / "out")


def test_a_disk_that_takes_no_more_is_said_and_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    size = (run / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(DiskError) as told:
            export_model(run, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(told.value)
    assert said.startswith(f"The exported model could not be written to {tmp_path / 'out'}: ")
    assert "are free there" in said and said.endswith("MiB are needed.")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and weights_of(tmp_path / "out")


def test_what_is_no_whole_model_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        export_model(tmp_path / "none", tmp_path / "out")
    for step in (5, 10, 9):
        (tmp_path / "begun" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"run has not ended.*sbft export .*checkpoint-10 --to DIR"):
        export_model(tmp_path / "begun", tmp_path / "out")
    with pytest.raises(ModelError, match="config.json or adapter_config.json was expected"):
        export_model(tmp_path / "begun" / "checkpoint-5", tmp_path / "out")
    pickled = shutil.copytree(run, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors .*there is .*pytorch_model\.bin"):
        export_model(pickled, tmp_path / "out")
    cut = shutil.copytree(run, tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    for part in (content[:-1], content[:100], b"x"):
        (cut / "model.safetensors").write_bytes(part)
        with pytest.raises(ModelError, match="no complete safetensors file"):
            export_model(cut, tmp_path / "out")
    export_model(run, tmp_path / "many", max_shard_bytes=50_000)
    missing = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match=f"names {missing.name}, which is missing"):
        export_model(tmp_path / "many", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Adapters merged into their base.


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapter_is_added_to_its_base_and_rounded_once(tiny_dir: Path, tmp_path: Path) -> None:
    source = save_adapter(tiny_dir, tmp_path / "lora")
    with pytest.raises(ExportError, match="would replace .*tiny"):
        export_model(source, tiny_dir, overwrite=True)
    written = export_model(source, tmp_path / "out")
    assert written.merged_into == str(tiny_dir)
    base, merged, adapter = (
        weights_of(tiny_dir),
        weights_of(tmp_path / "out"),
        load_file(source / low_rank.ADAPTER_FILE),
    )
    for name, weight in base.items():
        if name.split(".")[-2] in LINEAR:
            factors = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{one}.weight"] for one in "BA")
            up, down = (factor.numpy() for factor in factors)
            weight = (weight.float() + torch.from_numpy(12 / 4 * up @ down)).bfloat16()
        # Products summed in a different order may round to the neighbouring value.
        torch.testing.assert_close(merged[name], weight, rtol=2**-7, atol=1e-7)
    # An adapter that was saved alone has no tokenizer: that of its base is written.
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == tiny_tokenizer().pad_token


def test_the_base_of_an_adapter_is_what_is_asked_for_then_what_the_recipe_names(
    run: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    source = save_adapter(tiny_dir, tmp_path / "lora")
    config = source / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_dir), "/no/such/folder"))
    with pytest.raises(ModelError, match="no folder /no/such/folder"):
        export_model(source, tmp_path / "none")
    code, out, err = sbft("export", source, "--to", tmp_path / "asked", "--base", tiny_dir)
    assert code == 0 and f"The adapter is merged into {tiny_dir}.\nWritten to {tmp_path / 'asked'}:" in out, err
    shutil.copyfile(run / "recipe.yaml", source / "recipe.yaml")
    assert export_model(source, tmp_path / "named").merged_into == str(tiny_dir)
    asked, named = weights_of(tmp_path / "asked"), weights_of(tmp_path / "named")
    assert all(torch.equal(named[name], weight) for name, weight in asked.items())


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
def test_a_merged_model_answers_as_the_adapter_on_its_base(
    settings: dict[str, bool], tiny_dir: Path, tmp_path: Path
) -> None:
    source = save_adapter(tiny_dir, tmp_path / "lora", **settings)
    export_model(source, tmp_path / "out", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    expected = logits(with_adapter(tiny_dir, source, torch.float32))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(load_model(str(tiny_dir), dtype=torch.float32)), atol=1e-2)


def test_an_adapter_is_merged_in_float32_where_float16_is_written(tiny_dir: Path, tmp_path: Path) -> None:
    source = save_adapter(tiny_dir, tmp_path / "lora")
    export_model(source, tmp_path / "wide", dtype="float32")
    export_model(source, tmp_path / "half", dtype="float16")
    wide, half = weights_of(tmp_path / "wide"), weights_of(tmp_path / "half")
    assert all(torch.equal(half[name], weight.half()) for name, weight in wide.items())


def test_a_base_in_4_bits_is_written_with_the_values_the_adapter_was_trained_on(tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_adapter(tiny_dir, tmp_path / "lora")
    write_note(source, "nf4")
    assert export_model(source, tmp_path / "out", dtype="float32").dequantized
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = logits(load_model(str(source), dtype=torch.float32))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, logits(with_adapter(tiny_dir, source, torch.float32)), atol=1e-2)


# Adapters extracted from whole models.


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / low_rank.ADAPTER_FILE)


def differences(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    return {name: after[name].double().numpy() - before[name].double().numpy() for name in after}


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_the_adapter_on_the_base_is_the_model(kind: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", kind)
    tuned = fine_tuned(base, tmp_path / "tuned")
    made = extract_lora(tuned, tmp_path / "out", 64, base=str(base), dtype="float32")
    assert made.rank == 64
    merged = dict(with_adapter(base, tmp_path / "out", torch.bfloat16).merge_and_unload().state_dict())
    before, after = weights_of(base), weights_of(tuned)
    adapted = {kind.name for kind in made.kinds if kind.adapted}
    assert adapted == set(LINEAR if kind != "gpt2" else ("c_attn", "c_proj", "c_fc"))
    for name, weight in after.items():
        if name.split(".")[-2] in adapted and name.endswith(".weight"):
            # One rounding to bfloat16, and float32 errors in the decomposition of differences of some hundredths.
            torch.testing.assert_close(merged[name], weight, rtol=2**-8, atol=1e-5)
            assert not torch.equal(before[name], weight)
        else:
            assert torch.equal(merged[name], before[name])
    whole = {kind.name: kind.kept / kind.difference for kind in made.kinds}
    for name, share in whole.items():
        assert share == pytest.approx(1.0 if name in adapted else 0.0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_share_kept_is_that_of_the_largest_singular_values(rank: int, tiny_dir: Path, tmp_path: Path) -> None:
    tuned = fine_tuned(tiny_dir, tmp_path / "tuned")
    made = extract_lora(tuned, tmp_path / "out", rank, base=str(tiny_dir), dtype="float32")
    kept: dict[str, float] = {}
    difference: dict[str, float] = {}
    for name, matrix in differences(tiny_dir, tuned).items():
        kind = name.split(".")[-2]
        difference[kind] = difference.get(kind, 0.0) + float(np.square(matrix).sum())
        if kind in LINEAR:
            values = np.linalg.svd(matrix, compute_uv=False)
            kept[kind] = kept.get(kind, 0.0) + float(np.square(values[:rank]).sum())
    assert {kind.name: kind.difference for kind in made.kinds} == pytest.approx(difference, rel=1e-5)
    assert {kind.name: kind.kept for kind in made.kinds if kind.adapted} == pytest.approx(kept, rel=1e-4)
    assert made.share_kept == pytest.approx(sum(kept.values()) / sum(difference.values()), rel=1e-4)
    assert {kind.name for kind in made.kinds} == difference.keys()
    # The share that it reports to keep is what PEFT adds.
    model = with_adapter(tiny_dir, tmp_path / "out", torch.float32)
    name = "model.layers.1.mlp.up_proj"
    added = model.base_model.model.get_submodule(name).get_delta_weight("default").double().detach().numpy()
    matrix = differences(tiny_dir, tuned)[f"{name}.weight"]
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.square(matrix - added).sum() == pytest.approx(np.square(values[rank:]).sum(), rel=1e-4)


def test_a_difference_of_low_rank_is_kept_whole_from_that_rank_on(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.float32)

    def rank_three(name: str, weight: Tensor) -> Tensor:
        if name.split(".")[-2] not in LINEAR:
            return weight
        generator = torch.Generator().manual_seed(len(name))
        up, down = (torch.randn(size, generator=generator) for size in ((len(weight), 3), (3, weight.shape[1])))
        return weight + 0.1 * up @ down

    tuned = fine_tuned(base, tmp_path / "tuned", rank_three)
    shares = [extract_lora(tuned, tmp_path / str(r), r, base=str(base)).share_kept for r in (2, 3, 8)]
    assert shares[0] < 0.95 and shares[1:] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert {tensor.dtype for tensor in adapter_tensors(tmp_path / "3").values()} == {torch.float32}
    # And the resulting model gives the same logits.
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32))
    torch.testing.assert_close(
        logits(with_adapter(base, tmp_path / "3", torch.float32)), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("noise_level", [0.0, 0.02])
def test_few_directions_of_a_large_matrix_are_found_almost_exactly(
    noise_level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_EXACT_UP_TO", 128)
    torch.manual_seed(3)
    slowly = torch.arange(1, 193).float() ** -0.7  # as the singular values of a fine-tuning difference fall
    left, right = (torch.linalg.qr(torch.randn(size, 192))[0] for size in (256, 320))
    matrix = (left * slowly) @ right.T + noise_level * torch.randn(256, 320)
    before = torch.random.get_rng_state()
    up, down = decompose(matrix, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(again, first) for again, first in zip(decompose(matrix, 8), (up, down), strict=True))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    lost = float((matrix - up @ down).square().sum())
    best = float(np.square(values[8:]).sum())
    assert best * (1 - 1e-5) <= lost <= 1.002 * best
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_one_pair_of_tensors_is_in_memory_at_a_time(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = fine_tuned(tiny_dir, tmp_path / "tuned")
    export_model(tuned, tmp_path / "many", max_shard_bytes=50_000)
    watched = Watched(monkeypatch)
    extract_lora(tmp_path / "many", tmp_path / "out", 4, base=str(tiny_dir))
    tensors = len(TensorFiles(tuned)._entries)
    assert watched.read == 2 * tensors
    # A variable holds one pair until the next has been read.
    assert watched.most <= 4 < tensors


def test_matrices_smaller_than_the_rank_have_their_own(tiny_dir: Path, tmp_path: Path) -> None:
    tuned = fine_tuned(tiny_dir, tmp_path / "tuned", linear_only)
    made = extract_lora(tuned, tmp_path / "out", 48, base=str(tiny_dir))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"k_proj": 32, "v_proj": 32}
    assert (config["r"], config["lora_alpha"], made.rank) == (48, 48, 48)
    assert sorted(config["target_modules"]) == sorted(LINEAR) and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tiny_dir)
    layers = with_adapter(tiny_dir, tmp_path / "out", torch.bfloat16).base_model.model.model.layers
    for name, rank in (("k_proj", 32), ("q_proj", 48)):
        layer = getattr(layers[1].self_attn, name)
        assert layer.lora_A["default"].weight.shape == (rank, 64) and layer.scaling["default"] == 1.0
    kept = {kind.name: kind.kept / kind.difference for kind in made.kinds}
    assert kept["k_proj"] == pytest.approx(1.0, abs=1e-4) and kept["q_proj"] < 0.999


def test_only_layers_that_training_changed_are_in_the_adapter(tiny_dir: Path, tmp_path: Path) -> None:
    def last_layer(name: str, weight: Tensor) -> Tensor:
        return noise(name, weight) if name.startswith("model.layers.1.") and "proj" in name else weight

    tuned = fine_tuned(tiny_dir, tmp_path / "tuned", last_layer)
    extract_lora(tuned, tmp_path / "out", 4, base=str(tiny_dir))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(
        f"model.layers.1.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in LINEAR
    )
    model = with_adapter(tiny_dir, tmp_path / "out", torch.bfloat16)
    assert len(adapter_tensors(tmp_path / "out")) == 2 * len(LINEAR)
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 2 * len(LINEAR)


def test_a_base_whose_names_lack_the_decoders_own_is_the_same_base(tiny_dir: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_dir, tmp_path / "bare")
    weights = {name.removeprefix("model."): weight for name, weight in load_file(bare / "model.safetensors").items()}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    tuned = fine_tuned(tiny_dir, tmp_path / "tuned", linear_only)
    for name, base in (("one", tiny_dir), ("other", bare)):
        extract_lora(tuned, tmp_path / name, 4, base=str(base))
    one, other = adapter_tensors(tmp_path / "one"), adapter_tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_base_in_higher_precision_counts_as_training_loaded_it(tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", dtype=torch.float32)
    tuned = shutil.copytree(wide, tmp_path / "tuned")
    weights = {name: weight.bfloat16() for name, weight in load_file(wide / "model.safetensors").items()}
    changed = {name: linear_only(name, weight) if "up_proj" in name else weight for name, weight in weights.items()}
    save_file(changed, tuned / "model.safetensors", metadata={"format": "pt"})
    made = extract_lora(tuned, tmp_path / "out", 64, base=str(wide))
    assert [kind.name for kind in made.kinds] == ["up_proj"] and made.share_kept == pytest.approx(1.0, abs=1e-4)
    assert {tensor.dtype for tensor in adapter_tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_makes_no_adapter_is_said_and_leaves_nothing(run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = run, base: Path | str | None = tiny_dir, rank: int = 4) -> None:
        with pytest.raises((ExportError, ModelError), match=message):
            extract_lora(source, tmp_path / "out", rank, base=None if base is None else str(base))
        assert not (tmp_path / "out").exists()

    refused("expected at least 1", rank=0)
    refused("There is no folder", source=tmp_path / "none")
    refused("weights in .* equal those of .* no difference to extract", source=tiny_dir)
    refused("no recipe.yaml .*Type --base MODEL", source=tiny_dir, base=None)
    refused("does not match: its lm_head.weight has the shape", base=save_tiny(tmp_path / "wide", hidden=128))
    refused("does not match: it has no weight model.layers.1", base=save_tiny(tmp_path / "flat", layers=1))
    refused("already has a LoRA adapter", source=save_adapter(tiny_dir, tmp_path / "lora"))
    refused("random weights, which are in no file", base="random:tiny")
    refused("There is no folder /no/such", base="/no/such")
    norms = fine_tuned(tiny_dir, tmp_path / "norms", lambda name, weight: weight * 2 if "norm" in name else weight)
    refused("differ only in input_layernorm, post_attention_layernorm, norm,", source=norms)
    broken = fine_tuned(
        tiny_dir, tmp_path / "broken", lambda name, weight: weight * torch.nan if "up" in name else weight
    )
    refused("up_proj.weight has values that are not finite", source=broken)
    with pytest.raises(ExportError, match="would replace"):
        extract_lora(run, tiny_dir, 4, base=str(tiny_dir), overwrite=True)


def test_experts_held_in_one_tensor_are_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    base = tmp_path / "base"
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(base)
    attention = fine_tuned(base, tmp_path / "attention", lambda name, w: noise(name, w) if "q_proj" in name else w)
    assert extract_lora(attention, tmp_path / "out", 4, base=str(base)).share_kept > 0.1
    experts = fine_tuned(base, tmp_path / "experts", lambda name, w: noise(name, w) if "experts" in name else w)
    with pytest.raises(ExportError, match="experts.*such as the experts of a mixture. Leave --as-lora out"):
        extract_lora(experts, tmp_path / "none", 4, base=str(base))


# The command.


def sbft(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_verb_writes_a_whole_model(run: Path, tmp_path: Path) -> None:
    code, out, err = sbft("export", run, "--to", tmp_path / "out", "--dtype", "float32")
    assert (code, err) == (0, "") and "MiB of weights in 1 file." in out
    assert weights_of(tmp_path / "out")["model.norm.weight"].dtype == torch.float32
    code, _, err = sbft("export", run, "--to", run)
    assert code == 2 and "would replace" in err and "Traceback" not in err
    code, _, err = sbft("export", run, "--to", tmp_path / "new", "--base", run)
    assert code == 2 and "requires no base. Leave --base out, or add --as-lora RANK" in err
    code, _, err = sbft("export", run, "--to", tmp_path / "new", "--no-eval")
    assert code == 2 and "--no-eval belongs to --as-lora RANK" in err
    code, _, err = sbft("export", run, "--to", tmp_path / "new", "--as-lora", "4", "--max-shard-size", "1GB")
    assert code == 2 and "an adapter is one file" in err
    code, _, err = sbft("export", run, "--to", tmp_path / "new", "--max-shard-size", "big")
    assert code == 2 and "--max-shard-size is 'big'" in err


def test_the_verb_extracts_measures_and_reports(run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    code, out, err = sbft("export", run, "--to", tmp_path / "out", "--as-lora", "64")
    assert code == 0, err
    assert max(map(len, out.splitlines()[:-1])) <= 80
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["base"], report["rank"], report["evaluation_examples"]) == (str(tiny_dir), 64, 6)
    assert report["share_kept"] == pytest.approx(1.0, abs=1e-3)
    assert sum(kind["share_of_difference"] for kind in report["kinds"].values()) == pytest.approx(1.0)
    assert report["adapter_bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert report["model_bytes"] == sum(weight.nbytes for weight in load_file(run / "model.safetensors").values())
    # The metrics of the run's record are reported beside those of the adapter: the loss of the model it was made from.
    assert report["metrics_full"] == {"loss": 1.25, "exact_match": 0.75} and report["metrics_base"] == {"loss": 6.5}
    losses = {}
    for name, folder in (("full", run), ("base", tiny_dir)):
        code, evaluated, err = sbft(
            "eval",
            folder,
            "--set",
            f"data.eval={run.parent / 'test.jsonl'}",
            "--json",
            *(() if folder is run else ("--data", run.parent / "test.jsonl", "--limit", "6")),
        )
        assert code == 0, err
        losses[name] = json.loads(evaluated)["loss"]
    assert report["metrics"]["loss"] == pytest.approx(losses["full"], abs=0.01)
    assert abs(losses["full"] - losses["base"]) > 0.03
    table = [line.split() for line in out.splitlines()]
    assert ["6", "examples", "base", "model", "full", "model", "adapter"] in table
    assert ["all", "14", "100", "%", "100.0", "%"] in table
    code, _, err = sbft("export", run, "--to", tmp_path / "out", "--as-lora", "4")
    assert code == 2 and "--overwrite" in err


def test_the_verb_says_what_it_could_not_measure(tiny_dir: Path, tmp_path: Path) -> None:
    tuned = fine_tuned(tiny_dir, tmp_path / "tuned")
    code, out, err = sbft("export", tuned, "--to", tmp_path / "out", "--as-lora", "4", "--base", tiny_dir)
    assert code == 0, err
    assert "Not measured:" in out and "no recipe.yaml" in out and "not in the adapter" in out
    code, out, _ = sbft("export", tuned, "--to", tmp_path / "quiet", "--as-lora", "4", "--base", tiny_dir, "--no-eval")
    assert code == 0 and "Not measured" not in out
    assert json.loads((tmp_path / "quiet" / "export.json").read_text())["metrics"] == {}
