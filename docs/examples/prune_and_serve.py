# SPDX-License-Identifier: Apache-2.0
"""A dense Hugging Face model in, a pruned checkpoint and served tokens out.

    python docs/examples/prune_and_serve.py ./Llama-3.2-1B ./pruned --text book.txt

For any decoder of nn.Linear layers. Without --text the weights are pruned by magnitude, which needs
no data and costs far more accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import spense_kernels  # also what makes from_pretrained understand pruned checkpoints
from spense_kernels import SpenseConfig

SEQUENCES, LENGTH = 64, 512  # calibration text: at most so many sequences of so many tokens


def calibration(tokenizer, text: Path, length: int) -> torch.Tensor:
    """int64 [sequences, length] of token ids."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    count = min(SEQUENCES, len(ids) // length)
    return ids[: count * length].view(count, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", help="folder or name of the dense model")
    parser.add_argument("pruned", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--text", type=Path, help="text like what the model will read")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    ids = None
    if args.text is not None:
        config = AutoConfig.from_pretrained(args.dense)
        ids = calibration(tokenizer, args.text, min(LENGTH, config.max_position_embeddings))
    recipe = SpenseConfig(dense_fraction=0.25, calibration=ids)
    model = AutoModelForCausalLM.from_pretrained(args.dense, quantization_config=recipe)
    model.save_pretrained(args.pruned)
    tokenizer.save_pretrained(args.pruned)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    served = spense_kernels.load(args.pruned, device_map=device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    tokens = served.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
