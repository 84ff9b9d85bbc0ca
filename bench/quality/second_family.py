# SPDX-License-Identifier: Apache-2.0
"""A second model family: train a small Llama or Qwen3 on the prose, prune it, measure R.

    python bench/quality/second_family.py --device cuda  # 3 minutes, H100 (not timed)
    python bench/quality/second_family.py --device cpu --small  # 5 to 10 minutes, 2 cores
    python bench/quality/second_family.py --device cpu --tiny  # a minute, 2 cores

Nothing in the pruner was tuned on this model. It learns the calibration side of the prose
(corpus.py) with a BPE vocabulary of its own; the epoch with the least loss on windows held out of
training is kept. R is measured on the test side, as for Gemma. --tiny learns Python's documentation
instead, which every Python has, so it needs no download.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import CALIBRATION_SEED, fetch, load_prose, training_texts
from session import SETTINGS, Session, commit, machine
from targets import THOROUGH
from torch import Tensor

from spense_kernels import evaluate
from spense_kernels.prune import PruneConfig
from spense_kernels.prune.store import write_atomic

FRACTIONS = (0.0, 0.125, 0.25, 0.5)
HELD_OUT = 16  # windows of each pool that training does not see


@dataclass(frozen=True)
class Size:
    """What is trained: shapes of the model, vocabulary, text and steps."""

    hidden: int = 512
    layers: int = 8
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    length: int = 512
    epochs: int = 6
    batch: int = 32
    lr: float = 1.2e-3
    calibration: int = 128
    test: int = 64


# For a CPU.
SMALL = Size(
    hidden=128, layers=3, intermediate=384, heads=4, kv_heads=2, vocabulary=512, length=128,
    epochs=1, batch=16, lr=4e-3, calibration=64, test=48,
)  # fmt: skip
# Nearly bytes: what little text there is then teaches most.
TINY = Size(
    hidden=96, layers=2, intermediate=256, heads=4, kv_heads=2, vocabulary=300, length=128,
    epochs=2, batch=16, lr=4e-3, calibration=32, test=24,
)  # fmt: skip


def make_tokenizer(texts: list[str], size: int):
    """Byte-level BPE with a BOS, learned from the training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def make_model(family: str, size: Size, vocabulary: int, seed: int):
    """A float32 model of the family with random weights."""
    import transformers

    name = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


@dataclass
class Text:
    """Token windows int64 [S, L] and how many tokens there are.

    Attributes:
        pools: "faq" and "book", the calibration side.
        parts: "test" and "outside".
    """

    vocabulary: int
    pools: dict[str, Tensor]
    parts: dict[str, Tensor]


def read_text(options, size: Size) -> Text:
    """The prose, or Python's documentation when tiny. What the prose gave stays in the cache."""
    if options.tiny:
        docs = evaluate.python_docs()
        tokenizer = make_tokenizer(list(docs.calibration), size.vocabulary)
        halves = [evaluate.windows(tokenizer, docs.calibration[i::2], size.length) for i in (0, 1)]
        test = evaluate.windows(tokenizer, docs.test, size.length)
        parts = {"test": test[: size.test], "outside": test[size.test : size.test + 16]}
        return Text(len(tokenizer), dict(zip(("faq", "book"), halves, strict=True)), parts)
    path = options.cache / f"second_{size.vocabulary}_{size.length}_{size.test}.pt"
    if path.exists():
        return Text(**torch.load(path, weights_only=True))
    folder = options.cache / "packages"
    tokenizer = make_tokenizer(training_texts(fetch(folder)), size.vocabulary)
    prose = load_prose(tokenizer, folder, size.calibration, size.test, length=size.length)
    text = Text(len(tokenizer), prose.pools, {"test": prose.test, "outside": prose.outside})
    write_atomic(path, lambda file: torch.save(vars(text), file))
    return text


def cut(pools: dict[str, Tensor], offset: int) -> Tensor:
    """int64 [S, L]: all text of the pools in windows that begin `offset` tokens later."""
    out = []
    for pool in pools.values():
        length = pool.shape[1] - 1
        stream = pool[:, 1:].flatten()[offset:]
        rows = stream[: len(stream) // length * length].view(-1, length)
        out.append(torch.cat([pool[:1, :1].expand(len(rows), 1), rows], dim=1))
    return torch.cat(out)


def batches(pools: dict[str, Tensor], size: Size, seed: int):
    """Batches of every epoch, each epoch cut at another offset; yields (tokens, epoch's last)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(size.epochs):
        offset = int(torch.randint(0, size.length, (), generator=generator))
        windows = cut(pools, offset)
        order = torch.randperm(len(windows), generator=generator)
        # One window fewer may come of another offset: every epoch has as many steps.
        count = (sum(len(p) for p in pools.values()) - 2 * len(pools)) // size.batch
        for i in range(count):
            yield windows[order[i * size.batch : (i + 1) * size.batch]], i + 1 == count


def train(model, pools: dict[str, Tensor], held: Tensor, size: Size, options) -> dict:
    """AdamW with a cosine; leaves the weights of the best epoch in the model.

    Returns {"steps", "tokens", "seconds", "held_out_nll" of each epoch}.
    """
    device = options.device
    model.to(device).train()
    plan = list(batches(pools, size, options.seed))
    plan = plan[: options.max_steps or None]
    steps = len(plan)
    if steps < 1:
        raise SystemExit(f"second_family: the text makes no batch of {size.batch} windows")
    grouped = [[], []]
    for parameter in model.parameters():
        grouped[parameter.dim() < 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": grouped[0], "weight_decay": 0.1},
            {"params": grouped[1], "weight_decay": 0.0},
        ],
        lr=size.lr,
        betas=(0.9, 0.95),
        fused=device.startswith("cuda"),
    )
    warmup = max(1, steps // 20)
    begin, curve, best = time.monotonic(), [], None
    for step, (ids, last) in enumerate(plan):
        share = min(1.0, (step + 1) / warmup)
        share *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = size.lr * share
        _loss(model, ids.to(device), device).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if last or step + 1 == steps:
            with torch.no_grad():
                losses = [float(_loss(model, part.to(device), device)) for part in held.split(8)]
            curve.append(round(sum(losses) / len(losses), 4))
            seconds = time.monotonic() - begin
            print(f"  step {step + 1}/{steps} held out {curve[-1]:.4f} {seconds:.0f} s", flush=True)
            if best is None or curve[-1] < best[0]:
                best = curve[-1], {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
    model.load_state_dict(best[1])
    return {
        "steps": steps,
        "tokens": steps * size.batch * size.length,
        "seconds": round(time.monotonic() - begin, 1),
        "held_out_nll": curve,
        "kept": curve.index(best[0]) + 1,
    }


def _loss(model, ids: Tensor, device: str) -> Tensor:
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))
    with mixed:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="mean"
    )


def plan(options) -> dict[str, PruneConfig]:
    """Rows beside the two ends; all have FP8 weights and activations."""
    changes = {"search_rounds": 20, "search_rows": 256} if options.tiny else {}
    if options.admm_steps is not None:
        changes["admm_steps"] = options.admm_steps
    ours = {**SETTINGS, **changes}
    sparsegpt = asdict(PruneConfig.sparsegpt(fp8=True))
    rows = {"dense fp8": PruneConfig(**{**ours, "dense_fraction": 1.0, "strategy": "uniform"})}
    rows |= {
        f"sparsegpt + dense columns {d:.1%}": PruneConfig(**{**sparsegpt, "dense_fraction": d})
        for d in FRACTIONS
    }
    for d in FRACTIONS:
        if d:
            uniform = {**ours, "strategy": "uniform", "dense_fraction": d}
            rows[f"uniform {d:.1%}"] = PruneConfig(**uniform)
        rows[f"ours {d:.1%}"] = PruneConfig(**{**ours, "dense_fraction": d})
    if options.device != "cpu":  # a backward pass over all text
        for d in FRACTIONS:
            thorough = {**ours, **THOROUGH, "dense_fraction": d}
            rows[f"ours with correction {d:.1%}"] = PruneConfig(**thorough)
    # Plain statistics first, so that each kind is collected once.
    kinds = {name: (c.token_weighting != "none", c.gradient_share) for name, c in rows.items()}
    return dict(sorted(rows.items(), key=lambda item: kinds[item[0]]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality_second_27m.json"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--family", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--small", action="store_true", help="a size for the CPU")
    parser.add_argument("--tiny", action="store_true", help="to try the script; no download")
    parser.add_argument(
        "--text-only", action="store_true", help="fill the cache, for a machine without network"
    )
    parser.add_argument("--epochs", type=int, default=None, help="passes over the text")
    parser.add_argument("--max-steps", type=int, default=None, help="stop training there")
    parser.add_argument("--admm-steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    base = TINY if options.tiny else SMALL if options.small else Size()
    size = Size(**{**asdict(base), "epochs": options.epochs or base.epochs})
    text = read_text(options, size)
    if options.text_only:
        return
    held = torch.cat([pool[-HELD_OUT:] for pool in text.pools.values()])
    pools = {name: pool[:-HELD_OUT] for name, pool in text.pools.items()}
    model = make_model(options.family, size, text.vocabulary, options.seed)
    count = sum(p.numel() for p in model.parameters())
    seen = sum(pool[:, 1:].numel() for pool in pools.values())
    print(f"{options.family}, {count / 1e6:.1f} M parameters, {seen:,} tokens of text", flush=True)
    trained = {"text_tokens": seen, **train(model, pools, held, size, options)}
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    setup = {
        "model": f"{options.family}, {count / 1e6:.1f} M parameters, trained here",
        "text": "Python's documentation" if options.tiny else "prose of corpus.py",
        "activations": "FP8 a token in rows with FP8, else bfloat16",
        "size": asdict(size),
        "seed": options.seed,
        "calibration_seed": CALIBRATION_SEED,
        "test_windows": len(text.parts["test"]),
        "window_tokens": size.length,
    }
    results = {"setup": setup, "training": trained, "machine": machine(options.device)}
    results |= {"commit": commit(), "rows": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    session = Session(
        model, torch.arange(text.vocabulary), pools, {**text.parts, "validation": held},
        options.device, options.out, size.calibration, results,
    )  # fmt: skip
    session.ends()
    for name, config in plan(options).items():
        session.prune(name, config, 0)
    print(json.dumps({name: round(row["test"]["r"], 4) for name, row in results["rows"].items()}))


if __name__ == "__main__":
    main()
