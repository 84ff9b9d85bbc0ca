# SPDX-License-Identifier: Apache-2.0
"""`spense eval` and `spense generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spense_kernels.cli.options import (
    AnySource,
    Device,
    DType,
    Json,
    Seed,
    check_device,
    enough,
    parse_dtype,
    print_json,
)
from spense_kernels.errors import UserError


def evaluate(
    source: AnySource,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text files; all of them is test text. Default: Python's docs."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows, evenly spread.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window, BOS included.")] = 512,
    dtype: DType = "auto",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Perplexity of a pruned or dense model, with its standard error.

    \b
    Examples:
      spense eval ./model-spense
      spense eval gemma-3-270m --windows 32
      spense eval ./model-spense --text book.txt notes.txt --json
    """
    from spense_kernels import evaluate as tools
    from spense_kernels.models import load_any
    from spense_kernels.progress import bar

    documents = [tools.text.read_text(p) for p in text] if text else tools.python_docs().test
    loaded = load_any(source, parse_dtype(dtype), check_device(device))
    pool = enough(tools.windows(loaded.tokenizer, documents, seq_len), windows, "eval", seq_len)
    chosen = tools.pick(pool, windows)
    with bar(chosen.shape[0], "evaluate", indent="") as progress:
        result = tools.perplexity(loaded.model, chosen, progress=progress.update)
    name = ", ".join(p.name for p in text) if text else tools.python_docs().name
    result = {"source": source, "text": name, "window": seq_len, **result}
    if json:
        print_json(result)
        return
    error = result["ppl_stderr"]
    spread = "" if error is None else f" ± {error:.3f} (standard error by window)"
    typer.echo(f"perplexity {result['ppl']:.3f}{spread}")
    typer.echo(f"nll        {result['nll']:.4f} nats a token over {result['tokens']:,} tokens")


def generate(
    source: AnySource,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt or several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 decodes greedily; more samples.")
    ] = 0.0,
    seed: Seed = 0,
    dtype: DType = "auto",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Continue prompts with a pruned or dense model.

    \b
    Examples:
      spense generate ./model-spense --prompt "Once upon a time"
      spense generate gemma-3-270m --prompt "The sea" "The land" --max-new-tokens 20
    """
    import torch

    from spense_kernels import evaluate as tools
    from spense_kernels.models import load_any

    if not prompt or not all(p.strip() for p in prompt):
        raise UserError("generate: --prompt is empty or missing")
    loaded = load_any(source, parse_dtype(dtype), check_device(device))
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    out = []
    with tools.OpCounter() as ops:
        for text in prompt:
            more = tools.generate(loaded.model, loaded.tokenizer, text, max_new_tokens, **options)
            out.append({"prompt": text, "continuation": more})
            if not json:
                typer.echo(f"{text}{more}\n")
    if json:
        print_json({"source": source, "results": out, "op_calls": dict(ops.calls)})
