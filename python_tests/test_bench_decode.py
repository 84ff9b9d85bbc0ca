# SPDX-License-Identifier: Apache-2.0
"""bench/decode.py on the CPU with a tiny model: the step is a decoder's, the results merge."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from weakref import ref

import decode
import neighbours
import pytest
import torch
import torch.nn.functional as F
from decoding import attention, inputs, results, tables, timeline
from decoding.linears import Dense, Spense, factory
from decoding.models import MODELS, QWEN3_32B, SEED_OSS_36B, TINY
from decoding.step import IN_A_LAYER, PARTS, Cache, Step, Weights
from gemm import shapes
from gemm.timing import Recorder
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class OpCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        return op(*args, **(kwargs or {}))


def make(kind: str, d: float | None = None):
    return factory(kind, d, CPU, [1], Recorder(CPU))


def step_of(batch: int, context: int, tokens: int = 1, dtype=torch.bfloat16) -> Step:
    torch.manual_seed(0)
    weights = Weights(TINY, make("dense"), CPU)
    memory = Cache(TINY, batch, context, dtype, CPU)
    name = "math" if tokens > 1 else "widened"
    run = attention.candidates(CPU, dtype != torch.bfloat16, tokens > 1)[name]
    return Step(weights, memory, torch.arange(context - tokens, context), run, fused=False)


def plainly(step: Step, caches, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one token a sequence in float32, written as models write it."""
    shape, weights = TINY, step.weights

    def rms(x, w):
        return F.rms_norm(x, w.shape, w.float(), shape.eps)

    def linear(f, x):
        return x @ f.weight.float().t() * f.scale + (0 if f.bias is None else f.bias)

    def turn(t):
        half = shape.head_dim // 2
        return t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin

    x = weights.table[tokens].float()
    angle = (step.cache.context - 1) * shape.rope_theta ** (
        -torch.arange(0, shape.head_dim, 2) / shape.head_dim
    )
    cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
    for layer, (keys, values) in zip(weights.layers, caches, strict=True):
        y = linear(layer.linears["qkv"], rms(x, layer.norms[0]))
        y = y.view(len(tokens), -1, shape.head_dim)
        q, k, v = y.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        q, k = (turn(rms(t, w)) for t, w in zip((q, k), layer.qk_norms, strict=True))
        keys = torch.cat((keys[:, :, :-1].float(), k[:, :, None]), dim=2)
        values = torch.cat((values[:, :, :-1].float(), v[:, :, None]), dim=2)
        keys, values = (t.repeat_interleave(2, dim=1) for t in (keys, values))
        weight = (q[:, :, None] @ keys.transpose(2, 3) / shape.head_dim**0.5).softmax(dim=-1)
        x = x + linear(layer.linears["o"], (weight @ values).flatten(1))
        y = linear(layer.linears["gate_up"], rms(x, layer.norms[1]))
        gate, up = y.chunk(2, dim=1)
        x = x + linear(layer.linears["down"], F.silu(gate) * up)
    return rms(x, weights.final_norm) @ weights.head.float().t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_step_is_that_of_a_decoder(dtype):
    """Up to the noise of FP8 activations (about 2^-5 a value, four times a layer, two layers)."""
    step = step_of(batch=3, context=20, dtype=dtype)
    before = [(k.clone(), v.clone()) for k, v in step.cache.layers]
    step.tokens.copy_(torch.tensor([5, 77, 200]))
    tokens = step.tokens.clone()
    step.run()
    logits = step.left["logits"].float()
    wanted = plainly(step, before, tokens)
    assert F.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0) > 0.98
    other = plainly(step, [(k.roll(1, 0), v.roll(1, 0)) for k, v in before], tokens.roll(1))
    assert F.cosine_similarity(logits.flatten(), other.flatten(), dim=0) < 0.9
    assert torch.equal(step.chosen, logits.argmax(dim=-1))
    assert torch.equal(step.tokens, tokens), "the next step is like this one"
    for (k, v), (old_k, old_v) in zip(step.cache.layers, before, strict=True):
        for new, old in ((k, old_k), (v, old_v)):
            bits = [t.contiguous().view(torch.uint8) for t in (new[:, :, :-1], old[:, :, :-1])]
            assert torch.equal(*bits), "only the last place is written"


def test_a_prompt_ends_like_a_step():
    """The last token of a prompt sees what a step sees whose cache the prompt has filled."""
    prompt = step_of(batch=1, context=12, tokens=12)
    prompt.tokens.copy_(torch.arange(12) * 7)
    prompt.run()
    memory = prompt.cache
    run = attention.candidates(CPU, False, False)["widened"]
    step = Step(prompt.weights, memory, torch.tensor([11]), run, fused=False)
    step.tokens.copy_(torch.tensor([11 * 7]))
    step.run()
    logits, wanted = step.left["logits"].float(), prompt.left["logits"].float()
    assert F.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0) > 0.99


def test_parts_together_are_the_step():
    step = step_of(batch=2, context=8)
    step.run()
    kept = {key: value for key, value in step.left.items() if isinstance(value, torch.Tensor)}
    for part in PARTS:
        step.run((part,))
    assert all(step.left[key] is value for key, value in kept.items()), "parts leave no trace"


def test_shapes_are_those_of_the_sweep():
    for model in (QWEN3_32B, SEED_OSS_36B):
        assert model.linears == {x.name: (x.n, x.k) for x in shapes.MODELS[model.name]}
    assert QWEN3_32B.cache_bytes(1, 1, 2) == 262144


def test_ours_and_dense_are_called_alike():
    x8, scale = torch.ops.spense.quantize_fp8(torch.randn(3, 256, dtype=torch.bfloat16))
    for linear in (make("dense")("o", 320, 256, True), make("spense", 0.25)("o", 320, 256, True)):
        assert linear(x8, scale).shape == (3, 320)
    assert isinstance(make("dense")("o", 16, 32, False), Dense)
    assert make("spense", 0.25)("down", 320, 256, False).gather is None
    ours = make("spense", 0.5)("o", 320, 256, False)
    assert isinstance(ours, Spense)
    assert sorted(ours.gather.tolist()) == list(range(256))
    assert ours.weight_bytes == ours.split.packed_bytes


@pytest.mark.parametrize("kind", ["dense", "spense"])
@pytest.mark.parametrize("tokens", [1, 256])
def test_activations_stay_diverse(kind, tokens):
    """Through as many layers as the models have: finite, over the range of FP8, rows apart."""
    torch.manual_seed(0)
    shape = replace(TINY, layers=64, vocabulary=512)
    weights = Weights(shape, make(kind, 0.25), CPU)
    run = attention.candidates(CPU, False, tokens > 1)["math" if tokens > 1 else "widened"]
    batch, context = (8, 256) if tokens == 1 else (1, tokens)
    memory = Cache(shape, batch, context, torch.bfloat16, CPU)
    step = Step(weights, memory, torch.arange(context - tokens, context), run, fused=False)
    assert len(set(step.tokens.tolist())) == batch * tokens
    with torch.inference_mode():
        found = inputs.inputs_of(step, range(shape.layers))
    assert len(found) == 4 * shape.layers
    for x in found:
        assert max(x.zero, x.largest) < 0.02, x
        assert x.size > 0.05, x
        assert abs(x.cosine) < 0.5, x
    last = step.left["last"].float()
    assert 0.3 < last.square().mean().sqrt() < 3


@pytest.fixture
def report(tmp_path) -> Path:
    decode.main(
        "--models tiny --device cpu --kinds dense spense --dense 0.25 --batch 1 2 --context 16 "
        f"--cache bf16 fp8 --prefill 8 --layers 1 --out {tmp_path / 'a.json'}".split()
    )
    return tmp_path / "a.json"


def test_the_result_file(report):
    data = json.loads(report.read_text())
    points = data["points"]
    assert len(points) == 2 * (1 + 4)
    for point in points:
        assert set(point["parts_ms"]) == set(PARTS)
        assert point["ms"] > 0
        assert point["layers"] == 1
        assert point["tokens_per_s"] == pytest.approx(
            point["batch"] * (8 if point["what"] == "prefill" else 1) / point["ms"] * 1e3, rel=0.01
        )
        rival = results.rival_of(point, points)
        assert rival["kind"] == "dense"
        assert results.speed_up(point, points) == pytest.approx(rival["ms"] / point["ms"])
    ours = next(p for p in points if p["kind"] == "spense")
    assert ours["dense"] == 0.25
    assert "spense" in results.line(ours, points)


def test_the_table_and_the_picture(report):
    data = json.loads(report.read_text())
    table = tables.decode_table(data)
    assert table.count("\n| tiny |") == len(data["points"])
    assert "ours, 25% dense" in table
    figure = tables.decode_figure(data)
    assert [axis.get_title() for axis in figure.axes] == [
        "tiny, KV cache in bf16",
        "tiny, KV cache in fp8",
    ]
    assert all(len(axis.lines) == 2 for axis in figure.axes)  # ours, and the line at 1


def test_runs_merge_and_ratios_stay_inside_a_run(report, tmp_path):
    decode.main(
        "--models tiny --device cpu --kinds spense --dense 0.25 --batch 1 --context 16 "
        f"--cache bf16 --prefill --no-parts --out {tmp_path / 'b.json'} --merge {report}".split()
    )
    data = json.loads((tmp_path / "b.json").read_text())
    assert len(data["runs"]) == 2
    assert len(data["points"]) == 10, "the same point is replaced"
    dense = [p for p in data["points"] if p["kind"] == "dense" and p["run"] == 0]
    assert len(dense) == 5
    (new,) = [p for p in data["points"] if p["run"] == 1]
    assert results.speed_up(new, data["points"]) is None, "no dense time in that run"
    both = tmp_path / "c.json"
    words = f"--merge-only --out {both} --merge {report} {tmp_path / 'b.json'}"
    assert decode.main(words.split()) == 0
    data = json.loads(both.read_text())
    assert (len(data["runs"]), len(data["points"])) == (2, 10)


def test_the_newest_points_stay(tmp_path):
    """In whichever order files are merged; with the dense points that those left compare with."""

    def file(name: str, created: str, *points: tuple[str, int, float]) -> Path:
        same = {"model": "m", "what": "decode", "context": 8, "cache": "bf16", "run": 0}
        rows = [
            same | {"kind": kind, "dense": None, "batch": batch, "ms": ms}
            for kind, batch, ms in points
        ]
        path = tmp_path / name
        path.write_text(json.dumps({"runs": [{"created": created}], "points": rows}))
        return path

    files = [
        file("1", "2026-01-01", ("dense", 1, 10.0), ("spense", 1, 9.0), ("dense", 4, 11.0)),
        file("2", "2026-01-02", ("dense", 1, 10.5), ("two_library", 1, 9.5), ("dense", 4, 11.5)),
        file("3", "2026-01-03", ("dense", 1, 10.7), ("spense", 1, 8.5)),
    ]
    wanted = [("dense", 1, 10.5), ("dense", 1, 10.7), ("dense", 4, 11.5)]
    wanted += [("spense", 1, 8.5), ("two_library", 1, 9.5)]
    for order in permutations(files):
        out = tmp_path / "out.json"
        assert decode.main(["--merge-only", "--out", str(out), "--merge", *map(str, order)]) == 0
        data = json.loads(out.read_text())
        assert sorted((p["kind"], p["batch"], p["ms"]) for p in data["points"]) == wanted
        (ours,) = (p for p in data["points"] if p["kind"] == "spense")
        assert results.speed_up(ours, data["points"]) == pytest.approx(10.7 / 8.5)
        assert {run["created"] for run in data["runs"]} == {"2026-01-02", "2026-01-03"}


def test_splits_fill_the_gpu_and_no_more():
    """64 pairs cut in four are two programs a multiprocessor; chunks are equal and long enough."""
    assert attention.worthwhile_splits(1024, 64) == [2, 4]
    assert attention.worthwhile_splits(1024, 128) == [1, 2]
    assert attention.worthwhile_splits(1024, 512) == [1]
    assert attention.worthwhile_splits(1024, 8) == [4, 8]
    assert attention.worthwhile_splits(8192, 8) == [16, 32]
    assert attention.worthwhile_splits(1023, 8) == [1]
    assert attention.worthwhile_splits(8, 1) == [1]


def test_the_attention_of_the_fastest_step_is_taken(monkeypatch):
    """Not the fastest alone; one that is far slower alone is not tried."""
    ran = []

    def option(name: str):
        return lambda q, k, v: ran.append(name) or q

    times = {"a": (10.0, 30.0), "b": (12.0, 28.0), "slow": (20.0, 1.0)}
    monkeypatch.setattr(attention, "candidates", lambda *_: {n: option(n) for n in times})

    class Told(Recorder):
        asked = 0

        def record(self, calls, passes):
            return replace(super().record(calls, passes), replay=None)  # as a graph: holds no call

        def measure(self, recordings, seconds):
            self.asked += 1
            assert all(step() is not None for step in stepped), "a step is gone, its graph is not"
            return {name: {"us": times[name][self.asked - 1]} for name in recordings}

    q = torch.zeros(1, 2, 1, 8)
    memory = [(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))]
    recorder = Told(CPU)
    stepped = []

    def step_with(function):
        def step():
            return function(q, *memory[0])

        stepped.append(ref(step))
        return step

    name, function = attention.fastest(recorder, q, memory, False, step_with)
    assert name == "b"
    function(q, *memory[0])
    assert ran[-1] == "b"
    assert recorder.asked == 2
    assert len(stepped) == 2
    assert ran.count("slow") == 2, "to see that it runs, and for its recording"


def test_what_fails_is_told_and_the_rest_is_timed(tmp_path, capsys, monkeypatch):
    """cuSPARSELt is not here; a shape whose attention fails does not stop the others either."""
    words = "--models tiny --device cpu --kinds dense two_library --batch 1 3 --context 8 "
    words += f"--cache bf16 --prefill --layers 1 --no-parts --out {tmp_path / 'f.json'}"
    choose = decode.fastest

    def fails_for_three(recorder, q, *others):
        if q.shape[0] == 3:
            raise RuntimeError("no attention runs here: none")
        return choose(recorder, q, *others)

    monkeypatch.setattr(decode, "fastest", fails_for_three)
    assert decode.main(words.split()) == 1
    told = capsys.readouterr().out
    assert "tiny two_library: FAILED:" in told
    assert "tiny dense decode batch 3, context 8, bf16 cache: FAILED: no attention" in told
    points = json.loads((tmp_path / "f.json").read_text())["points"]
    assert [(p["kind"], p["batch"]) for p in points] == [("dense", 1)]


def test_every_model_has_a_name():
    assert set(MODELS) == {"qwen3-32b", "seed-oss-36b", "tiny"}


def test_the_neighbours_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "OPS", [replace(op, k=op.k // 40) for op in neighbours.OPS])
    neighbours.main(f"--device cpu --tokens 1 5 --out {tmp_path / 'n.json'}".split())
    points = json.loads((tmp_path / "n.json").read_text())["points"]
    assert len(points) == 2 * len(neighbours.OPS)
    for point in points:
        (op,) = [o for o in neighbours.OPS if (o.name, o.k) == (point["op"], point["k"])]
        moved = point["m"] * op.k * (op.reads + op.writes)
        assert point["gb_per_s"] == pytest.approx(moved / point["us"] / 1e3, abs=0.1)


def test_a_layer_of_a_trace():
    """Kernels that overlap count from the end of all before them; other layers do not count."""
    spans, now = [], 0.0
    for replay in range(3):
        spans.append(timeline.Span("embedding", now, now + 1))
        now += 2
        for _ in range(5):
            for name, us, gap in (("_heads_kernel", 3, 1), ("attention", 10, -1), ("gemm", 5, 2)):
                spans.append(timeline.Span(name, now + gap, now + gap + us))
                now += gap + us
        spans.append(timeline.Span("head", now, now + 7 + replay))
        now += 20
    found = timeline.places(spans)
    assert [place.name for place in found] == ["_heads_kernel", "attention", "gemm"]
    assert [(p.us, p.gap, p.advance) for p in found] == [(3, 1, 4), (10, -1, 9), (5, 2, 7)]
    assert timeline.table(found)[-1].split()[0] == "20.00"
    with pytest.raises(ValueError, match="no two kernels"):
        timeline.places(spans[:3])


def test_kernels_can_be_left_out_one_by_one():
    """Every kernel of a layer has a name, and a step without it is a step without its op."""
    step = step_of(2, 16)
    step.run()
    counts = {}
    for name in (None, *IN_A_LAYER):
        with OpCalls() as calls:
            step.run(without=(name,))
        counts[name] = calls.count
    assert all(counts[name] < counts[None] for name in IN_A_LAYER), counts
    added = timeline.marginal(Recorder(CPU), step, 0.0)
    assert list(added) == list(IN_A_LAYER)
