# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own: log-probabilities of prompts, and greedy tokens.

    python vllm_worker.py '{"path": ..., "prompts": [[1, 2], ...], "out": ..., ...}'

Keys: path of a checkpoint; prompts, token ids; out, file for torch.save; tensor_parallel_size;
enforce_eager; dtype; top, how many log-probabilities a position (-1: the whole vocabulary).
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    ranks = job.get("tensor_parallel_size", 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    cores = sorted(os.sched_getaffinity(0))
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[:ranks]))
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=job["path"],
        skip_tokenizer_init=True,
        enforce_eager=job.get("enforce_eager", True),
        tensor_parallel_size=ranks,
        max_model_len=job.get("max_model_len", 64),
        dtype=job.get("dtype", "bfloat16"),
        max_logprobs=-1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=job.get("max_tokens", 8),
        prompt_logprobs=job.get("top", -1),
        detokenize=False,
        ignore_eos=True,
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    results = llm.generate(prompts, sampling, use_tqdm=False)
    torch.save(
        {
            # Of each prompt, each position after the first: token id -> log-probability.
            "logprobs": [
                [{i: v.logprob for i, v in at.items()} for at in r.prompt_logprobs[1:]]
                for r in results
            ],
            "tokens": [list(r.outputs[0].token_ids) for r in results],
        },
        job["out"],
    )


if __name__ == "__main__":
    main()
