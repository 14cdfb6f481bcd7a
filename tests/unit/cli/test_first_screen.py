"""What a new user sees first: the help in groups, names that the shell completes, and what a bug report needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sbft import __version__
from sbft.cli import installation
from sbft.cli.app import GROUPS, app
from sbft.files import shipped_names
from sbft.recipe import Recipe, for_pretraining, in_brief, load_recipe, recipe_names, resolve
from sbft.recipe.methods import METHODS

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "datasets", "numpy", "rich", "yaml"}  # typer itself uses pydantic, to read options


def sbft(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env=environment, prog_name="sbft")
    assert result.exit_code == 0, result.output
    return result.stdout


# Help


def test_the_help_has_every_verb_in_a_group_and_cuts_no_summary_off() -> None:
    verbs = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    assert sorted(verbs) == sorted(name for names in GROUPS.values() for name in names)
    said = sbft("--help", COLUMNS="80")
    lines = said.partition("Train:")[2].splitlines()
    assert [line[:-1] for line in lines if line.endswith(":")] == list(GROUPS)[1:]
    rows = [line for line in lines if line.startswith("  ")]
    # One line for each command: a summary that is too long would continue on a second line.
    assert [row.split()[0] for row in rows] == [name for names in GROUPS.values() for name in names]
    for text in (said, sbft("recipes", "--help", COLUMNS="80")):
        assert "..." not in text.replace("[ARGS]...", "") and max(map(len, text.splitlines())) <= 80


# Shells


def completed(*words: str, shell: str = "bash") -> list[str]:
    """The completions that sbft offers a shell for the last of these words."""
    line = {"COMP_WORDS": "\n".join(("sbft", *words)), "COMP_CWORD": str(len(words))}
    if shell != "bash":
        line = {"_TYPER_COMPLETE_ARGS": " ".join(("sbft", *words)), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return [word for word in sbft(_SBFT_COMPLETE=f"complete_{shell}", **line).splitlines() if word]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my.yaml", "my notes.yaml", "my.jsonl", ".hidden.yaml", "mine/one.yml", "mine/deeper/two.yaml", "quarry/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRETRAINING = ["pretrain-fineweb", "pretrain-stdlib"]
ON_GRIDS = ["sbft-int12", "sbft-int8", "sbft-int4"]
QUICK = ["quickstart", "quickstart-lora", "quickstart-nearest"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["train", ""], [*shipped_names("recipes"), "my.yaml"]),
        (["train", "qu"], ["questions", *QUICK, "quarry/"]),
        (["check", "quickstart-"], QUICK[1:]),
        (["batch-size", "m"], ["mistral-7b-full", "mistral-7b-lora", "mistral-7b-qlora", "mine/", "my.yaml"]),
        (["train", "qwen3-4b-"], ["qwen3-4b-full", "qwen3-4b-lora", "qwen3-4b-qlora"]),
        (["train", "mine/"], ["mine/deeper/", "mine/one.yml"]),
        # If a folder is the only match, the shell completes it itself, without a space after it.
        (["train", "min"], []),
        (["train", "nowhere/"], []),
        (["train", "."], [".hidden.yaml"]),
        (["pretrain", ""], [*PRETRAINING, "my.yaml"]),
        (["prepare-data", "pre"], PRETRAINING),
        (["recipes", "show", "--resolved", "my"], ["my.yaml"]),
        (["recipes", "cp", ""], shipped_names("recipes")),
        (["bench", ""], [*shipped_names("suites"), "my.yaml"]),
        (["bench", "pap"], ["paper-table"]),
        (["train", "quickstart", "--method", ""], list(METHODS)),
        (["train", "--method", "adam-"], ["adam-accum", "adam-batch"]),
        (["plan", "--methods", "lora,sb"], ["lora,sbft", *(f"lora,{name}" for name in ON_GRIDS)]),
        (["plan", "--methods", "sbft,sg,s"], [f"sbft,sg,{name}" for name in (*ON_GRIDS, "sgd", "sinkgd")]),
        (["b"], ["batch-size", "bench"]),
        # The next word is a file, which the shell itself completes.
        (["train", "quickstart", "--data", "my"], []),
    ],
)
def test_the_shell_completes_names_and_files(words: list[str], offered: list[str], folder: Path) -> None:
    assert completed(*words) == offered


def test_some_shells_show_what_an_offer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without files to offer
    assert completed("check", "quickstart-l", shell="fish") == [
        "quickstart-lora\tThe task of quickstart with PEFT LoRA of rank 16 on every linear …"
    ]
    # fish would take a second line for another completion.
    assert len(completed("check", "", shell="fish")) == len(shipped_names("recipes"))
    assert [offer.split("\t")[0] for offer in completed("train", "--method", "", shell="fish")] == list(METHODS)
    assert '"paper-table"' in "".join(completed("bench", "paper", shell="zsh"))


def test_completion_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys, sbft.cli\nsys.argv = ['sbft']\n"
        "try:\n    sbft.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"sys.exit(', '.join({HEAVY} & set(sys.modules)) or 0)"
    )
    words = {"_SBFT_COMPLETE": "complete_bash", "COMP_WORDS": "sbft\nbench\nquic", "COMP_CWORD": "2"}
    environment = {**os.environ, **words, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "quick\n", "")


# Brief and complete recipes


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        *((name, []) for name in recipe_names()),
        ("quickstart", ["training.max_steps=20", "optimizer.beta2=0.99", "optimizer.schedule=power"]),
        ("quickstart", ["dtype=float32", "method=adam", "optimizer.beta2=0.95", "optimizer.first_moment_half_life=9000"]),
        ("questions", ["method=lora", "lora.rank=4", "freeze=[]", "evaluation.metric_options={exact_match: {x: 1}}"]),
        ("text", ["distributed.fsdp_size=2", "optimizer.seed=3", "batch_schedule=null", "save_model=false"]),
        ("chat", ["method=muon", "optimizer.momentum_half_life=500", "data.label_names={0: bad, 1: good}"]),
    ],
)
def test_a_recipe_in_brief_is_the_same_recipe(source: str, overrides: list[str]) -> None:
    recipe = load_recipe(source, overrides)
    whole = resolve(for_pretraining(recipe) if source.startswith("pretrain") else recipe)
    brief = yaml.safe_load(in_brief(whole))
    assert resolve(Recipe.model_validate(brief)) == whole
    # Each setting that remains is one that the method would not have chosen by itself.
    sections = {key: dict(value) for key, value in brief.items() if isinstance(value, dict)}
    del sections["data"]["train"]
    for section, values in sections.items():
        for key in values:
            without = {**brief, section: {name: value for name, value in brief[section].items() if name != key}}
            assert resolve(Recipe.model_validate(without)) != whole, (section, key)


def test_a_recipe_says_in_brief_what_is_its_own() -> None:
    recipe = resolve(load_recipe(None, ["training.seed=0", "optimizer.eps=1e-30", "training.max_steps=3"], model="m", data="d"))
    assert yaml.safe_load(in_brief(recipe)) == {
        "model": "m", "method": "sbft", "data": {"train": "d"}, "training": {"max_steps": 3}, "output_dir": "runs/d-sbft",
    }  # fmt: skip


def test_a_recipe_is_shown_in_whole(tmp_path: Path) -> None:
    said = sbft("recipes", "show", "--resolved", "quickstart")
    assert said.startswith("# sbft train quickstart\n") and Recipe.model_validate(yaml.safe_load(said)) == resolve(
        load_recipe("quickstart")
    )
    said = sbft("recipes", "show", "--resolved", "pretrain-stdlib")
    expected = resolve(for_pretraining(load_recipe("pretrain-stdlib")))
    assert said.startswith("# sbft pretrain ") and Recipe.model_validate(yaml.safe_load(said)) == expected
    mine = tmp_path / "my.yaml"
    mine.write_text("# mine\nmodel: m\ndata: {train: d}\n")
    assert sbft("recipes", "show", str(mine)) == mine.read_text()
    shown = Recipe.model_validate(yaml.safe_load(sbft("recipes", "show", "--resolved", str(mine))))
    assert shown == resolve(load_recipe(mine)) and shown.optimizer.second_moment_half_life is not None


# A bug report


def test_version_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SBFT_PROXY", "http://me:secretword@host")
    monkeypatch.setenv("SBFT_TOKEN", "anothersecret")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    said = sbft("version", "--verbose")
    told = dict(line.split("  ", 1) for line in said.splitlines())
    told = {name: text.strip() for name, text in told.items()}
    assert told["sbft"].startswith(f"{__version__}, ") and told["python"].startswith(f"{sys.version_info[0]}.")
    for package in ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes", "triton", "tokenizers"):
        assert told[package][0].isdigit() or told[package] == "not installed"
    for thing in ("system", "device", "instructions", "threads", "memory", "memory pool", "kernels, CPU", "C++ compiler"):
        assert told[thing]
    assert "OMP_NUM_THREADS=1" in told["environment"] and "http://***@host" in told["environment"]
    assert not any(secret in said for secret in ("secretword", "anothersecret", "hf_abc"))


def test_version_says_why_kernels_and_compiler_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBFT_KERNELS", "reference")
    monkeypatch.setenv("SBFT_MEMORY_POOL", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    told = installation.installation()
    assert told["kernels, CPU"] == "plain torch (SBFT_KERNELS=reference)"
    assert told["memory pool"] == "switched off by SBFT_MEMORY_POOL=0"
    assert told["C++ compiler"].startswith("none (no C++ compiler was found")
    monkeypatch.setenv("SBFT_KERNELS", "fast")
    assert installation.installation()["kernels, CPU"].startswith("SBFT_KERNELS='fast' is not known")


def test_the_issue_template_asks_for_it() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    asked = [field for field in form["body"] if "sbft version --verbose" in field["attributes"].get("label", "")]
    assert len(asked) == 1 and asked[0]["validations"] == {"required": True}
