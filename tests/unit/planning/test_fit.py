"""What fits into memory: the search for the longest sequence, and the command `sbft plan`."""

from __future__ import annotations

import importlib.util
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import RecipeError
from sbft.planning.memory.fit import Row, longest_that_fits, make_plan
from sbft.recipe import load_recipe
from sbft.recipe.methods import METHODS

GIB = 2**30


@given(
    fixed=st.integers(0, 50_000),
    each=st.integers(1, 400),
    squared=st.sampled_from([0, 0, 1e-3, 0.05]),
    other=st.tuples(st.integers(0, 500_000), st.integers(0, 50)),
    memory=st.integers(1, 4_000_000),
    at_most=st.integers(2, 200_000),
    first=st.integers(2, 5_000),
)
def test_the_longest_sequence_was_tried_fits_and_is_close_to_the_limit(
    fixed: int, each: int, squared: float, other: tuple[int, int], memory: int, at_most: int, first: int
) -> None:
    def needed(tokens: int) -> int:
        return max(fixed + each * tokens + round(squared * tokens**2), other[0] + other[1] * tokens)

    tried = {first: needed(first)}

    def watched(tokens: int) -> int:
        tried[tokens] = needed(tokens)
        return tried[tokens]

    found = longest_that_fits(watched, memory, at_most, {first: tried[first]})
    if found is None:
        assert needed(min(16, at_most)) > memory
        return
    assert found in tried and found <= at_most and needed(found) <= memory
    step = max(16, 0.02 * found)
    assert found == at_most or needed(round(found + step + 17)) > memory or found + step + 17 > at_most
    assert len(tried) < 60
    if other == (0, 0) and first < at_most:
        assert len(tried) <= 10  # three lengths determine a parabola


def test_a_length_beyond_the_models_own_is_never_the_answer() -> None:
    assert longest_that_fits(lambda tokens: tokens, 10**9, 2048, {4096: 4096}) == 2048


def test_a_need_that_no_length_lowers_is_seen_at_once() -> None:
    tried: list[int] = []

    def needed(tokens: int) -> int:
        tried.append(tokens)
        return 100

    assert longest_that_fits(needed, 99, 8192, {1024: 100}) is None
    assert len(tried) == 2


def test_every_method_is_planned_without_and_with_checkpointing() -> None:
    plan = make_plan("random:tiny", sequence_length=512, memory_bytes=24 * GIB, device="cuda")
    resident = [row for row in plan.rows if not row.offload]
    assert [(row.method, row.checkpointing) for row in resident] == [
        (method, checkpointing) for method in METHODS for checkpointing in (False, True)
    ]
    assert {row.method for row in plan.rows if row.offload} == {
        name for name, method in METHODS.items()
        if method.lora_defaults is not None or method.optimizer_defaults.get("gradient_release")
    }  # fmt: skip
    rows = {(row.method, row.checkpointing): row for row in resident}
    for row in plan.rows:
        assert row.prediction is not None and row.fits
        assert row.prediction.needed_bytes == sum(row.prediction.parts.values())
        # The suggested command is a valid recipe.
        settings = [word for word in row.command.split() if "=" in word]
        offload = "layers" if row.offload else None
        load_recipe(None, settings, model="random:tiny", data="my.jsonl", method=row.method, offload=offload)

    def needed(method: str, checkpointing: bool = False) -> int:
        prediction = rows[method, checkpointing].prediction
        assert prediction is not None
        return prediction.needed_bytes

    assert needed("sgd") < needed("sbft") < needed("hf-adafactor") < needed("adam")
    assert needed("qlora") < needed("lora")
    assert needed("sbft", True) < needed("sbft")
    # float32 weights and two moments for every parameter; gradients and activations come on top.
    assert needed("adam") > 12 * 543_520


def test_memory_that_not_even_the_weights_fit_in_leaves_no_length() -> None:
    plan = make_plan("random:llama-8b", sequence_length=128, memory_bytes=GIB, device="cuda", methods=["sbft", "qlora"])
    assert [(row.fits, row.longest) for row in plan.rows] == [(False, None)] * 6


def test_settings_of_all_methods_are_planned_and_typed() -> None:
    def rows(*overrides: str) -> list[Row]:
        arguments = {"sequence_length": 64, "memory_bytes": 24 * GIB, "device": "cuda", "methods": ["sbft", "sbft-int8"]}
        return make_plan("random:llama-1b", **arguments, overrides=overrides).rows

    for plain, same in zip(rows(), rows("optimizer.sliced_vocabulary=false", "dtype=bfloat16"), strict=True):
        assert plain.prediction == same.prediction
        assert same.command == f"{plain.command} --set optimizer.sliced_vocabulary=false --set dtype=bfloat16"
    frozen = rows("freeze=[embeddings]")
    assert all(a.prediction.needed_bytes < b.prediction.needed_bytes for a, b in zip(frozen, rows(), strict=True))
    assert rows("freeze=['* *', embeddings]")[0].command.endswith("""--set 'freeze=['"'"'* *'"'"', embeddings]'""")
    with pytest.raises(RecipeError, match="typo"):
        rows("optimizer.typo=1")
    for planned in ("data.max_length=2048", "method=lora", "offload=layers", "training.gradient_checkpointing=true"):
        with pytest.raises(RecipeError, match="cannot be planned with"):
            rows(planned)


def test_the_verb_prints_a_table_that_fits_a_terminal_and_the_lines_to_type() -> None:
    arguments = ["plan", "--model", "random:smollm2-135m", "--gpu-memory", "2GiB", "--methods", "sbft,adam"]
    shown = CliRunner().invoke(app, [*arguments, "--sequence-length", "256"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    table = shown.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, table[1:])) <= 80 and "…" not in shown.stdout
    assert any(line.startswith("adam ") and " no " in line for line in table)
    assert (
        "  sbft train --model random:smollm2-135m --data my.jsonl --method sbft --set data.max_length=256"
        in shown.stdout
    )


def test_the_verb_speaks_json() -> None:
    arguments = ["plan", "--model", "random:tiny", "--methods", "lora", "--gpu-memory", "1GB", "--json"]
    shown = CliRunner().invoke(app, arguments)
    plan = json.loads(shown.stdout)
    assert plan["memory_bytes"] == 10**9 and plan["device"] == "cuda"
    assert {row["method"] for row in plan["rows"]} == {"lora"}
    assert all(row["needed_bytes"] == sum(row["parts"].values()) for row in plan["rows"])


def test_methods_whose_package_is_missing_are_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    shown = CliRunner().invoke(app, ["plan", "--model", "random:tiny", "--gpu-memory", "1GB", "--json"])
    assert shown.exit_code == 0, shown.output
    planned = {row["method"] for row in json.loads(shown.stdout)["rows"]}
    assert {"sbft", "adam", "hf-adafactor"} <= planned and not {"adam8bit", "qlora"} & planned
    assert "Left out, because a package is missing (bitsandbytes): adam8bit, qlora." in shown.stderr


def test_this_machine_is_planned_for_where_no_gpu_is_named() -> None:
    shown = CliRunner().invoke(app, ["plan", "--model", "random:tiny", "--methods", "sgd", "--json"])
    plan = json.loads(shown.stdout)
    assert plan["memory_bytes"] > 0
    assert all(row["parts"]["runtime"] > 0 and row["fits"] for row in plan["rows"])


@pytest.mark.parametrize(
    ("given_flags", "named"),
    [
        (["--methods", "sbtf"], "the nearest is sbft"),
        (["--methods", ","], "--methods is empty"),
        (["--gpu-memory", "24"], "--gpu-memory"),
        (["--gpu-memory", "much"], "--gpu-memory"),
    ],
)
def test_what_is_wrong_is_named(given_flags: list[str], named: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--model", "random:tiny", *given_flags])
    assert shown.exit_code == 2 and named in shown.output


def test_a_model_that_there_is_not_ends_with_a_sentence() -> None:
    shown = CliRunner().invoke(app, ["plan", "--model", "random:none"])
    assert shown.exit_code == 2 and "'none'" in shown.output
