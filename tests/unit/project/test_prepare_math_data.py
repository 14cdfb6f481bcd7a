"""The suites' data from the hub: held-out questions are never trained on, neither verbatim nor rewritten."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("prepare_math_data")


def test_math_keeps_problems_of_the_test_and_of_validation_out_of_training(script: ModuleType) -> None:
    train = [{"problem": f"Problem {n}?", "solution": f"\\boxed{{{n}}}"} for n in range(400)]
    test = [{"problem": " problem  7? ", "solution": "\\boxed{7}"}]
    parts = script.math_parts([*train, *train], test)
    asked = {name: {" ".join(row["prompt"].split()).casefold() for row in rows} for name, rows in parts.items()}
    assert len(parts["validation"]) == script.MATH_VALIDATION and parts["train"]
    assert not asked["train"] & (asked["validation"] | asked["test"]) and not asked["validation"] & asked["test"]
    assert parts["test"] == [{"prompt": "Problem:  problem  7? \nSolution: ", "completion": "\\boxed{7}"}]


def test_metamath_keeps_rewritten_and_long_questions_out(script: ModuleType) -> None:
    def row(query: str, original: str, response: str = "The answer is: 1") -> dict[str, str]:
        return {"query": query, "original_question": original, "response": response}

    problem = {"question": "How many?", "answer": "One.\n#### 1"}
    train = [
        row("How  MANY?", "x"),
        row("In other words: how many?", "how many?"),
        row("Too long?", "y", "z" * script.LONGEST),
        row("New?", "New?"),
    ]
    parts = script.metamath_parts(train, [], [problem])
    assert parts["train"] == [{"text": "Question: New? Think step by step.\nAnswer:The answer is: 1"}]
    (asked,) = parts["test"]
    assert asked == {"prompt": "Question: How many? Think step by step.\nAnswer:", "completion": "One.\n#### 1"}
    assert script.metamath_parts(train, [problem], [])["train"] == parts["train"]
