# SPDX-License-Identifier: Apache-2.0
"""The new process: load a checkpoint from disk, evaluate it, continue prompts, count op calls.

`python -m spense_kernels.demo.worker` reads one JSON job from stdin and writes one JSON result to
stdout; everything else goes to stderr.
"""

from __future__ import annotations

import json
import subprocess
import sys

from spense_kernels.errors import SpenseError


def run_in_new_process(job: dict) -> dict:
    """Run work(job) in a fresh interpreter and return its result.

    Raises SpenseError when that process fails; its messages are on stderr already.
    """
    command = [sys.executable, "-m", "spense_kernels.demo.worker"]
    done = subprocess.run(command, input=json.dumps(job).encode(), stdout=subprocess.PIPE)
    if done.returncode:
        raise SpenseError(
            f"demo: the process that loads {job['checkpoint']} ended with code {done.returncode}"
        )
    return json.loads(done.stdout)


def work(job: dict) -> dict:
    """Evaluate a checkpoint.

    Args:
        job: checkpoint (path), dtype (name), threads, windows (token ids), prompts, new_tokens.

    Returns a dict: perplexity, continuations, ops {layers, calls, expected_calls}, sizes,
    load_seconds, peak_bytes.
    """
    import time

    import torch

    from spense_kernels import evaluate
    from spense_kernels.demo.layers import totals
    from spense_kernels.demo.steps import peak_rss_bytes
    from spense_kernels.models import load_any
    from spense_kernels.progress import bar

    torch.set_num_threads(job["threads"])
    begin = time.monotonic()
    loaded = load_any(job["checkpoint"], getattr(torch, job["dtype"]))
    load_seconds = time.monotonic() - begin
    if not loaded.is_spense:
        raise SpenseError(f"demo: {job['checkpoint']} is no spense checkpoint")
    sizes = totals(loaded.model)
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    handle = loaded.model.base_model.register_forward_hook(count)
    windows = torch.tensor(job["windows"], dtype=torch.int64)
    with evaluate.OpCounter() as ops:
        with bar(len(windows), "perplexity, hybrid (new process)") as progress:
            result = evaluate.perplexity(loaded.model, windows, progress=progress.update)
        texts = []
        with bar(len(job["prompts"]), "continuations, hybrid (new process)") as progress:
            for prompt in job["prompts"]:
                texts.append(
                    evaluate.generate(loaded.model, loaded.tokenizer, prompt, job["new_tokens"])
                )
                progress.update(1)
    handle.remove()
    calls, expected = ops.calls["hybrid_gemm"], forwards * sizes["layers"]
    if calls != expected or not calls:
        raise SpenseError(
            f"demo: {calls} calls of hybrid_gemm, expected {expected} "
            f"({sizes['layers']} layers x {forwards} forward passes)"
        )
    return {
        "perplexity": result,
        "continuations": texts,
        "ops": {"layers": sizes["layers"], "calls": calls, "expected_calls": expected},
        "sizes": sizes,
        "load_seconds": load_seconds,
        "peak_bytes": peak_rss_bytes(),
    }


def _main() -> int:
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        result = work(json.load(sys.stdin))
    except SpenseError as error:
        print(f"spense: error: {error}", file=sys.stderr)
        return 1
    json.dump(result, answer)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
