"""Malformed recipes and data files, drawn at random, and what `sbft check` must not do on them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.planning.check import check_recipe as planning
from sbft.planning.memory.predict import PlanError
from sbft.recipe.schema import DataConfig, EvaluationConfig, LoraConfig, OptimizerConfig, Recipe

LONGEST_S = 60.0
"""An example that takes longer counts as one that hangs."""
_TYPE_NAME = re.compile(r"\b[A-Z]\w*(Error|Exception)\b")
_SECTIONS = {"data": DataConfig, "optimizer": OptimizerConfig, "lora": LoraConfig, "evaluation": EvaluationConfig}
_TRAINING = (
    "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "max_grad_norm", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "logging_steps", "save_steps",
    "save_strategy", "logging_strategy", "report_to", "dataloader_num_workers", "gradient_checkpointing",
    "label_smoothing_factor", "torch_compile", "fsdp", "deepspeed", "output_dir", "optim", "bf16", "run_name", "use_cpu",
    "accelerator_config", "neftune_noise_alpha", "dataloader_drop_last", "remove_unused_columns",
)  # fmt: skip
KEYS = [
    *((name,) for name in Recipe.model_fields),
    *((section, name) for section, model in _SECTIONS.items() for name in model.model_fields),
    *(("training", name) for name in _TRAINING),
    ("methd",), ("data", "max_lenght"), ("", ""), ("training", "../x"), ("__class__",), ("data", "train", "deeper"),
]  # fmt: skip

odd_texts = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "a\0b",
            "\ud800",
            "x" * 5_000,
            "../../etc/passwd",
            "/etc/passwd",
            "~nobody/x",
            "..",
            "a/../b",
            "nan",
            "inf",
            "1e999",
            "-0",
            "0x10",
            "null",
            "<script>alert(1)</script>",
            "${HOME}",
            "$(id)",
            "%s%n",
            "{0}",
            "[red]",
            "train.jsonl",
            "train.csv",
            "generated:",
            "generated:chain_sum",
            "generated:nothing",
            "generated:random_text",
            "random:tiny",
            "random:",
            "builtin:",
            "sbft",
            "adam",
            "lora",
            "qlora",
            "sgd",
            "bfloat16",
            "float16",
            "auto",
            "org/name",
            "org/name/x",
            "http://user:secret@host/x",
            "\u202e\u200b",
            "é" * 50,
            "\n",
            "a\nb: c",
            "\t",
        ]  # fmt: skip
    ),
)
numbers = st.one_of(
    st.integers(),
    st.integers(-3, 5),
    st.floats(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**32, 2**63, 2**64, 10**4000, 1e308, 5e-324, -0.0, 1e-40]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, odd_texts, st.dates(), st.binary(max_size=6))
odd_values = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.one_of(odd_texts, st.integers()), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
_TEXT_CHANGES = (
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.replace(": ", ":").encode(),
    lambda text: text.replace("  ", "\t").encode(),
    lambda text: (text + text).encode(),
    lambda text: b"\x00" + text.encode(),
    lambda text: text.encode() + b"\xff\xfe",
    lambda text: text.encode()[: len(text) // 2],
    lambda text: (text + "data: &a {b: *a}\n").encode(),
    lambda text: (text + "x: &a [*a, *a]\n").encode(),
    lambda text: (text + "x: *nothing\n").encode(),
    lambda text: (text + "training: !!python/object/apply:os.system ['touch pwned']\n").encode(),
    lambda text: (text + "x: !!python/name:os.system\n").encode(),
    lambda text: (text + "x: !include /etc/passwd\n").encode(),
    lambda text: (text + "x: 2026-13-45\n").encode(),
    lambda text: (text + f"x: {'9' * 5_000}\n").encode(),
    lambda text: (text + f"x: 0x{'f' * 5_000}\n").encode(),
    lambda text: (text + f"x: {'[' * 3_000}\n").encode(),
    lambda text: (text + f"x: {'[' * 60}{']' * 60}\n").encode(),
    lambda text: (text + f"x: {'{a: ' * 100}1{'}' * 100}\n").encode(),
    lambda text: (text + "? [a, b]\n: c\n").encode(),
    lambda text: (text + "1: 2\nnull: 3\ntrue: 4\n").encode(),
    lambda text: (text + "<<: [1, 2]\n").encode(),
    lambda text: (text + "<<: {training: {seed: 1}}\n").encode(),
    lambda text: (text + "---\nmodel: x\n").encode(),
    lambda text: (text + 'x: "\\0\\ud800"\n').encode(),
    lambda text: (text + "x: !!binary '%%%'\n").encode(),
    lambda text: (text + "x: !!set {a, b}\n").encode(),
    lambda text: (text + "x: !!omap [a: 1]\n").encode(),
    lambda text: (text + "x: 190:20:30\n").encode(),
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@dataclass(frozen=True)
class Case:
    """Files to write into an empty folder, `recipe.yaml` among them."""

    files: dict[str, bytes]

    def __repr__(self) -> str:
        return f"Case({ {name: content[:2_000] for name, content in self.files.items()}!r})"


def _rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(count)]


def _json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD_DATA = {"train.jsonl": _json_lines(_rows()), "train.csv": b"prompt,completion\nWhat?,This\nWho?,That\n"}


@st.composite
def recipes(draw: st.DrawFn) -> Case:
    """A valid recipe with some keys set to arbitrary values, or with its text changed; or no recipe at all."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        text = draw(
            st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda one: one.encode("utf-8", "replace")))
        )
        return Case({**GOOD_DATA, "recipe.yaml": text})
    if kind == 1:
        text = draw(
            st.sampled_from([BOMB, "", "- a\n- b\n", "3", "text", "[]", "{}", "null", "---\n---\n", "%YAML 9.9\n--- a"])
        )
        return Case({**GOOD_DATA, "recipe.yaml": text.encode()})
    content: dict[str, Any] = {"model": "MODEL", "data": {"train": "train.jsonl"}}
    for _ in range(draw(st.integers(1, 3)) if kind > 3 else 0):
        *path, last = draw(st.sampled_from(KEYS))
        section = content
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = draw(odd_values)
    text = yaml.safe_dump(content, allow_unicode=draw(st.booleans()), sort_keys=False)
    if kind <= 4:
        return Case({**GOOD_DATA, "recipe.yaml": draw(st.sampled_from(_TEXT_CHANGES))(text)})
    return Case({**GOOD_DATA, "recipe.yaml": text.encode("utf-8", "surrogatepass")})


_PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\n",
        b"\r\n",
        b"\\",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-",
        b"null",
        b"true",
        b'{"prompt": "a", "completion": "b"}',
        b"9" * 5_000,
        b"[" * 5_000,
        b'{"prompt": {"a": 1}, "completion": ["x"]}',
        b'{"messages": [{"role": "user", "content": "a"}]}',
        b'{"text": 3}',
        b'{"messages": [{"role": null, "content": {"a": 1}}, 5]}',
        b"prompt,completion",
        b'"a,b',
        b'a""b',
        b"\xef\xbb\xbf",
        b'{"prompt": 1e400, "completion": -0.0}',
        b'{"": "", "": ""}',
        b"PAR1",
        b"<script>",
        b"\xe2\x80\xa8",
        b" ",
        b"{}",
        b'{"prompt": "a", "completion": 123456789012345678901234567890}',
        b'{"prompt": "<|im_end|>", "completion": "<|pad|>"}',
    ]  # fmt: skip
)
_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_messages = st.lists(
    st.one_of(
        _json_values,
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["user", "assistant", "system", "tool"]) | _json_values,
                "content": _json_values,
            },
        ),
    ),
    max_size=4,
)
_columns = st.sampled_from(["prompt", "completion", "messages", "text", "label", "", "a\0b"])


@st.composite
def _some_rows(draw: st.DrawFn) -> list[Any]:
    rows: list[Any] = [dict(row) for row in _rows(draw(st.integers(0, 4)))]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(
            st.one_of(
                _json_values,
                st.dictionaries(_columns, _json_values, max_size=3),
                st.fixed_dictionaries({"messages": _messages}),
                st.fixed_dictionaries({"prompt": _json_values, "completion": _json_values}),
            )
        )
        rows.insert(draw(st.integers(0, len(rows))), row)
    return rows


@st.composite
def _file(draw: st.DrawFn, suffix: str) -> bytes:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=80))
    if kind == 1:
        return b"".join(draw(st.lists(_PIECES, max_size=8)))
    rows = draw(_some_rows())
    if suffix == ".parquet":
        return draw(_parquet(rows))
    if suffix == ".csv":
        lines = io.StringIO()
        table = draw(st.lists(st.lists(st.text(max_size=6), max_size=3), max_size=4))
        csv.writer(lines).writerows([["prompt", "completion"], *table])
        content = lines.getvalue().encode("utf-8", "replace")
    elif suffix == ".json":
        content = json.dumps(rows if draw(st.booleans()) else draw(_json_values)).encode()
    elif suffix == ".txt":
        content = draw(st.text(max_size=60)).encode("utf-8", "replace")
    else:
        content = _json_lines(rows)
    if kind == 2 and content:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(_PIECES) + content[place + draw(st.integers(0, 3)) :]
    return content


@st.composite
def _parquet(draw: st.DrawFn, rows: list[Any]) -> bytes:
    """A table of arbitrary types, possibly with some bytes changed in its footer, which describes the file's content."""
    kinds = [
        pa.array([1, None]), pa.array([b"\xff", b""]), pa.array([{"a": 1}, None]), pa.array([[1], []]), pa.array(["a", "b"]),
        pa.array([1.5, float("nan")]), pa.array([True, None]), pa.array([1, 2], pa.timestamp("us")), pa.array(["x", "y"]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())), pa.array([None, None]),
        pa.array(["a", "b"]).dictionary_encode(), pa.array([1, 2], pa.duration("s")), pa.array([], pa.string()),
        pa.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2),
    ]  # fmt: skip
    first, second = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    shortest = min(len(first), len(second))
    names = draw(st.sampled_from([["prompt", "completion"], ["messages", "x"], ["text", "text"], ["prompt", "prompt"]]))
    into = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([first[:shortest], second[:shortest]], names=names), into)
    content = into.getvalue()
    return content if draw(st.booleans()) else content[: draw(st.integers(0, len(content)))]


@st.composite
def data_files(draw: st.DrawFn) -> Case:
    """A valid recipe with malformed data, for training or for evaluation."""
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".txt"]))
    content = draw(_file(suffix))
    key = draw(st.sampled_from(["train", "train", "eval", "validation"]))
    data: dict[str, Any] = {"train": "train.jsonl", key: f"odd{suffix}"}
    if draw(st.integers(0, 4)) == 0:
        data |= draw(
            st.sampled_from(
                [{"label_names": {"0": "no"}}, {"packing": True}, {"validation_size": 2}, {"chat_template": False}]
            )
        )
    return Case(
        {**GOOD_DATA, f"odd{suffix}": content, "recipe.yaml": yaml.safe_dump({"model": "MODEL", "data": data}).encode()}
    )


class _Hangs(BaseException):
    pass


def _not_predicted(recipe: Recipe, **rows: Any) -> Any:
    raise PlanError("Not predicted.")


_quick_check = partial(planning.check, predict=_not_predicted)


def complaint(case: Case, folder: Path, model: Path, *, predict: bool = False) -> str | None:
    """Run `sbft check` on a case; returns what is wrong with how it ends, or None.

    Args:
        case: files to write.
        folder: an empty folder, where the command runs.
        model: a small checkpoint, which the recipes call MODEL.
        predict: predict the peak of memory too, which takes longer than everything else.
    """
    for name, content in case.files.items():
        (folder / name).write_bytes(content.replace(b"MODEL", str(model).encode()))
    before = sorted(folder.rglob("*"))

    def hangs(number: int, frame: Any) -> None:
        raise _Hangs

    former_folder, former = Path.cwd(), signal.signal(signal.SIGALRM, hangs)
    os.chdir(folder)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        with patch.object(planning, "check", planning.check if predict else _quick_check):
            result = CliRunner().invoke(app, ["check", "recipe.yaml"])
    except _Hangs:
        return f"it hangs for {LONGEST_S:g} s: {''.join(traceback.format_exc().splitlines()[-8:])}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        os.chdir(former_folder)
    told = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"it raises {result.exception!r}"
    if sorted(folder.rglob("*")) != before:
        return "it leaves files behind"
    if result.exit_code in (0, 1) and not told:
        return None
    if result.exit_code != 2:
        cause = result.exception.__context__ if result.exception else None
        where = "".join(traceback.format_exception(cause)[-4:]) if cause else ""
        return f"exit code {result.exit_code}: {told[:2_000]} {where}"
    if not told:
        return None if "Errors: " in result.stdout else f"exit code 2 without a word: {result.stdout}"
    if not told.startswith("Error: ") or not re.search(r"[.?)»\"'\]}]\s*$", told):
        return f"no sentence: {told[:2_000]}"
    if "Traceback" in told or _TYPE_NAME.search(told):
        return f"a traceback, or the name of a type: {told[:2_000]}"
    return None if len(told) < 10_000 else f"{len(told)} characters: {told[:500]}"
