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
    ends = _special_tokens(tokenizer)
    if markers and _MARKER.search(str(tokenizer.chat_template)):
        spans = _marked_spans(messages, tokenizer, ask, text, ends)
    else:
        by_prefixes = _spans_by_prefixes(messages, tokenizer, text, ends)
        spans = _spans_by_content(messages, text, ends) if by_prefixes is None else by_prefixes
    return _cut(text, spans, ends)


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
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, enable_thinking=False)
    # A template's own expressions raise these where they take a list of parts for text, or the other way round.
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {error}. Correct the data "
            "(many models want user and assistant in turn, and some know no system turn)."
        ) from error
    return str(text)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _marked_spans(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    ask: bool,
    text: str,
    special: re.Pattern[str],
) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**tokenizer.special_tokens_map, "enable_thinking": False}
    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=ask,
        **variables,
    )
    (spans,) = rendered[1]
    return [(start, _without_space_after(text, start, end, special)) for start, end in spans]


def _without_space_after(text: str, start: int, end: int, special: re.Pattern[str]) -> int:
    """Where a span ends that closes with a special token and white space, without the white space."""
    last = [match.end() for match in special.finditer(text, start, end)][-1:]
    return last[0] if last and not text[last[0] : end].strip() else end


def _spans_by_prefixes(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, text: str, special: re.Pattern[str]
) -> list[Span] | None:
    """Spans by what each answer adds; None where the template does not render a conversation's start as its start.

    An answer ends with the first special token after its own words (Phi-3 adds a second one, gpt-oss has some before).
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, ask=True)
        upto = text if index == len(messages) - 1 else _render(messages[: index + 1], tokenizer)
        if not (upto.startswith(before) and text.startswith(upto)):
            return None
        start, end = len(before), len(upto)
        content = _content(message)
        found = text.find(content, start, end)
        after_words = special.search(text, found + len(content), end) if found >= 0 else None
        spans.append((start, after_words.end() if after_words else _without_space_after(text, start, end, special)))
    return spans


def _spans_by_content(messages: list[dict[str, Any]], text: str, special: re.Pattern[str]) -> list[Span]:
    """Spans of the answers' own words, each with the special token that follows them."""
    closing = re.compile(rf"\s*(?:{special.pattern})")
    spans = []
    place = 0
    for message in messages:
        content = _content(message)
        start = text.find(content, place)
        if start < 0 and message["role"] != "assistant":
            continue
        if start < 0:
            raise DataError(
                f"The tokenizer's chat template does not render this answer as it stands: {content[:80]!r}. Use a "
                "template with generation markers, or columns prompt and completion."
            )
        place = start + len(content)
        if message["role"] == "assistant" and content:
            closed = closing.match(text, place)
            place = closed.end() if closed else place
            spans.append((start, place))
    return spans


def _content(message: dict[str, Any]) -> str:
    return message["content"].strip() if isinstance(message["content"], str) else ""


def _cut(text: str, spans: list[Span], special: re.Pattern[str]) -> list[Piece]:
    pieces = []
    place = 0
    for start, end in spans:
        if start > place:
            pieces.append(Piece(text[place:start], False, rendered=True))
        last = [match.end() for match in special.finditer(text, start, end)][-1:]
        pieces.append(Piece(text[start:end], True, rendered=True, ended=last == [end]))
        place = end
    # The line end that templates put after the last turn is nobody's to learn.
    if text[place:].strip() or not pieces:
        pieces.append(Piece(text[place:], False, rendered=True))
    return pieces
