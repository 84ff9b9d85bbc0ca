# SPDX-License-Identifier: Apache-2.0
"""Does a GPU compute what the CPU computes? The demo's model over 20 prompts, teacher-forced.

    python bench/device_agreement.py make demo_out/checkpoint demo_out/agreement   # anywhere
    python bench/device_agreement.py check demo_out/agreement --out bench/results/agreement.json

`make` cuts the vocabulary down to the tokens of the prompts (the rest of the table would be most of
the model), saves that model in parts of at most 30 MiB so that it travels in pieces, and computes
log-probabilities and their bound on the CPU. `check` loads it on the device, both as single layers
and fused, and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from gemm.machine import add_commit, machine
from torch import Tensor, nn

from spense_kernels.checkpoint import load_checkpoint, save_checkpoint
from spense_kernels.testing.agreement import (
    Reference,
    compare,
    log_probabilities,
    reference,
)

PROMPTS, TOKENS = 20, 48
PART_BYTES = 30 << 20


def reduce_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """Keeps the rows of these tokens in the embedding and in the head, tied or not; in place."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is table.weight
    table.weight = nn.Parameter(table.weight[tokens].clone(), requires_grad=False)
    kept = table.weight if tied else nn.Parameter(head.weight[tokens].clone(), requires_grad=False)
    head.weight = kept
    table.num_embeddings = head.out_features = len(tokens)
    table.padding_idx = None
    config = model.config
    config.vocab_size = len(tokens)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)


def make(checkpoint: Path, out: Path, text: list[Path] | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    words = " ".join(path.read_text() for path in text) if text else _documentation()
    ids = tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0]
    ids = ids[: PROMPTS * TOKENS].view(-1, TOKENS)
    if tokenizer.bos_token_id is not None:  # models such as Gemma are at a loss without it
        ids[:, 0] = tokenizer.bos_token_id
    used, prompts = ids.unique(return_inverse=True)
    prompts = prompts.tolist()
    model = load_checkpoint(checkpoint, dtype=torch.bfloat16, fuse=False)
    reduce_vocabulary(model, used)
    model.generation_config = None
    save_checkpoint(model, out / "model", max_shard_bytes=PART_BYTES)
    wanted = reference(out / "model", prompts)
    torch.save({"prompts": prompts, **vars(wanted)}, out / "reference.pt")
    sizes = [file.stat().st_size >> 20 for file in (out / "model").glob("*.safetensors")]
    print(
        f"{len(prompts)} prompts, {len(used)} tokens, bound {wanted.bound:.3f}, parts {sizes} MiB"
    )


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def check(
    folder: Path,
    device: torch.device,
    out: Path | None,
    stop_after: float | None,
    commit: str | None,
) -> bool:
    """Prints, and writes after each of the two models, what was found; whether all is well.

    A model that does not begin within `stop_after` seconds is named and left out.
    """
    start = time.perf_counter()
    stored = torch.load(folder / "reference.pt")
    prompts = stored.pop("prompts")
    wanted = Reference(**stored)
    found: dict[str, dict] = {}
    report = {"run": machine(device, commit), "prompts": len(prompts), "results": found}
    for name, fuse in (("single", False), ("fused", True)):
        if stop_after is not None and time.perf_counter() - start > stop_after:
            print(f"{name}: left out, time is up", flush=True)
            continue
        model = load_checkpoint(folder / "model", device, fuse=fuse)
        rows = log_probabilities(model, prompts)
        all_tokens = [[dict(enumerate(row.tolist())) for row in each] for each in rows]
        seen = compare(all_tokens, wanted)
        found[name] = asdict(seen) | {"ok": seen.ok}
        print(f"{name}: {seen} ({time.perf_counter() - start:.1f} s)", flush=True)
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n")
    return bool(found) and all(result["ok"] for result in found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("checkpoint", type=Path)
    maker.add_argument("folder", type=Path)
    maker.add_argument("--text", nargs="+", type=Path)
    checker = verbs.add_parser("check")
    checker.add_argument("folder", type=Path)
    checker.add_argument("--device", default="cuda")
    checker.add_argument("--stop-after", type=float, help="seconds after which no model begins")
    checker.add_argument("--out", type=Path)
    add_commit(checker)
    args = parser.parse_args(arguments)
    if args.verb == "make":
        args.folder.mkdir(parents=True)
        make(args.checkpoint, args.folder, args.text)
        return 0
    device = torch.device(args.device)
    return 0 if check(args.folder, device, args.out, args.stop_after, args.commit) else 1


if __name__ == "__main__":
    sys.exit(main())
