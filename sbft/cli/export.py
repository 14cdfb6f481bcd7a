"""`sbft export`: a trained model in the form that other tools read, whole or as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbft.cli.shared.options import TrustRemoteCodeOption
from sbft.cli.shared.starting import loading_libraries, starting
from sbft.cli.shared.verb import verb
from sbft.errors import ExportError
from sbft.native.sizes import mib, parse_bytes

if TYPE_CHECKING:
    from sbft.export.checkpoint import Export

FORMATS = ("safetensors", "gguf", "compressed-tensors")


@verb
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or one of its checkpoints.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")],
    as_lora: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANK", help="Write an adapter of this rank: what training changed."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, if no recipe.yaml in RUN names it."),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option("--format", help="safetensors; gguf for llama.cpp and Ollama; compressed-tensors for vLLM."),
    ] = "safetensors",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float32, float16, or q8_0 (gguf); default: that of the run.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest size of a file; default: 5GB.")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not evaluate the adapter.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in DIR.")] = False,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Write a trained model for other tools, or as an adapter.

    The result is plain safetensors, or one GGUF file; an adapter is merged into its base. Weights that were trained in 8 or 4
    bits stay as they are in gguf and compressed-tensors. With --as-lora, a LoRA adapter is
    extracted from a full fine-tuning.
    """
    _refuse_contradictions(file_format, as_lora, no_eval, max_shard_size)
    _refuse_for_codes(file_format, base, dtype)
    with loading_libraries():
        from sbft.export.checkpoint import MAX_SHARD_BYTES, export_model
        from sbft.export.compressed import export_compressed
        from sbft.export.gguf_file import export_gguf

    if as_lora is not None:
        settings = {"base": base, "dtype": dtype, "overwrite": overwrite}
        _extract(source, to, as_lora, not no_eval, trust_remote_code, settings)
        return
    if file_format == "gguf":
        _print_written(export_gguf(source, to, base=base, dtype=dtype, overwrite=overwrite))
        return
    size = MAX_SHARD_BYTES if max_shard_size is None else parse_bytes(max_shard_size, "--max-shard-size")
    if file_format == "compressed-tensors":
        _print_written(export_compressed(source, to, max_shard_bytes=size, overwrite=overwrite))
        return
    written = export_model(
        source,
        to,
        base=base,
        dtype=dtype,
        max_shard_bytes=size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    _print_written(written)


def _print_written(written: Export) -> None:
    if written.merged_into is not None:
        values = ", with the 4-bit values it was trained on" if written.dequantized else ""
        print(f"The adapter is merged into {written.merged_into}{values}.")
    if written.coded:
        print(f"The codes of {written.coded} weights are those that were trained.")
    if written.uncoded:
        names = ", ".join(written.uncoded[:3]) + (", ..." if len(written.uncoded) > 3 else "")
        print(f"In bfloat16, because the format has no place for their codes: {len(written.uncoded)} weights ({names}).")
    files = "1 file" if written.files == 1 else f"{written.files} files"
    print(f"Written to {written.folder}: {mib(written.size_bytes)} of weights in {files}.")


def _refuse_contradictions(
    file_format: str, as_lora: int | None, no_eval: bool, max_shard_size: str | None
) -> None:
    if file_format not in FORMATS:
        raise ExportError(f"--format is {file_format!r}, expected one of {', '.join(FORMATS)}.")
    if file_format == "compressed-tensors" and as_lora is not None:
        raise ExportError("--format compressed-tensors writes a whole model, so --as-lora cannot be given with it.")
    if file_format == "gguf" and (as_lora is not None or max_shard_size is not None):
        flag = "--as-lora" if as_lora is not None else "--max-shard-size"
        raise ExportError(f"--format gguf writes a whole model in one file, so {flag} cannot be given with it.")
    if as_lora is None and no_eval:
        raise ExportError(
            "--no-eval belongs to --as-lora RANK, which is not given: a whole model is not evaluated."
        )
    if as_lora is not None and max_shard_size is not None:
        raise ExportError("--max-shard-size is for whole models; an adapter is one file. Leave out one of the two.")


def _refuse_for_codes(file_format: str, base: str | None, dtype: str | None) -> None:
    if file_format == "compressed-tensors" and (base is not None or dtype is not None):
        flag = "--base" if base is not None else "--dtype"
        raise ExportError(f"--format compressed-tensors writes the codes that were trained, so {flag} cannot be given.")


def _extract(
    source: Path, to: Path, rank: int, evaluate: bool, trust_remote_code: bool, settings: dict[str, Any]
) -> None:
    """Write the adapter, measure it, and save a report in its folder."""
    with starting():
        from rich.console import Console

        from sbft.export.low_rank import extract_lora
        from sbft.export.report import measure_adapter, save_report, tell

    with Console(stderr=True).status("Comparing with the base model") as status:
        made = extract_lora(
            source,
            to,
            rank,
            trust_remote_code=trust_remote_code,
            **settings,
            progress=lambda name: status.update(f"Comparing {name}"),
        )
        save_report(made, source, None)  # now, so that a failed measurement loses nothing
        metrics = None
        if evaluate:
            status.update("Measuring the adapter")
            metrics = measure_adapter(made, source, trust_remote_code=trust_remote_code)
            save_report(made, source, metrics)
    print(f"{tell(made, metrics)}\n\nWritten to {to}")
