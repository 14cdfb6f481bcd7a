"""What must not happen, whatever a recipe, a model, a data set or a record says: each promise of SECURITY.md."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sbft.bench.suite import Suite, load_suite
from sbft.bench.suite_runs import possible_runs, run_folder
from sbft.cli.app import app
from sbft.data.format import encode_prompts
from sbft.data.sources import load_source
from sbft.errors import DataError, ModelError, RecipeError, SbftError, without_secrets
from sbft.models.load import load_config, load_model, load_tokenizer
from sbft.recipe import load_recipe, resolve
from sbft.runs.card import card, write_card
from sbft.runs.record import RunRecord
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("sbft", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SCRIPT = "<script>alert(1)</script>"


class Opened:
    """A pickle that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


# ---- code ----------------------------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    return [
        (ast.unparse(node.func), {one.arg: one.value for one in node.keywords if one.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_unpickles_evaluates_or_goes_through_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for name, keywords in calls(tree):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
        assert not name.endswith(("read_pickle", "mktemp"))
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if name == "yaml.load":
            assert ast.unparse(keywords["Loader"]) == "_Loader"
        for option in ("shell", "allow_pickle", "trust_remote_code"):
            assert option not in keywords or ast.unparse(keywords[option]) != "True"


def test_yaml_makes_nothing_but_plain_values(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for tag in (f"!!python/object/apply:os.mkdir ['{made}']", "!!python/name:os.system", "!!python/module:os"):
        path = tmp_path / "r.yaml"
        path.write_text(f"model: {tag}\ndata: {{train: a.jsonl}}\n")
        for load in (load_recipe, load_suite):
            with pytest.raises(RecipeError, match="found a tag"):
                load(path)
        with pytest.raises(RecipeError, match="is not a YAML value"):
            load_recipe(None, [f"model={tag}"], data="a.jsonl")
    assert not made.exists()


def test_aliases_cannot_multiply_without_end(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    path.write_text(bomb + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)))
    with pytest.raises(RecipeError, match="more than 100,000 keys and values"):
        load_recipe(path)
    path.write_text("data: &a {train: *a}\n")
    with pytest.raises(RecipeError, match="an alias inside the value that it refers to"):
        load_recipe(path)
    path.write_text(f"data: {'[' * 5_000}\n")
    with pytest.raises(RecipeError, match="levels"):
        load_recipe(path)


@pytest.fixture
def own_code(tiny_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with Python code of its own, and the file that this code creates if it is run."""
    folder, made = shutil.copytree(tiny_dir, tmp_path / "own-code"), tmp_path / "made"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "own.Mine", "AutoModelForCausalLM": "own.MineForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(made)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    return folder, made


def test_code_of_a_checkpoint_runs_only_where_it_is_asked_for(
    own_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, made = own_code
    # A recipe that came with the model cannot allow its code.
    (folder / "recipe.yaml").write_text(f"model: {folder}\ndata: {{train: a.jsonl}}\ntrust_remote_code: true\n")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    monkeypatch.chdir(tmp_path)
    commands = {
        "generate": ["generate", str(folder), "hello", "--max-new-tokens", "1"],
        "eval": ["eval", str(folder), "--data", str(data)],
        "check": ["check", "--model", str(folder), "--data", str(data)],
    }
    for command in commands.values():
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "--trust-remote-code" in result.output, result.output
    load_tokenizer(str(folder))
    for load in (load_config, lambda name: load_model(name, dtype=torch.bfloat16)):
        with pytest.raises(ModelError, match="its own Python code"):
            load(str(folder))
    assert not made.exists()
    result = CliRunner().invoke(app, [*commands["generate"], "--trust-remote-code"])
    assert result.exit_code == 0 and made.exists(), result.output


def test_trust_is_off_unless_the_recipe_says_so() -> None:
    recipe = resolve(load_recipe(None, model="m", data="d.jsonl"))
    assert (recipe.trust_remote_code, recipe.allow_pickle) == (False, False)
    asked = load_recipe(None, model="m", data="d.jsonl", trust_remote_code=True, allow_pickle=True)
    assert (asked.trust_remote_code, asked.allow_pickle) == (True, True)


def test_a_folder_of_data_is_read_and_never_run(tmp_path: Path) -> None:
    folder, made = tmp_path / "dataset", tmp_path / "made"
    folder.mkdir()
    (folder / "dataset.py").write_text(f"import pathlib\npathlib.Path({str(made)!r}).touch()\n")
    with pytest.raises(DataError, match="holds no data set that can be read"):
        load_source(str(folder))
    assert not made.exists()


def test_a_chat_template_is_in_a_sandbox(tmp_path: Path) -> None:
    made = tmp_path / "made"
    reach = "{{ cycler.__init__.__globals__.os.mkdir('PATH') }}".replace("PATH", str(made))
    with pytest.raises(DataError, match="chat template refuses"):
        encode_prompts([{"prompt": "a"}], tiny_tokenizer(reach))
    assert not made.exists()


# ---- pickles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, with its weights in a pickle."""
    folder = shutil.copytree(tiny_dir, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_unless_asked_for(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"stored as a pickle \(pytorch_model.bin\).*--allow-pickle"):
        load_model(str(pickled), dtype=torch.bfloat16)
    loaded = load_model(str(pickled), dtype=torch.bfloat16, allow_pickle=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in tiny_model().state_dict().items())
    result = CliRunner().invoke(app, ["generate", str(pickled), "hello", "--max-new-tokens", "1"])
    assert result.exit_code == 2 and "--allow-pickle" in result.stderr
    # Even then only tensors are unpickled.
    torch.save({"weight": Opened(tmp_path / "made")}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(pickled), dtype=torch.bfloat16, allow_pickle=True)
    assert not (tmp_path / "made").exists()


def test_safetensors_are_taken_where_both_are_there(pickled: Path, tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_dir / "model.safetensors", pickled)
    torch.save({"weight": Opened(tmp_path / "made")}, pickled / "pytorch_model.bin")
    for allowed in (False, True):
        load_model(str(pickled), dtype=torch.bfloat16, allow_pickle=allowed)
    assert not (tmp_path / "made").exists()


def test_a_config_cannot_name_a_pickle(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "named")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match="stored as a pickle"):
        load_model(str(folder), dtype=torch.bfloat16)


def test_a_pickled_adapter_is_refused_unless_asked_for(tiny_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model(str(tiny_dir), dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    weights = next((tmp_path / "adapter").glob("*.safetensors"))
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"stored as a pickle \(adapter_model.bin\)"):
        load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    load_model(str(tmp_path / "adapter"), dtype=torch.float32, allow_pickle=True)


def test_a_checkpoint_is_resumed_without_unpickling(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizer, schedule and random generators, including NumPy's, are read by torch.load with weights_only."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    command = ["train", "--model", str(tiny_dir), "--data", "train.jsonl", "--output-dir", "out"]
    steps = ["--set", "training.max_steps=2", "--set", "training.save_strategy=steps", "--set", "training.save_steps=1"]
    assert CliRunner().invoke(app, [*command, *steps]).exit_code == 0
    loads: list[tuple[str, Any]] = []
    original = torch.load

    def watched(file: Any, *args: Any, **options: Any) -> Any:
        loads.append((Path(str(file)).name, options.get("weights_only")))
        return original(file, *args, **options)

    monkeypatch.setattr(torch, "load", watched)
    more = ["--set", "training.max_steps=3", *steps[2:], "--resume"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    assert {"scheduler.pt", "rng_state.pth"} <= {name for name, _ in loads}
    assert all(weights_only is True for _, weights_only in loads)


# ---- names ---------------------------------------------------------------------------------------------------------


def suite_file(folder: Path, **changes: Any) -> Path:
    content = {
        "models": ["builtin:a"],
        "tasks": {"t": {"data": {"train": "a.jsonl"}}},
        "methods": {"sbft": {"learning_rates": [1e-4]}},
        "baseline": "sbft",
        **changes,
    }
    (folder / "suite.yaml").write_text(json.dumps(content))
    return folder / "suite.yaml"


@pytest.mark.parametrize("name", ["../x", "/x", "..", ".", "", "a/b", "a\0b", "a\nb", "-", "~x"])
def test_names_in_a_suite_that_would_leave_its_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="names a folder"):
        load_suite(suite_file(tmp_path, tasks={name: {"data": {"train": "a.jsonl"}}}))
    variants = {name: {"method": "sbft", "learning_rates": [1e-4]}, "sbft": {"learning_rates": [1e-4]}}
    with pytest.raises(RecipeError, match="names a folder"):
        load_suite(suite_file(tmp_path, methods=variants))


@pytest.mark.parametrize("model", ["..", "/", "../..", "...", "\0", "./-"])
def test_models_that_give_no_folder_name_are_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(RecipeError, match="from which no folder name can be made"):
        load_suite(suite_file(tmp_path, models=[model, "other"]))


def test_models_whose_runs_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="would share the folder org-name"):
        load_suite(suite_file(tmp_path, models=["org/name", "org-name"]))


def test_every_run_of_a_suite_lies_below_its_folder(tmp_path: Path) -> None:
    models = ["../../evil", "/etc/passwd", "a/../../b", "C:\\x", "x\ny"]
    suite: Suite = load_suite(suite_file(tmp_path, models=models))
    top = (tmp_path / "out" / "runs").resolve()
    folders = {run_folder(tmp_path / "out", run).resolve() for run in possible_runs(suite)}
    assert len(folders) == len(models) and all(top in folder.parents for folder in folders)


@pytest.mark.parametrize(
    "data", ["../../x.jsonl", "..", "/", "/etc/passwd", "~/x.csv", "generated:../../x", "a/../..", "."]
)
def test_the_folder_that_is_named_after_the_data_is_one_below_runs(data: str) -> None:
    folder = Path(str(resolve(load_recipe(None, model="m", data=data)).output_dir))
    assert folder.parent == Path("runs") and folder.name not in {"", ".", ".."}


def test_a_record_cannot_have_another_folders_file_read(tmp_path: Path) -> None:
    from sbft.bench.report.comparison import SuiteRun

    (tmp_path / "secret.jsonl").write_text('{"prompt": "p", "reference": "r", "exact_match": true}\n')
    (tmp_path / "run").mkdir()
    for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl")):
        record = RunRecord(method="sbft", model="m", dataset="d", seed=0, status="ok", predictions=name)
        suite = load_suite(suite_file(tmp_path))
        assert SuiteRun(possible_runs(suite)[0], tmp_path / "run", record, {}).outcomes("exact_match") is None


# ---- output --------------------------------------------------------------------------------------------------------


def test_reports_show_markup_as_it_is_written(tmp_path: Path) -> None:
    from sbft.bench.report import write_report

    path = suite_file(
        tmp_path,
        models=[SCRIPT],
        summary=f"{SCRIPT} [x](javascript:alert(1))",
        methods={"sbft": {"learning_rates": [1e-4]}, "sgd": {"learning_rates": [1e-2]}},
    )
    suite = load_suite(path)
    for run in possible_runs(suite):
        failed = run.variant == "sgd"
        record = RunRecord(
            method=run.variant,
            model=SCRIPT,
            dataset=SCRIPT,
            seed=0,
            status="error" if failed else "ok",
            error=f"the answer was {SCRIPT} | ![x](http://evil/x.png)" if failed else None,
            device=SCRIPT,
            metrics={"loss": 1.0},
            evaluated_on=SCRIPT,
            versions={"python": SCRIPT},
            git_commit=SCRIPT,
            history=[{"step": 1, "tokens": 5, "loss": 1.0, "learning_rate": 1e-4}],
        )
        folder = run_folder(tmp_path, run)
        folder.mkdir(parents=True)
        record.save(folder)
    write_report(tmp_path)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "javascript:alert(1)" in html
    assert not re.search(r"(?<!\\)<script", markdown) and r"\<script>" in markdown
    assert not re.search(r"\]\((?!\S+\.png\))", markdown) and "](http" not in markdown

    # A folder of arbitrary runs.
    runs = tmp_path / "runs" / "$x$ {$" / SCRIPT.replace("/", "")
    runs.mkdir(parents=True)
    RunRecord(method="sbft", model="m", dataset="d", seed=0, status="error", error=SCRIPT).save(runs)
    write_report(runs.parent)
    assert not re.search(r"(?<!\\)<script", (runs.parent / "table.md").read_text())


# ---- secrets -------------------------------------------------------------------------------------------------------

# Joined here, so that no secret scanner takes them for real ones.
SECRETS = [
    "https://user:" + "pass-w0rd@host/data.jsonl",
    "hf_" + "abcdefghijklmnopqrstuvwxyz",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "sk-" + "abcdefghijklmnopqrstuvwxyz",
    "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "key", ["model", "data.train", "data.system", "training.run_name", "data.options.x", "nonsense"]
)
def test_a_recipe_that_holds_a_secret_is_refused_without_showing_it(secret: str, key: str) -> None:
    hidden = secret.partition("://")[2].partition("@")[0] or secret
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["model=m", "data.train=d.jsonl", f"{key}={secret}"])
    assert hidden not in str(caught.value)
    if key != "nonsense":
        assert "a password or a token" in str(caught.value) and "***" in str(caught.value)


def test_hub_tokens_are_no_setting_of_a_run() -> None:
    with pytest.raises(RecipeError, match="hf auth login"):
        load_recipe(None, ["training.hub_token=anything"], model="m", data="d.jsonl")


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD", "CLIENT_SECRET")
    values = {name: f"{name.lower()}-value+/=" for name in names}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    recipe = resolve(load_recipe(None, model="m", data="d.jsonl")).model_dump(mode="json", exclude_none=True)
    told = f"401 for https://user:pass-w0rd@hub/x with {' '.join(values.values())} and {SECRETS[1]}"
    record = RunRecord(
        method="sbft", model=told, dataset=told, seed=1, error=told, recipe=recipe, versions={"torch": "1"}
    )
    record.save(tmp_path)
    write_card(record, tmp_path)
    for name in ("run.json", "README.md"):
        text = (tmp_path / name).read_text()
        assert "401 for https://***@hub/x" in text
        for secret in (*values.values(), "pass-w0rd", SECRETS[1]):
            assert secret not in text
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1
    assert without_secrets(card(record)) != card(record)
    assert (
        without_secrets("1 step at http://host/a@b of org/model@main") == "1 step at http://host/a@b of org/model@main"
    )


def test_a_run_writes_no_variable_of_the_environment(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBFT_TEST_MARKER", "not-to-be-found-anywhere")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    command = [
        "train",
        "--model",
        str(tiny_dir),
        "--data",
        str(tmp_path / "train.jsonl"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"run.json", "recipe.yaml", "README.md"} <= {path.name for path in written}
    for content in (result.output.encode(), *(path.read_bytes() for path in written)):
        assert b"not-to-be-found" not in content and b"hf_xxx" not in content


# ---- dependencies --------------------------------------------------------------------------------------------------


def test_dependencies_have_no_upper_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert needed is not None
    for line in needed[1].splitlines():
        assert re.fullmatch(r'\s*"[\w-]+>=[\d.]+",( *#.*)?', line) or line.strip().startswith("#"), line


def test_errors_of_sbft_name_no_type() -> None:
    """A user is told what to do, not the name of the Python exception."""
    with pytest.raises(SbftError) as caught:
        load_recipe(None, ["training.max_steps=[1]"], model="m", data="d.jsonl")
    assert "Error" not in str(caught.value)
