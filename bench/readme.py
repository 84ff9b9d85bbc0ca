# SPDX-License-Identifier: Apache-2.0
"""Write the result tables of README.md and docs from the committed result files.

`python bench/readme.py` rewrites what stands between their markers; `--check` fails when a page is
out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from decoding.tables import decode_table
from gemm import counter_table, regret, tables

ROOT = Path(__file__).resolve().parent.parent
FEW_TOKENS = 64
RESULTS = ROOT / "bench" / "results"


def demo_table(demo: dict) -> str:
    """The demo's comparison, with where and when it ran."""
    lines = [
        "| | perplexity | nats above original | dense | weights kept | "
        "linear layers, MB a token | with lm_head |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in demo["methods"]:
        above = m["above_original"]
        gap = "0" if above is None else _plus_minus(above["nll"], above["stderr"], 3)
        lines.append(
            f"| {m['label']} | {_plus_minus(m['ppl'], m['ppl_stderr'], 2)} | {gap} | "
            f"{m['dense_fraction']:.1%} | {m['kept_fraction']:.1%} | "
            f"{m['linear_bytes_per_token'] / 1e6:.1f} | {m['model_bytes_per_token'] / 1e6:.1f} |"
        )
    text, machine = demo["text"], demo["machine"]
    lines += [
        "",
        f"{demo['model']['name']}, {text['test_tokens']:,} held-out tokens of {text['name']}, "
        f"{text['calibration_tokens']:,} calibration tokens, one-shot. ± is the standard error by "
        f"window; nats above original are paired. {demo['total_seconds']:.0f} s and "
        f"{demo['peak_memory_bytes'] / 1e9:.1f} GB on {machine['cpu']} with "
        f"{machine['threads']} threads, {demo['created'][:10]}.",
    ]
    return "\n".join(lines)


def cpu_table(cpu: dict) -> str:
    """CPU speed-ups over F.linear in bfloat16, quantisation included."""
    tokens = (1, 2, 4, 16, 128, 512)
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in cpu["results"]))
    ratio = {(r["n"], r["k"], r["m"]): r["ratio_layer"] for r in cpu["results"]}
    lines = [
        "| weight | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        "| --- |" + " --- |" * len(tokens),
    ]
    for n, k in shapes:
        cells = " | ".join(f"{ratio[n, k, m]:.2f}x" for m in tokens)
        lines.append(f"| {n} x {k} | {cells} |")
    machine = cpu["machine"]
    lines += [
        "",
        f"SpenseLinear's work (quantise x, then the GEMM) at {cpu['dense_fraction']:.0%} dense "
        f"against `torch.nn.functional.linear` in bfloat16, same run, same {machine['threads']} "
        f"threads; {machine['cpu']} (family {machine['cpu_family']}, model {machine['model']}), "
        f"{cpu['config']}, torch {cpu['versions']['torch']}, commit {cpu['commit'][:7]}; medians, "
        "large weights rotated past the caches.",
    ]
    return "\n".join(lines)


def quality_table(quality: dict) -> str:
    """What pruning keeps, as R and perplexity; means where a row has several calibration seeds."""
    seeds: dict[str, list[dict]] = {}
    for name, row in quality["rows"].items():
        if re.match(r"dense|sparsegpt|staircase|2:4", name):  # single ideas: docs/pruning.md
            seeds.setdefault(re.sub(r", seed \d+$", "", name), []).append(row["test"])
    lines = ["| | perplexity | R | seeds |", "| --- | --- | --- | --- |"]
    order = sorted(seeds, key=lambda name: -_mean(seeds[name], "r"))
    for name in order:
        error = max(test["r_stderr"] for test in seeds[name])
        lines.append(
            f"| {name} | {_mean(seeds[name], 'ppl'):.2f} | "
            f"{_plus_minus(_mean(seeds[name], 'r'), error, 3)} | {len(seeds[name])} |"
        )
    setup = quality["setup"]
    predictions = setup["test_windows"] * (setup["window_tokens"] - 1)
    lines += [
        "",
        f"{setup['model']}, {predictions:,} held-out tokens of prose, "
        f"{setup['calibration_windows']} calibration windows of {setup['window_tokens']} tokens, "
        f"{quality['machine']['device']}. R = 0 is plain SparseGPT "
        "2:4 and R = 1 the dense model, both without FP8; all rows but these two carry FP8 weights "
        "and FP8 activations a token. "
        "± is the standard error over test windows; k_shards 1. Settings and every single idea's "
        "share: [docs/pruning.md](docs/pruning.md).",
    ]
    return "\n".join(lines)


def _mean(tests: list[dict], key: str) -> float:
    return sum(test[key] for test in tests) / len(tests)


def gemm_table(gemm: dict) -> str:
    """The GEMM's speed-ups on a GPU, and what they are measured against."""
    dense, two = tables.rival_words(gemm)
    return "\n\n".join(
        [
            tables.short_table(gemm),
            f"`hybrid_gemm` at 25 % dense against {dense}, "
            "a model's four layers back to back in one CUDA graph, random data, weights rotated "
            f"past the L2. {two}"
            f"{tables.source_line(gemm)} Every layer and rival: "
            "[docs/performance.md](docs/performance.md).",
        ]
    )


def counters_table(counted: dict) -> str:
    """The counters beside the sweep that stands in docs/performance.md."""
    return counter_table.table(counted, json.loads((RESULTS / "gemm_h100.json").read_text()))


def regret_table(configs: dict) -> str:
    """What today's choices lose, by forced runs that may be older than the cost model."""
    return regret.by_layer(regret.chosen_anew(configs))


def neighbours_table(neighbours: dict) -> str:
    """Times of the fused ops, and the share of a copy kernel's speed that they reach."""
    points = {(p["op"], p["k"], p["m"]): p for p in neighbours["points"]}
    tokens = sorted({m for _, _, m in points})
    lines = [
        "| op | K | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        "| --- | --- |" + " --- |" * len(tokens),
    ]
    for op, k in dict.fromkeys((op, k) for op, k, _ in points):
        found = (points[op, k, m] for m in tokens)
        cells = (
            f"{p['us']:.1f} us, {p['copy_us'] / p['us']:.0%}"
            + (f", L2 {warm:.1f} us" if (warm := p.get("from_l2_us")) else "")
            for p in found
        )
        lines.append(f"| {op} | {k} | {' | '.join(cells)} |")
    lines += ["", tables.run_line({"runs": [neighbours["run"]]}, {0})]
    return "\n".join(lines)


def quantize_table(quantize: dict) -> str:
    """What quantising x adds to a layer, by gather and in order, and the price of the gather."""
    rows = {(r["layer"], r["m"]): r for r in quantize["rows"]}
    tokens = sorted({m for _, m in rows})
    lines = ["| layer | K | " + " | ".join(f"M = {m}" for m in tokens) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(tokens)]
    for layer, k in dict.fromkeys((r["layer"], r["k"]) for r in quantize["rows"]):
        found = (rows[layer, m] for m in tokens)
        cells = []
        for r in found:
            ratio, added = f"({r['gather_ratio']:.2f})", (r["added_us"], r["added_in_order_us"])
            few = "{:.1f} us, in order {:.1f} ".format(*added) if r["m"] <= FEW_TOKENS else ""
            cells.append(few + ratio)
        lines.append(f"| {layer} | {k} | {' | '.join(cells)} |")
    lines += ["", tables.run_line({"runs": [quantize["run"]]}, {0})]
    return "\n".join(lines)


def generate_table(generate: dict) -> str:
    """Of transformers: time of a token, what of it the GPU needs, and the host in the model."""
    lines = [
        "| linear layers | ms a token | graph on the GPU, ms | host in the model, ms | tokens/s |"
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    for p in generate["points"]:
        kind = "dense FP8" if p["kind"] == "dense" else f"spense, {p['dense']:.0%} dense"
        if p["host"] != "plain":
            kind += f", {p['host']}"
        cells = (f"{p['ms']:.1f}", f"{p['gpu_ms']:.1f}", f"{p['call_host_ms']:.1f}")
        lines.append(f"| {kind} | {' | '.join(cells)} | {p['tokens_per_s']:.1f} |")
    lines += ["", tables.run_line({"runs": [generate["run"]]}, {0})]
    return "\n".join(lines)


def beside_h100(h200: dict) -> str:
    return tables.beside(json.loads((RESULTS / "gemm_h100.json").read_text()), h200)


# page -> marker -> (result file, what makes the table)
PAGES = {
    "README.md": {
        "demo": (RESULTS / "demo.json", demo_table),
        "cpu": (RESULTS / "cpu_linear.json", cpu_table),
        "quality": (RESULTS / "quality_targets.json", quality_table),
        "gemm": (RESULTS / "gemm_h100.json", gemm_table),
    },
    "docs/decoding.md": {"decode": (RESULTS / "decode.json", decode_table)},
    "docs/performance.md": {
        "h100": (RESULTS / "gemm_h100.json", tables.full_tables),
        "beside": (RESULTS / "gemm_h200.json", beside_h100),
        "unseen": (RESULTS / "configs_unseen_h100.json", regret_table),
        "smooth": (RESULTS / "configs_smooth_h100.json", regret_table),
    },
    "docs/performance-h200.md": {"h200": (RESULTS / "gemm_h200.json", tables.full_tables)},
    "docs/transformers.md": {
        "neighbours": (RESULTS / "neighbours_h100.json", neighbours_table),
        "quantize": (RESULTS / "quantize_h100.json", quantize_table),
        "generate": (RESULTS / "generate.json", generate_table),
    },
    "docs/sm90-misses.md": {"counters": (RESULTS / "counters_h100.json", counters_table)},
}


def render(page: str, text: str) -> str:
    """A page's text with every table between `<!-- NAME -->` and `<!-- /NAME -->` made anew.

    Where there is no result file yet, what stands there stays.
    """
    for name, (path, make) in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page}: no markers <!-- {name} --> ... <!-- /{name} -->")
        if path.is_file():
            table = make(json.loads(path.read_text(encoding="utf-8")))
            text = pattern.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def _plus_minus(value: float, error: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def main() -> int:
    late = 0
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = render(page, old)
        if old == new:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{page} is out of date: run python bench/readme.py", file=sys.stderr)
            late = 1
        else:
            path.write_text(new, encoding="utf-8")
    return late


if __name__ == "__main__":
    sys.exit(main())
