# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint in vLLM, offline. The plugin is found by itself where both are installed.

python docs/examples/vllm_offline.py ./pruned "Once upon a time"
python docs/examples/vllm_offline.py ./pruned "Once upon a time" --tensor-parallel-size 2
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.checkpoint,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
    )
    for result in llm.generate(args.prompts, SamplingParams(temperature=0.0, max_tokens=20)):
        print(f"{result.prompt!r} -> {result.outputs[0].text!r}")


if __name__ == "__main__":
    main()
