"""`sbft generate`: ask a model one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbft.cli.shared.load import load_for_use
from sbft.cli.shared.options import AllowPickleOption, TrustRemoteCodeOption
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb


@verb
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a run, any checkpoint, hub id, or builtin:NAME.")],
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with a list of functions that the model may call.")
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Print a model's answer to a prompt.

    The prompt is formatted as in training. Decoding is greedy.
    """
    with loading_libraries():
        from sbft.data.files import read_json
        from sbft.data.format import encode_prompts
        from sbft.evaluation.generate import generate_answers
        from sbft.recipe import load_recipe

    saved = Path(model) / "recipe.yaml"
    recipe = load_recipe(saved) if saved.is_file() else load_recipe(None, model=model, data="none")
    loaded, tokenizer = load_for_use(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    data = recipe.data
    encoded = encode_prompts(
        [{"prompt": prompt, "tools": None if tools is None else read_json(tools)}],
        tokenizer,
        chat_template=data.chat_template,
        system=data.system,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    print(generate_answers(loaded, tokenizer, encoded, max_new_tokens=max_new_tokens)[0])
