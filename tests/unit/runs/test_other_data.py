"""Data that is replayed so that a model forgets less, and data that is watched to measure forgetting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import DataError, RecipeError
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.card import card
from sbft.runs.description import describe_data
from sbft.runs.other_data import draw
from sbft.runs.prepare import Prepared, prepare
from sbft.runs.record import RunRecord, forgetting
from sbft.runs.run_recipe import run

TEXTS = [{"text": f"The quick brown fox counts {n} letters. " * (1 + n % 4)} for n in range(60)]
OLD_TEXTS = [{"text": f"An old sentence, number {n}, to be kept in mind." * (1 + n % 3)} for n in range(40)]
ANSWERS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "0 1 2 3"}]}
    for n in range(40)
]
OLD = {
    "text": OLD_TEXTS,
    "chat": CHATS,
    "answers": [{"question": f"Old question {n}?", "answer": "dog"} for n in range(40)],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(folder: Path, model: Path, rows: list[dict[str, Any]], *overrides: str) -> Recipe:
    data = write(folder / "train.jsonl", rows)
    return resolve(load_recipe(None, list(overrides), model=str(model), data=str(data), output_dir=str(folder / "run")))


def replaying(folder: Path, kind: str, share: float = 0.2) -> list[str]:
    old = write(folder / "old.jsonl", OLD[kind])
    named = ["data.replay.prompt=question", "data.replay.completion=answer"] if kind == "answers" else []
    return [f"data.replay.data={old}", f"data.replay.share={share}", *named]


def documents(prepared: Prepared) -> list[tuple[int, ...]]:
    """The token ids of each example, with packed rows split into their documents."""
    found = []
    for row in prepared.examples:
        positions = row.get("position_ids", [0])
        starts = [place for place, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(row["input_ids"])]
        found += [tuple(row["input_ids"][a:b]) for a, b in zip(starts, ends, strict=True)]
    return found


@pytest.mark.parametrize("packing", [False, True], ids=["examples", "packed"])
@pytest.mark.parametrize("kind", list(OLD))
@pytest.mark.parametrize("rows", [TEXTS, CHATS, ANSWERS], ids=["text", "chat", "answers"])
def test_a_share_of_the_tokens_is_of_the_old_kind(
    rows: list[dict[str, Any]], kind: str, packing: bool, tiny_dir: Path, tmp_path: Path
) -> None:
    if (rows is CHATS) and kind == "chat":
        pytest.skip("the two would be the same rows")
    packed = [f"data.packing={str(packing).lower()}", "data.max_length=256"]
    alone = prepare(recipe_of(tmp_path, tiny_dir, rows, *packed))
    mixed = prepare(recipe_of(tmp_path, tiny_dir, rows, *packed, *replaying(tmp_path, kind)))
    old = prepare(
        recipe_of(
            tmp_path, tiny_dir, OLD[kind], "data.max_length=256",
            *(["data.prompt=question", "data.completion=answer"] if kind == "answers" else []),
        )
    )  # fmt: skip
    report, of_old = mixed.report, set(documents(old))
    drawn = [ids for ids in documents(mixed) if ids in of_old]
    assert sorted(ids for ids in documents(mixed) if ids not in of_old) == sorted(documents(alone))
    assert (report.replay_examples, report.replay_tokens) == (len(drawn), sum(map(len, drawn)))
    assert report.tokens == alone.report.tokens + report.replay_tokens == sum(map(len, documents(mixed)))
    # As close as whole examples allow: within half of the longest.
    assert abs(report.replay_tokens - 0.25 * alone.report.tokens) <= old.report.longest / 2
    learned = sum(label != -100 for row in mixed.examples for label in row["labels"])
    assert learned == report.completion_tokens


def test_they_are_at_the_same_places_every_time_and_elsewhere_with_another_seed(tiny_dir: Path, tmp_path: Path) -> None:
    def made(*overrides: str) -> list[tuple[int, ...]]:
        return documents(prepare(recipe_of(tmp_path, tiny_dir, TEXTS, *replaying(tmp_path, "text"), *overrides)))

    first = made()
    assert made() == first and made("data.seed=1") != first
    own = documents(prepare(recipe_of(tmp_path, tiny_dir, TEXTS)))
    kept = set(own)
    assert [ids for ids in first if ids in kept] == own  # in their order
    places = [place for place, ids in enumerate(first) if ids not in kept]
    assert places[0] < len(first) / 2 < places[-1]  # with the others between them, not after them


@pytest.mark.parametrize(
    ("lengths", "wanted", "count"),
    [([10] * 8, 30, 3), ([10] * 8, 34, 3), ([10] * 8, 36, 4), ([10] * 8, 1, 1), ([10] * 3, 80, 8), ([7], 21, 3)],
)
def test_as_many_are_drawn_as_come_nearest(lengths: list[int], wanted: float, count: int) -> None:
    drawn = draw(np.array(lengths), wanted, np.random.default_rng(0))
    assert len(drawn) == count
    times = np.bincount(drawn, minlength=len(lengths))
    assert times.max() - times.min() <= 1  # none is repeated before all others were drawn


def test_nothing_that_is_held_out_or_watched_is_replayed(tiny_dir: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", OLD_TEXTS[:10])
    watched = write(tmp_path / "watched.jsonl", OLD_TEXTS[10:20])
    overrides = [f"data.eval={held}", f"evaluation.watch.old.data={watched}", *replaying(tmp_path, "text", 0.6)]
    mixed = documents(prepare(recipe_of(tmp_path, tiny_dir, TEXTS, *overrides)))
    in_order = documents(prepare(recipe_of(tmp_path, tiny_dir, OLD_TEXTS)))
    assert not set(mixed) & set(in_order[:20])
    assert set(in_order[20:]) <= set(mixed)  # so large a share takes all of them, some twice
    every = write(tmp_path / "held.jsonl", OLD_TEXTS)
    with pytest.raises(DataError, match=r"data\.replay, .*old\.jsonl, are also in the evaluation"):
        prepare(recipe_of(tmp_path, tiny_dir, TEXTS, f"data.eval={every}", *replaying(tmp_path, "text")))


def test_what_is_trained_on_is_not_watched(tiny_dir: Path, tmp_path: Path) -> None:
    watched = write(tmp_path / "watched.jsonl", TEXTS[5:7])
    with pytest.raises(DataError, match=r"watched data .*watched\.jsonl shares 2 questions"):
        prepare(recipe_of(tmp_path, tiny_dir, TEXTS, f"evaluation.watch.old.data={watched}"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.replay.share=0"], "data.replay.share is 0, expected a share of the tokens between 0 and 1, such as 0.05."),
        (["data.replay.share=1"], "data.replay.share is 1, expected a share of the tokens between 0 and 1"),
        (["data.replay.share=5%"], "data.replay.share is '5%', expected a share of the tokens between 0 and 1"),
        (["data.replay.share=null"], "data.replay.share is None, expected a share"),
        (["data.replay={data: old.jsonl}"], "data.replay.share is missing: write its share of all tokens"),
        (["data.replay={share: 0.1}"], "data.replay.data is missing: write what to mix in"),
        (["data.replay.shares=0.1"], "data.replay.shares is not a key of a recipe; the nearest is share."),
        (["data.replay=old.jsonl"], "data.replay is 'old.jsonl', expected keys with values; write `replay: {data: old.jsonl"),
        (["data.train_tokens=1000"], "data.replay mixes examples, and this recipe trains on windows of one stream"),
        (["evaluation.watch.old.metrics=[exact]"], "evaluation.watch.old.metrics names 'exact', expected some of"),
        (["evaluation.watch.old={size: 3}"], "evaluation.watch.old.data is missing: write what to measure"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(overrides: list[str], expected: str) -> None:
    usual = ["data.replay.data=old.jsonl", "data.replay.share=0.1", "evaluation.watch.old.data=old.jsonl"]
    with pytest.raises(RecipeError) as refused:
        load_recipe(None, [*usual, *overrides], model="builtin:smollm2-135m", data="my.jsonl")
    assert expected in str(refused.value) and "problems" not in str(refused.value)


def test_a_generated_task_needs_a_size(tiny_dir: Path, tmp_path: Path) -> None:
    generated = ["data.replay.data=generated:random_text", "data.replay.share=0.5"]
    with pytest.raises(DataError, match=r"set data\.replay\.size"):
        prepare(recipe_of(tmp_path, tiny_dir, TEXTS, *generated))
    prepared = prepare(recipe_of(tmp_path, tiny_dir, TEXTS, *generated, "data.replay.size=30"))
    assert prepared.report.replay_examples > 0


def test_check_and_the_summary_say_how_much_is_replayed(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_dir, TEXTS, *replaying(tmp_path, "text"))
    report = prepare(recipe).report
    said = f"{report.replay_examples} of them, {report.replay_tokens} tokens ("
    assert said in describe_data(prepare(recipe))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert said in " ".join(shown.output.split())


def test_a_run_records_what_it_replays_and_forgets(tiny_dir: Path, tmp_path: Path) -> None:
    watched = write(
        tmp_path / "watched.jsonl", [{"text": "The dog is lazy, and sleeps on."}, {"text": "Ein alter Satz. ä"}]
    )
    questions = write(tmp_path / "questions.jsonl", ANSWERS[:2])
    recipe = recipe_of(
        tmp_path, tiny_dir, TEXTS, *replaying(tmp_path, "text"), "training.max_steps=3", "evaluation.before=false",
        f"evaluation.watch.texts.data={watched}",
        f"evaluation.watch.sums={{data: {questions}, metrics: [exact_match], max_new_tokens: 2}}",
    )  # fmt: skip
    record = run(recipe)
    read = RunRecord.load(tmp_path / "run")
    assert read.watched == record.watched and record.metrics == {}
    assert record.data["replay_tokens"] == prepare(recipe).report.replay_tokens
    before, after = (record.watched["texts"][moment] for moment in ("metrics_before", "metrics"))
    assert list(after) == ["loss", "perplexity", "bits_per_byte"] and record.watched["texts"]["examples"] == 2
    changes = forgetting(read)
    assert (changes["texts"].metric, changes["sums"].metric) == ("bits_per_byte", "exact_match")
    assert changes["texts"].change == after["bits_per_byte"] - before["bits_per_byte"] != 0
    assert "| texts (other data, to see what is forgotten), 2 examples | before | after |" in card(read)


def test_what_an_earlier_session_has_measured_is_kept(tiny_dir: Path, tmp_path: Path) -> None:
    watched = write(tmp_path / "watched.jsonl", [{"text": "The dog is lazy, and sleeps on."}])
    settings = [
        "training.max_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=1",
        f"evaluation.watch.dogs.data={watched}",
    ]
    first = run(recipe_of(tmp_path, tiny_dir, TEXTS, *settings, *replaying(tmp_path, "text")))
    second = run(recipe_of(tmp_path, tiny_dir, TEXTS, *settings, *replaying(tmp_path, "text")), resume=True)
    assert second.watched["dogs"]["metrics_before"] == first.watched["dogs"]["metrics_before"]
    assert second.watched["dogs"]["metrics_before"] != second.watched["dogs"]["metrics"]
