"""`perllm model`: inspect GGUF files and make quantisations of them. llama.cpp is imported only where it is used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console

from perllm.broker.errors import BadSetting
from perllm.edge_worker.gguf import read_gguf

app = typer.Typer(name="model", help="GGUF models: look at one, or quantise it.", no_args_is_help=True)

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Source = Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)]


@app.command()
def show(source: Source, as_json: AsJson = False) -> None:
    """What a GGUF file says of itself, checked for damage."""
    gguf = read_gguf(source)
    facts = {
        "file": str(source),
        "architecture": gguf.architecture,
        "quantisation": gguf.quantisation,
        "context_tokens": gguf.context,
        "tensors": gguf.tensors,
        "bytes": gguf.size,
        "kv_bytes_per_token": gguf.kv_bytes_per_token,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            out.print(f"{name.replace('_', ' '):>18}  {value:,}" if isinstance(value, int) else f"{name:>18}  {value}")


@app.command()
def quantize(
    source: Source,
    quantisation: Annotated[str, typer.Argument(help="E.g. q8_0, q4_0, q4_k_m, bf16.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; default: in this folder.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Make a quantisation of a GGUF with llama.cpp's own quantiser. Losses add up: start from the best file."""
    from perllm.edge_worker.model_files import base_name, check_quantisation, quantise  # noqa: PLC0415
    from perllm.edge_worker.preflight import preflight  # noqa: PLC0415

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    quantisation = check_quantisation(quantisation)
    gguf = read_gguf(source)
    target = output or Path(f"{base_name(gguf)}.{quantisation}.gguf")
    if target.exists():
        raise BadSetting(f"{target} exists already: remove it, or give another --output")
    with err.status(f"quantising {source.name} to {quantisation}"):
        preflight(source)
        quantise(source, target, quantisation, threads=threads)
    size = target.stat().st_size
    if as_json:
        print(json.dumps({"file": str(target), "bytes": size, "source_bytes": gguf.size}))
    else:
        out.print(f"{target}: {size / 1e6:.0f} MB (from {gguf.size / 1e6:.0f} MB)", highlight=False, soft_wrap=True)
