"""The chat templates of model families: everything that the assistant wrote is learned, as docs/chats.md says."""

from __future__ import annotations

import re

import pytest

from tests.unit.data.chat_cases import (
    CONVERSATIONS,
    DOCUMENT,
    FAMILIES,
    OTHERS,
    PARTS,
    outcome,
    table_row,
    template_of,
    tokenizer_of,
    version_of,
    words,
)

ROWS = dict(re.findall(r"^\| ([^|]+) \| `([0-9a-f]{8})` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_family_has_a_row() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"\n| {family} | " in text for family in FAMILIES)
    assert len(ROWS) >= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_is_learned(family: str) -> None:
    template = template_of(FAMILIES[family])
    if template is None:
        pytest.skip(f"no copy of the chat template of {family} at hand")
    if ROWS.get(family) != version_of(template):
        pytest.skip(f"the installed chat template of {family} is another version than the document's")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table_row(family) in text
    assert words(family) in text


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_the_assistant_wrote_is_learned_and_nothing_else(family: str) -> None:
    if template_of(FAMILIES[family]) is None:
        pytest.skip(f"no copy of the chat template of {family} at hand")
    tokenizer = tokenizer_of(family)
    for name in CONVERSATIONS:
        found = outcome(family, name)  # fails if the prompt differs from that in training
        stretches = [stretch for text in found.texts for stretch in text]
        learned = "\n".join(stretches)
        if found.refused is not None:
            assert name not in ("plain", "system", "think"), found.refused
            continue
        assert all(part in learned for part in PARTS[name]), (name, learned)
        assert not any(part in learned for part in OTHERS), (name, learned)
        ends = {tokenizer(stretch, add_special_tokens=False)["input_ids"][-1] for stretch in stretches}
        assert ends <= set(tokenizer.all_special_ids), (name, stretches)
