"""Chat templates: a conversation as text, and which parts of that text the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateError

from sbft.data.coverage import Shape, Text, missing_words, not_covered, shape_of, with_words
from sbft.data.forms import FORMS
from sbft.data.turns import REASONING, THOUGHT_ENDS, Chat, Message, holds_reasoning
from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = "enable_thinking"
"""The template variable that says whether the model thinks before it answers."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_OWN_THOUGHT = re.compile(r"\A<think>.*?</think>\s*", re.DOTALL)

Span = tuple[int, int]
Form = Callable[[list[Message]], list[Message]]


class Piece(NamedTuple):
    """A part of a text that is tokenized separately."""

    text: str
    trained: bool
    """Whether the model learns to write it."""
    rendered: bool = False
    """Whether a chat template wrote it, special tokens and all."""
    ended: bool = False
    """Whether it ends with a token that ends the turn."""


class Answer(NamedTuple):
    """A turn of the assistant."""

    prompt: str
    """The text that the model answers."""
    written: str
    """The text that it writes after the prompt, up to the end of its turn."""


class ChatFormat:
    """Renders conversations with a tokenizer's chat template, and finds the parts that the assistant wrote.

    The prompt of an answer is the conversation before it, followed by the template's opening of an answer. The answer is
    what the rendered conversation has after the prompt, up to the end of the turn.

    Several answers share one text if each is in it exactly as it follows its own prompt. Some templates change earlier
    answers once later turns follow: Qwen3 drops earlier thoughts, and gpt-oss ends earlier answers differently. Such an
    answer gets a text of its own that ends with it. So each answer is learned exactly once, and in full.

    Args:
        tokenizer: the model's tokenizer.
        variables: variables of the template, such as enable_thinking.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self._ends = _special_tokens(tokenizer)
        self._forms: dict[Shape, Form] = {}

    def examples(self, chat: Chat, *, markers: bool = True) -> list[list[Piece]]:
        """The texts to train on for a conversation, each cut where the assistant's turns begin and end.

        The first text contains the last answer.

        Args:
            chat: the conversation. If it has no turn to learn, its text is returned uncut.
            markers: end an answer where the template's generation markers end, if they enclose all of it.

        Raises:
            DataError: the tokenizer has no chat template, the template refuses the conversation, or part of what the
                assistant wrote is missing from the texts to learn.
        """
        self._require_template()
        self._refuse_thoughts(chat)
        examples = self._examples(replace(chat, messages=self._form(chat)(chat.messages)), markers)
        learned = _text(examples).learned
        for place in chat.learned:
            if part := missing_words(chat.messages[place], learned):
                raise DataError(
                    f"The tokenizer's chat template does not render the {part.name} of this answer as it is written: "
                    f"{part.value[:80]!r}. Correct the data, use another template, or use the columns prompt and completion "
                    "with data.chat_template: false."
                )
        return examples

    def prompt(self, chat: Chat) -> list[Piece]:
        """The prompt of the next answer: the conversation and the opening of an answer, cut as in training."""
        self._require_template()
        chat = replace(chat, messages=self._form(chat)(chat.messages))
        text = self._render(chat, ask=True)
        spans, _ = self._spans(chat, text, self._answers(chat), markers=True)
        return self._cut(text, spans, whole=True)

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise DataError(
                "The data has messages, but the tokenizer has no chat template to render them with. Use a chat model, "
                "or columns prompt and completion."
            )

    def _refuse_thoughts(self, chat: Chat) -> None:
        """Refuses thoughts that never end, because they were cut off, and any thoughts if enable_thinking is false."""
        contents = [str(chat.messages[place]["content"]) for place in chat.learned]
        if unended := [text for text in contents if text.lstrip().startswith("<think>") and THOUGHT_ENDS not in text]:
            raise DataError(
                f"An answer in the data begins a thought that never ends: {unended[0][:80]!r}. It was probably cut off: "
                f"remove the row, or add {THOUGHT_ENDS} and the answer after it."
            )
        without = self.variables.get(THINKING) is False and THINKING in str(self.tokenizer.chat_template)
        if without and any(holds_reasoning(chat.messages[place]) for place in chat.learned):
            raise DataError(
                "The answers in the data contain reasoning, but data.chat_template_kwargs.enable_thinking is false: the "
                "model would be asked for answers without it. Set it to true, leave it out, or remove the reasoning from "
                "the data."
            )

    def _form(self, chat: Chat) -> Form:
        """The form in which this template renders messages of this shape: the first one that loses nothing."""
        # Turns of weight 0 must be rendered in full too: they are part of the prompt of what follows. Only an answer in
        # the very first turn may be lost: it has no prompt, and many templates cannot even open it.
        whole = replace(chat, learned=tuple(place for place in chat.answers() if place or place in chat.learned))
        shape = shape_of(whole)
        if shape not in self._forms:
            self._forms[shape] = self._fitting_form(with_words(whole))
        return self._forms[shape]

    def _fitting_form(self, worded: Chat) -> Form:
        errors: dict[int, DataError] = {}
        tried: list[list[Message]] = []
        for form in FORMS:
            messages = form(worded.messages)
            if messages in tried:
                continue
            tried.append(messages)
            try:
                examples = self._examples(replace(worded, messages=messages), markers=True)
            except DataError as error:
                errors.setdefault(-1, error)
                continue
            lost = not_covered(worded, _text(examples))
            if lost is None:
                return form
            errors.setdefault(lost.rank, DataError(f"The tokenizer's chat template {lost.what}. {lost.advice}"))
        raise errors[max(errors)]

    def _examples(self, chat: Chat, markers: bool) -> list[list[Piece]]:
        text = self._render(chat)
        if not chat.learned:
            return [[Piece(text, False, rendered=True)]]
        left = self._answers(chat)
        examples = []
        while left:
            prompt, written = left[max(left)]
            if not text.startswith(prompt + written):
                text = prompt + written
            spans, left = self._spans(chat, text, left, markers)
            examples.append(self._cut(text, spans))
            if left:
                text = self._render(chat.until(max(left) + 1))
        return examples

    def _answers(self, chat: Chat) -> dict[int, Answer]:
        return {place: self._answer(chat, place) for place in chat.learned}

    def _spans(
        self, chat: Chat, text: str, answers: dict[int, Answer], markers: bool
    ) -> tuple[list[Span], dict[int, Answer]]:
        """Where answers are in a text; and the answers that are not in it word for word."""
        marked = self._marked_ends(chat, text) if markers else []
        spans: list[Span] = []
        missing: dict[int, Answer] = {}
        for place, answer in answers.items():
            start = self._start(chat, place, answer, text)
            if start is None:
                missing[place] = answer
                continue
            end = start + len(answer.written)
            spans.append((start, self._end(text, start, end, marked, chat.messages[place])))
        return spans, missing

    def _answer(self, chat: Chat, place: int) -> Answer:
        """A turn's prompt, and what the assistant writes after it, up to the end of its turn."""
        whole = self._render(chat.until(place + 1)).removesuffix(self._tail)
        prompt = self._render(chat.until(place), ask=True) if place else self._first_prompt(whole)
        if whole.startswith(prompt):
            start = len(prompt)
        elif (thought := self._after_open_thought(prompt, whole, chat.messages[place])) is not None:
            return Answer(prompt, thought)
        else:
            start = self._start_after_changed_history(chat, place, prompt, whole)
        return Answer(prompt, whole[start : self._without_space_after(whole, start)])

    def _first_prompt(self, whole: str) -> str:
        """The prompt of an answer in the first turn: the text up to and including the opening of an answer."""
        question = Chat([{"role": "user", "content": "a"}])
        opening = self._render(question, ask=True).removeprefix(self._render(question).removesuffix(self._tail))
        before, opened, _ = whole.partition(opening) if opening else ("", "", "")
        if not opened:
            raise DataError(
                "A conversation begins with the assistant's turn, which the tokenizer's chat template does not open as it "
                f"opens others ({opening!r}). Put a user turn before it, or give it a weight of 0."
            )
        return before + opened

    def _start_after_changed_history(self, chat: Chat, place: int, prompt: str, whole: str) -> int:
        """Where an answer begins if the template changes the text before it (gpt-oss drops earlier thoughts then).

        The conversation is rendered again with another answer in its place. The answer begins after the last opening of
        an answer in what both texts have in common.
        """
        before = self._render(chat.until(place)).removesuffix(self._tail)
        opening = prompt.removeprefix(before)
        other = replace(chat, messages=[*chat.messages[:place], {"role": "assistant", "content": _OTHER}], learned=())
        shared = len(commonprefix([whole, self._render(other)]))
        start = whole.rfind(opening, 0, shared)
        if opening in ("", prompt) or start < 0:
            raise DataError(self._prompt_differs(prompt, whole))
        return start + len(opening)

    def _after_open_thought(self, prompt: str, whole: str, message: Message) -> str | None:
        """An answer whose prompt opens a thought that the template does not render (DeepSeek-R1 and its distills).

        None if the prompt opens no thought.
        """
        opened = _OPEN_THOUGHT.search(prompt)
        before = prompt[: opened.start()] if opened else prompt
        if not opened or not whole.startswith(before):
            return None
        inner, ends, _ = message.get("content", "").rpartition(THOUGHT_ENDS)
        thought = message.get(REASONING[0]) or (inner.rpartition("<think>")[2] if ends else "")
        answer = _OWN_THOUGHT.sub("", whole[len(before) :], count=1)
        answer = answer.lstrip("\n")
        return f"{thought.strip()}\n{THOUGHT_ENDS}\n\n{answer[: self._without_space_after(answer, 0)]}"

    def _prompt_differs(self, prompt: str, whole: str) -> str:
        same = len(commonprefix([prompt, whole]))
        return (
            "The tokenizer's chat template prompts for an answer differently than it renders one: after "
            f"{prompt[max(same - 30, 0) : same]!r} the prompt has {prompt[same : same + 40]!r}, and the rendered answer "
            f"{whole[same : same + 40]!r}. The model would get prompts that it never saw in training: use a template that "
            "does both alike, or data.chat_template: false."
        )

    def _start(self, chat: Chat, place: int, answer: Answer, text: str) -> int | None:
        """Where an answer begins in the text; None if it is not there word for word.

        The opening of an earlier answer may be shorter there than in its prompt (without an empty thought).
        """
        prompt, written = answer
        if text.startswith(prompt + written):
            return len(prompt)
        if place == 0:
            return None
        before = self._render(chat.until(place)).removesuffix(self._tail)
        if not (text.startswith(before) and prompt.startswith(before)):
            return None
        starts = range(len(commonprefix([prompt, text])), len(before) - 1, -1)
        return next((start for start in starts if text.startswith(written, start)), None)

    def _end(self, text: str, start: int, end: int, marked: list[int], message: Message) -> int:
        for mark in marked:
            if start < mark < end and not missing_words(message, text[start:mark]):
                return mark
        closed = [match.end() for match in self._ends.finditer(text, start, end)][-1:] == [end]
        # If turns have no end token of their own, the token that opens the next turn ends them (GLM).
        following = None if closed else re.compile(rf"\s*(?:{self._ends.pattern})").match(text, end)
        return following.end() if following else end

    @cached_property
    def _tail(self) -> str:
        """What the template appends to every conversation unless it prompts for an answer (Phi-3)."""
        question = Chat([{"role": "user", "content": "a"}])
        try:
            closed, asked = self._render(question), self._render(question, ask=True)
        except DataError:
            return ""
        same = len(commonprefix([closed, asked]))
        inside = [match.start() for match in self._ends.finditer(closed) if match.start() < same < match.end()]
        return closed[inside[0] if inside else same :]

    def _marked_ends(self, chat: Chat, text: str) -> list[int]:
        """Where the assistant's turns end according to the template's generation markers."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=chat.tools)
        if not _MARKER.search(template):
            return []
        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.variables}
        rendered: Any = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
        (whole,), (spans,) = rendered
        shared = len(commonprefix([whole, text]))
        ends = (self._without_space_after(whole, start, end) for start, end in spans)
        return [end for end in ends if end <= shared]

    def _without_space_after(self, text: str, start: int, end: int | None = None) -> int:
        """The end of `text[start:end]` without the white space after a special token at its end."""
        end = len(text) if end is None else end
        last = [match.end() for match in self._ends.finditer(text, start, end)][-1:]
        return last[0] if last and not text[last[0] : end].strip() else end

    def _cut(self, text: str, spans: list[Span], *, whole: bool = False) -> list[Piece]:
        pieces = []
        place = 0
        for start, end in spans:
            if start > place:
                pieces.append(Piece(text[place:start], False, rendered=True))
            last = [match.end() for match in self._ends.finditer(text, start, end)][-1:]
            pieces.append(Piece(text[start:end], True, rendered=True, ended=last == [end]))
            place = end
        # The newline that templates put after the last turn is left out: no example learns it.
        if text[place:].strip() or not pieces or (whole and text[place:]):
            pieces.append(Piece(text[place:], False, rendered=True))
        return pieces

    def _render(self, chat: Chat, *, ask: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                tokenize=False,
                add_generation_prompt=ask,
                **self.variables,
            )
        # A template's own expressions raise these if they get a list of parts instead of text, or the reverse.
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in chat.messages)
            raise DataError(
                f"The tokenizer's chat template refuses a conversation with the roles {roles}: {error}. Correct the data "
                "(many models require user and assistant to alternate, and some have no system turn)."
            ) from error
        return str(text)


_ANSWER: Message = {"role": "assistant", "content": "b"}
_OTHER = "\ufdd0"  # not a character, so that no answer begins with it


def ends_of_turns(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which the chat template ends the assistant's turns: plain answers, and tool calls."""
    question: Message = {"role": "user", "content": "a"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Message = {"role": "tool", "content": "c"}
    template = ChatFormat(tokenizer)
    ends: list[int] = []
    for messages in ([question, _ANSWER], [question, _ANSWER, question], [question, calling, result, _ANSWER]):
        learned = tuple(place for place, message in enumerate(messages) if message["role"] == "assistant")
        try:
            examples = template.examples(Chat(messages, learned), markers=False)
        except DataError:
            continue  # many templates do not support tools, and such rows are refused
        closed = [piece.text for example in examples for piece in example if piece.trained and piece.ended]
        ends += [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in closed]
    return list(dict.fromkeys(ends))


def _text(examples: list[list[Piece]]) -> Text:
    """The examples' texts: what is learned, and the rest."""
    learned = "\n".join(piece.text for example in examples for piece in example if piece.trained)
    return Text(learned, "\n".join(piece.text for example in examples for piece in example if not piece.trained))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
