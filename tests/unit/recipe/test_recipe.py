"""Recipes: what is read, what the method fills in, and that all problems are reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sbft.errors import RecipeError
from sbft.recipe import Recipe, load_recipe, recipe_names, recipe_text, resolve
from sbft.recipe.draft import read_yaml
from sbft.recipe.methods import METHODS
from sbft.recipe.pretraining import is_pretraining
from sbft.recipe.schema import OptimizerConfig
from sbft.recipe.settings import OPTIMIZER_KEYS, OPTIMIZERS
from sbft.tokens import FINE_TUNING_HALF_LIFE

MINIMAL = {"model": "some-model", "data": {"train": "my.jsonl"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def problems(path: Path | None = None, overrides: list[str] | None = None, **flags: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, **flags)
    return str(caught.value)


def given(*overrides: str) -> Recipe:
    return resolve(load_recipe(None, list(overrides), model="m", data="d.jsonl"))


def test_flags_alone_make_a_recipe_that_the_method_completes() -> None:
    recipe = given()
    assert (recipe.model, recipe.method, recipe.data.train, recipe.dtype) == ("m", "sbft", "d.jsonl", "bfloat16")
    assert recipe.optimizer.second_moment_half_life == pytest.approx(FINE_TUNING_HALF_LIFE, abs=1)
    assert recipe.optimizer.gradient_release and recipe.optimizer.stochastic_rounding
    assert recipe.training["per_device_train_batch_size"] == recipe.training["gradient_accumulation_steps"] == 1
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.output_dir == "runs/d-sbft"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resolves_and_a_saved_recipe_resolves_to_itself(method: str, tmp_path: Path) -> None:
    recipe = given(f"method={method}")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert resolve(recipe) == recipe
    # Settings that the method does not have stay unset, so that nothing unknown reaches its optimizer.
    set_keys = {key for key, value in recipe.optimizer.model_dump().items() if value is not None}
    assert set_keys <= METHODS[method].settings


def test_every_optimizer_key_of_the_schema_belongs_to_some_optimizer() -> None:
    assert set(OptimizerConfig.model_fields) == set().union(*OPTIMIZER_KEYS.values())


def test_the_file_wins_over_the_method_flags_over_the_file_and_set_over_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\ndata: {train: t.jsonl}\ntraining: {learning_rate: 3.0e-5, max_steps: 7}\n")
    recipe = resolve(load_recipe(path, ["training.max_steps=9", "model=c"], model="b", data=None))
    assert (recipe.model, recipe.training["learning_rate"], recipe.training["max_steps"]) == ("c", 3e-5, 9)
    assert recipe.data.train == "t.jsonl"


@pytest.mark.parametrize(
    ("in_file", "override", "gone"),
    [
        ("training: {num_train_epochs: 3}", "training.max_steps=5", ("training", "num_train_epochs")),
        ("training: {max_steps: 5}", "training.num_train_epochs=3", ("training", "max_steps")),
        ("optimizer: {second_moment_half_life: 9.0}", "optimizer.beta2=0.99", ("optimizer", "second_moment_half_life")),
        ("{}", "data.train_tokens=90", ("data", "tokens_per_parameter")),
    ],
)
def test_an_override_replaces_what_the_file_says_in_another_way(
    in_file: str, override: str, gone: tuple[str, str], tmp_path: Path
) -> None:
    data = "{train: t.txt, tokens_per_parameter: 20}" if gone[0] == "data" else "{train: t.jsonl}"
    path = write(tmp_path, f"model: a\ndata: {data}\n" + ("" if in_file == "{}" else in_file))
    content = load_recipe(path, [override]).model_dump(exclude_none=True)
    key, value = override.split("=")
    assert content[gone[0]][key.split(".")[1]] == yaml.safe_load(value)
    assert gone[1] not in content[gone[0]]
    twice = [f"{gone[0]}.{gone[1]}=2", override]
    assert "Keep one" in problems(path, twice)


@pytest.mark.parametrize(
    ("override", "section", "gone"),
    [
        ("optimizer.beta2=0.997", "optimizer", "second_moment_half_life"),
        ("optimizer.schedule=power", "optimizer", "second_moment_half_life"),
        ("training.max_steps=5", "training", "num_train_epochs"),
        ("optimizer={beta2: 0.99}", "optimizer", "second_moment_half_life"),
    ],
)
def test_saying_it_one_way_drops_the_default_that_says_it_the_other_way(override: str, section: str, gone: str) -> None:
    chosen = getattr(given(override), section)
    assert (chosen.get(gone) if isinstance(chosen, dict) else getattr(chosen, gone)) is None


def test_the_usual_adam_keeps_its_beta2_until_a_half_life_is_given() -> None:
    fixed = given("method=adam-batch").optimizer
    assert (fixed.beta2, fixed.second_moment_half_life) == (0.95, None)
    by_tokens = given("method=adam-batch", "optimizer.second_moment_half_life=1000").optimizer
    assert (by_tokens.beta2, by_tokens.second_moment_half_life) == (None, 1000)


def test_what_an_adapter_is_set_to_stands_beside_its_defaults() -> None:
    for method in ("lora", "qlora"):
        adapter = given(f"method={method}", "lora.dora=true", "lora.rank=8").lora
        assert adapter is not None
        assert (adapter.rank, adapter.alpha, adapter.dora, adapter.rslora) == (8, 32, True, False)


def test_values_of_a_column_may_be_numbers_and_stay_so_in_the_saved_recipe(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: t.jsonl, label_names: {0: negative, 1: positive}}\nevaluation: {labels: auto}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data.label_names == {"0": "negative", "1": "positive"} and recipe.evaluation.labels == "auto"
    assert load_recipe(write(tmp_path, resolve(recipe).to_yaml())) == resolve(recipe)
    assert given("evaluation.labels=[good, bad]").evaluation.labels == ["good", "bad"]


def test_the_accuracy_of_labels_is_a_metric_where_there_are_labels() -> None:
    metrics = ["evaluation.metrics=[label_accuracy]", "evaluation.labels=auto"]
    assert given(*metrics).evaluation.metrics == ["label_accuracy"]
    assert "needs labels to choose from" in problems(None, metrics[:1], model="m", data="d")


def test_freezing_is_refused_where_no_weight_of_the_model_is_trained() -> None:
    assert given("freeze=[embeddings]").freeze == ["embeddings"]
    for method in ("lora", "qlora"):
        text = problems(None, ["freeze=[embeddings]", f"method={method}"], model="m", data="d")
        assert f"method {method} trains an adapter" in text and "sbft" in text


def test_float32_weights_are_not_rounded() -> None:
    assert given("dtype=float32").optimizer.stochastic_rounding is False


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "-2e+3", ".5e1", "1.0e-4"])
def test_yaml_numbers_with_an_exponent_are_numbers(text: str) -> None:
    assert read_yaml(text) == float(text)


def test_an_unquoted_no_is_a_strategy(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {save_strategy: no, eval_strategy: 'no'}\nmodel: m\ndata: {train: a.jsonl}\n")
    recipe = load_recipe(path, ["training.logging_strategy=no"])
    assert [recipe.training[f"{name}_strategy"] for name in ("save", "eval", "logging")] == ["no"] * 3
    with pytest.raises(RecipeError, match="save_strategy is True, expected one of no, steps"):
        load_recipe(path, ["training.save_strategy=yes"])
    with pytest.raises(RecipeError, match="expected true or false"):
        load_recipe(path, ["training.gradient_checkpointing='yes'"])


def test_weights_on_a_grid_make_every_method_compute_in_bfloat16() -> None:
    for name, method in METHODS.items():
        if method.lora_defaults is None and method.optimizer in OPTIMIZERS:
            recipe = given(f"method={name}", "weights=int8")
            assert recipe.dtype == "bfloat16" and recipe.optimizer.stochastic_rounding
            assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("text", ["e4", "1e", "v1e-4", "1e-4x"])
def test_text_that_only_looks_like_a_number_stays_text(text: str) -> None:
    assert read_yaml(text) == text


def test_all_problems_come_at_once_each_with_its_line_key_and_nearest_right_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """model: m
data:
  train: my.jsonl
  max_lenght: 10
  packing: perhaps
optimizer:
  beta2: 0.9
  second_moment_half_life: 1000
training:
  learning_rate: -1
  learning_rat: 1
  lr_scheduler_type: cosin
  max_steps: many
evaluatoin: {}
dtype: float16
""",
    )
    text = problems(path, ["training.gradient_accumulation_steps=4"])
    expected = [
        (4, "data.max_lenght", "max_length"),
        (5, "data.packing", "boolean"),
        (7, "optimizer.beta2", "optimizer.second_moment_half_life"),
        (10, "training.learning_rate is -1", "at least 0"),
        (11, "training.learning_rat ", "learning_rate"),
        (12, "training.lr_scheduler_type", "the nearest is cosine"),
        (13, "training.max_steps is 'many'", "integer"),
        (14, "evaluatoin", "evaluation"),
        (15, "dtype is float16", "overflows"),
    ]
    lines = text.splitlines()
    for number, key, hint in expected:
        assert [line for line in lines if f"{path} line {number}: {key}" in line and hint in line], (number, text)
    assert "--set training.gradient_accumulation_steps: training.gradient_accumulation_steps is 4" in text
    assert len(lines) == 1 + len(expected) + 1
    assert lines[0] == "10 problems in the recipe:"


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "-1e-9"])
def test_a_learning_rate_that_is_negative_or_not_finite_is_refused(value: str) -> None:
    text = problems(None, [f"training.learning_rate={value}"], model="m", data="d")
    assert "training.learning_rate" in text and "finite number of at least 0" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.logging_steps=0", "greater than 0"),
        ("training.seed=5000000000", "from 0 to 4294967295"),
        ("training.report_to=tensorbord", "the nearest is tensorboard"),
        ("training.disable_tqdm=true", "its own progress bar"),
        ("training.max_steps=-5", "at least 1"),
        ("training.max_steps=0", "at least 1"),
        ("training.num_train_epochs=0", "greater than 0"),
        ("evaluation.metrics=[exact_mach]", "the nearest is exact_match"),
        ("optimizer.eps=0", "a number greater than 0"),
        ("data.train_size=-1", "is -1, expected a number greater than 0"),
        ("data=t.jsonl", "write `data: {train: t.jsonl}`"),
        ("data=5", "write `data: {train: my.jsonl}`"),
        ("training=5", "write `training: {learning_rate: 1.0e-4}`"),
        ("freeze=embeddings", "is 'embeddings', expected a list of patterns"),
        ("freeze=['', x]", "is '', expected a list of patterns"),
        ("evaluation.labels=[yes, no]", "is True, expected auto, or a list of two or more different words"),
        ("evaluation.labels=[good]", "is ['good'], expected auto"),
        ("evaluation.labels=[good, good]", "two or more different words"),
        ("evaluation.labels=[good, ' ']", "is ' ', expected auto"),
        ("evaluation.labels=every", "is 'every', expected auto"),
        ("data.label_names={}", "is {}, expected a word for each value"),
        ("data.label_names={0: no, 1: ja}", "is False, expected a word for each value"),
    ],
)
def test_a_value_that_cannot_train_is_one_of_the_problems(override: str, said: str) -> None:
    text = problems(None, [override, "lorra=1"], model="m", data="d")
    assert text.startswith("2 problems") and said in text


def test_max_steps_of_minus_one_leaves_the_epochs_of_the_method() -> None:
    assert given("training.max_steps=-1").training["num_train_epochs"] == 1.0


@pytest.mark.parametrize("text", ["modle: m\ndata: {train: d}\n", "model: m\ndata: {trian: d}\n"])
def test_a_misspelt_key_that_is_required_is_reported_once(text: str, tmp_path: Path) -> None:
    said = problems(write(tmp_path, text))
    assert "the nearest is" in said and "missing" not in said and "\n" not in said


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"model: caf\xe9\n")
    assert "not UTF-8" in problems(tmp_path / "my.yaml")


def test_accumulation_with_release_is_refused_with_both_ways_out() -> None:
    text = problems(None, ["training.gradient_accumulation_steps=8"], model="m", data="d")
    assert "Write 1" in text and "optimizer.gradient_release: false" in text
    recipe = given("training.gradient_accumulation_steps=8", "optimizer.gradient_release=false")
    assert recipe.training["gradient_accumulation_steps"] == 8


def test_clipping_by_the_global_norm_with_release_is_refused() -> None:
    assert "requires all gradients" in problems(None, ["training.max_grad_norm=1.0"], model="m", data="d")
    assert given("training.max_grad_norm=1.0", "method=adam").training["max_grad_norm"] == 1.0


def test_a_setting_that_the_method_has_no_use_for_is_refused() -> None:
    text = problems(None, ["method=lora", "optimizer.clip_threshold=1.0"], model="m", data="d")
    assert "optimizer.clip_threshold has no effect" in text and "sbft" in text
    assert "trains all weights" in problems(None, ["lora.rank=4"], model="m", data="d")
    text = problems(None, ["method=hf-adafactor", "optimizer.eps=1e-8"], model="m", data="d")
    assert "optimizer.eps has no effect" in text and "adam8bit" in text and text.count("hf-adafactor") == 1


def test_what_stands_in_another_section_is_pointed_to() -> None:
    text = problems(None, ["beta2=0.9", "training.optim=sgd", "learning_rate=1"], model="m", data="d")
    assert "write optimizer.beta2" in text
    assert "training.optim cannot be set here: the method decides" in text
    assert "write training.learning_rate" in text


def test_a_method_whose_package_is_missing_is_refused_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = problems(None, ["method=lora"], model="m", data="d")
    assert "requires the package peft" in text and "/setup.sh" in text
    monkeypatch.setattr("sbft.errors.SETUP", tmp_path / "none")  # not a checkout
    assert "pip install 'sbft[lora]'" in problems(None, ["method=lora"], model="m", data="d")
    both = problems(None, ["method=qlora"], model="m", data="d")
    assert "pip install 'sbft[lora]'" in both and "pip install 'sbft[bitsandbytes]'" in both


@pytest.mark.parametrize("package", ["wandb", "trackio", "[tensorboard, wandb]"])
def test_a_reporter_that_is_not_installed_is_refused_with_the_pip_line(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = problems(None, [f"training.report_to={package}"], model="m", data="d")
    assert f"pip install {package.strip('[]').split(',')[0]}" in text


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    assert "the nearest is lora" in problems(None, ["method=lorra"], model="m", data="d")


def test_what_is_missing_is_named_with_its_flag() -> None:
    text = problems()
    assert "--model M" in text and "--data D" in text


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    text = problems(write(tmp_path, "model: a\ndata: {train: d}\nmodel: b\n"))
    assert "line 3: model is given twice" in text and "line 1" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "contains nothing"),
        ("- a\n- b\n", "contains a list"),
        ("model: [a\n", "line 2, column 1 is not valid YAML: found a list that is not closed"),
        ("a: b: c", "line 1, column 5 is not valid YAML: found a second `key:` on one line"),
        ("a:\n\tb: 1\n", "line 2, column 1 is not valid YAML: found a tab"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: str, said: str, tmp_path: Path) -> None:
    assert said in problems(write(tmp_path, content))


@pytest.mark.parametrize("override", ["training.max_steps", "=3", "training..x=3", "model.x=3", "data.options={"])
def test_an_override_that_cannot_be_read_is_refused(override: str) -> None:
    assert override.partition("=")[0] in problems(None, [override], model="m", data="d")


def test_a_missing_recipe_names_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'quickstar'.*Did you mean quickstart"):
        load_recipe("quickstar")
    with pytest.raises(RecipeError, match="There is no file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_ships_resolves_and_begins_with_the_command_that_runs_it(name: str) -> None:
    command, description = recipe_text(name).splitlines()[:2]
    recipe = load_recipe(name)
    verb = "pretrain" if is_pretraining(recipe.model_dump()) else "train"
    assert command.startswith(f"# sbft {verb} {name}") and description.startswith("# ")
    resolve(recipe)
    # Apart from comments it has only keys: no YAML that only our loader can read.
    assert isinstance(yaml.safe_load(recipe_text(name)), dict)


def test_a_recipe_made_in_python_is_checked_when_it_is_resolved() -> None:
    with pytest.raises(RecipeError, match="learning_rat"):
        resolve(Recipe.model_validate({**MINIMAL, "training": {"learning_rat": 1}}))


def test_what_transformers_alone_refuses_names_the_key(tmp_path: Path) -> None:
    from sbft.runs.build import training_arguments

    with pytest.raises(RecipeError, match=r"training\.accelerator_config\. .*unexpected keyword"):
        training_arguments(given("training.accelerator_config={nonsense: 1}"), tmp_path)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_is_said_by_its_current_name(wanted: bool, tmp_path: Path) -> None:
    from sbft.runs.build import training_arguments

    arguments = training_arguments(given(f"training.gradient_checkpointing={str(wanted).lower()}"), tmp_path)
    assert arguments.gradient_checkpointing is wanted


def test_the_recipe_for_text_takes_a_file_of_few_paragraphs(tmp_path: Path) -> None:
    from sbft.data.sources import read_splits

    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {number}." for number in range(20)))
    assert read_splits(resolve(load_recipe("text", data=str(book))).data).train.num_rows == 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('data.system="a\\0b"', "an invalid character"),
        ("data.seed=99999999999999999999", "a number of at most 9,223,372,036,854,775,807"),
        ("data.options.x=.nan", "expected a finite number"),
        ("method=!!binary ''", "expected text instead of bytes"),
        (f"training.learning_rate={'9' * 400}", "a number of at most 9,223"),
        ("training.neftune_noise_alpha=.inf", "expected a finite number"),
        ("training.max_steps=10000000000000", "from 1 to 1000000000000"),
        ("model=''", "is '', expected a hub id, a folder"),
        ("data.train=' '", "is ' ', expected a file, a hub id"),
        ("training.hub_token=x", "hf auth login"),
        ("allow_pickle=maybe", "allow_pickle is 'maybe', expected a boolean"),
    ],
)
def test_a_value_that_nothing_can_use_is_one_of_the_problems(override: str, said: str) -> None:
    text = problems(None, ["model=m", "data.train=d.jsonl", override, "lorra=1"])
    assert text.startswith("2 problems") and said in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: !!python/object:os.system {}\n", "line 1, column 8 is not valid YAML: found a tag"),
        ("model: 2026-13-45\n", "an invalid number or date"),
        ("? [a]\n: b\n", "a list or a mapping as a key"),
        ("1: b\n", "1 is not text, as a key must be"),
        ("model: \x07\n", "found the character"),
        (f"model: {'9' * 5_000}\n", "an invalid number or date"),
    ],
)
def test_yaml_that_is_no_recipe_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    assert said in problems(write(tmp_path, text))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: a\r\ndata: {train: b}\r\n", encoding="utf-8-sig")
    assert load_recipe(path).model == "a"


def test_what_a_message_shows_is_short() -> None:
    assert len(problems(None, [f"method={'x' * 100_000}"], model="m", data="d")) < 1_000


def test_a_mapping_may_take_over_another(tmp_path: Path) -> None:
    text = "model: &m a\ndata: &d {train: b, max_length: 5}\nevaluation: {limit: 3}\noutput_dir: *m\n"
    recipe = load_recipe(write(tmp_path, text + "training: {<<: {seed: 4}, max_steps: 2}\n"))
    assert (recipe.output_dir, recipe.training) == ("a", {"seed": 4, "max_steps": 2})
