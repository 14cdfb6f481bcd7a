"""Chat templates: a conversation as text, and which parts of that text the assistant wrote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateError

from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class Piece(NamedTuple):
    """A part of a text that is tokenized by itself."""

    text: str
    trained: bool
    """Whether the model learns to write it."""
    rendered: bool = False
    """Whether a chat template wrote it, special tokens and all."""
    ended: bool = False
    """Whether it ends with a token that ends the turn."""


def render_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False, markers: bool = True
) -> list[Piece]:
    """Renders a conversation and cuts it where the assistant's turns begin and end.

    The assistant's turns are where the template's own generation markers say, if it has them. Else turn i is what the
    conversation up to i has more than the conversation before i with the opening of an answer. Where a template
    renders early turns differently once later ones follow (Qwen3 leaves out old thinking), the turn's content is
    looked for instead, and reaches to the end of its turn.

    Args:
        messages: the conversation, roles and contents.
        tokenizer: a tokenizer with a chat template.
        ask: end with the opening of an answer, for the model to go on.
        markers: use the template's generation markers.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the conversation, or an answer cannot be
            found in what it renders.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "The data has messages, but the tokenizer has no chat template to render them with. Use a chat model, or "
            "columns prompt and completion."
        )
    text = _render(messages, tokenizer, ask=ask)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if markers and _MARKER.search(str(tokenizer.chat_template)):
        spans = _marked_spans(messages, tokenizer, ask)
    else:
        spans = _spans_by_prefixes(messages, answers, text, tokenizer) or _spans_by_content(messages, answers, text)
    return _cut(text, spans, _special_tokens(tokenizer))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template puts after an answer, or None where it puts none."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    pieces = render_messages([question, answer], tokenizer, markers=False)
    last = [piece for piece in pieces if piece.trained][-1]
    if not last.ended:
        return None
    ids: list[int] = tokenizer(last.text, add_special_tokens=False)["input_ids"]
    return ids[-1]


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    try:
        # Models that can think before they answer are trained and asked without: data has answers, not thoughts.
        # Templates that know no such switch take no notice.
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {error}. Correct the data "
            "(many models want user and assistant in turn, and some know no system turn)."
        ) from error
    return text


def _marked_spans(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, ask: bool) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=ask,
        enable_thinking=False,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0]]


def _spans_by_prefixes(
    messages: list[dict[str, Any]], answers: list[int], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
    """Spans by what each answer adds; none where the template does not render prefixes of it as prefixes."""
    spans = []
    for index in answers:
        before = _render(messages[:index], tokenizer, ask=True)
        upto = text if index == len(messages) - 1 else _render(messages[: index + 1], tokenizer)
        if not (upto.startswith(before) and text.startswith(upto)):
            return []
        spans.append((len(before), len(upto)))
    return spans


def _spans_by_content(messages: list[dict[str, Any]], answers: list[int], text: str) -> list[Span]:
    spans = []
    place = 0
    for index, message in enumerate(messages):
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        start = text.find(content, place)
        if start < 0:
            if index not in answers:
                continue
            raise DataError(
                f"The tokenizer's chat template does not render this answer as it stands: {content[:80]!r}. Use a "
                "template with generation markers, or columns prompt and completion."
            )
        place = start + len(content)
        if index in answers and content:
            spans.append((start, len(text)))  # cut below, at the end of its turn
    return [(start, min([end, *(later for later, _ in spans if later > start)])) for start, end in spans]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def _cut(text: str, spans: list[Span], special: list[str]) -> list[Piece]:
    """Pieces of a rendered text; an answer goes up to and with the first special token that follows its own words."""
    pieces = []
    place = 0
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    for start, end in spans:
        found = [match.end() for match in pattern.finditer(text, start, end)] if pattern else []
        stop = found[0] if found else end
        if start > place:
            pieces.append(Piece(text[place:start], False, rendered=True))
        pieces.append(Piece(text[start:stop], True, rendered=True, ended=bool(found)))
        place = stop
    if place < len(text) and (not pieces or not _only_space(text[place:])):
        pieces.append(Piece(text[place:], False, rendered=True))
    return pieces


def _only_space(text: str) -> bool:
    return not text.strip()
