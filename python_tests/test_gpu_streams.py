# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm on a GPU beside other work: streams, CUDA graphs, several devices, determinism."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from devices import GPU_CONFIGS, NO_GPU, Problem, check_bits, same_bits
from torch import Tensor

from spense_kernels import ops
from spense_kernels.testing.generators import (
    exact_activations,
    exact_weight,
    random_activations,
    random_split,
    random_weight,
)

pytestmark = pytest.mark.gpu

FLOAT32 = torch.float32
REPLAYS = 1000
configs = pytest.mark.parametrize("config", GPU_CONFIGS)
two_devices = pytest.mark.skipif(
    bool(NO_GPU) or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


@lru_cache(maxsize=16)
def exact_problem(n: int = 520, k: int = 4112, device: str = "cuda") -> Problem:
    return Problem(exact_weight(random_split(n, k, seed=n), seed=k, bias=True), device)


@lru_cache(maxsize=4)
def random_problem(n: int = 1300, k: int = 4096) -> Problem:
    return Problem(random_weight(random_split(n, k, seed=n), seed=k, bias=True), "cuda")


def exact_x(m: int, k: int, seed: int = 0, device: str = "cuda") -> tuple[Tensor, Tensor]:
    x, scale = exact_activations(m, k, seed=seed)
    return x.to(device), scale.to(device)


def random_x(m: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return ops.quantize_fp8(random_activations(m, k, seed=seed).cuda())


def busy(milliseconds: float = 3) -> None:
    """Keeps the current stream occupied, so that work on another one would come first."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@configs
@pytest.mark.parametrize("m", [4, 100])
def test_runs_on_the_current_stream(config, m):
    """x and its scale arrive late on the same stream: another stream would read zeros."""
    case = exact_problem()
    x, scale = exact_x(m, 4112)
    wanted = case.exact(x, scale, FLOAT32)
    late_x = torch.zeros(x.shape, dtype=torch.uint8, device="cuda").view(x.dtype)
    late_scale = torch.zeros_like(scale)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        late_x.view(torch.uint8).copy_(x.view(torch.uint8))
        late_scale.copy_(scale)
        out = case.run(late_x, late_scale, config, out_dtype=FLOAT32)
        copy = out.clone()
    stream.synchronize()
    check_bits(copy, wanted, f"{config} on a side stream")


def test_quantiser_and_product_follow_one_another():
    """The kernels launch as programmatic dependents: x from the one must have arrived in the
    other, over and over, with x changing each time."""
    case = random_problem()
    inputs = [random_activations(m, 4096, seed=m).cuda() for m in (1, 16, 64, 200)]
    alone = []
    for x in inputs:
        x8, scale = ops.quantize_fp8(x)
        torch.cuda.synchronize()
        alone.append(case.run(x8, scale))
        torch.cuda.synchronize()
    chained = [[case.run(*ops.quantize_fp8(x)) for x in inputs] for _ in range(50)]
    for outputs in chained:
        for out, wanted in zip(outputs, alone, strict=True):
            check_bits(out, wanted, "quantise and multiply")


@configs
def test_two_streams_at_once(config):
    """Launches of one shape on two streams share no partial sum and no counter."""
    case = random_problem()
    m = 40
    inputs = [random_x(m, 4096, seed) for seed in range(2)]
    wanted = [case.run(*x, config) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(case.run(*inputs[i], config))
    torch.cuda.synchronize()
    for got, expected in zip(outputs, wanted, strict=True):
        assert all(same_bits(out, expected) for out in got), config


def capture(calls: list) -> tuple[torch.cuda.CUDAGraph, list]:
    """Calls recorded into a graph after one warm-up, and their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    return graph, results


@configs
def test_replays_never_move_a_bit(config):
    """1000 replays between other kernels: products that evict the L2, fills, the op itself on
    other shapes and on another stream."""
    case, other = random_problem(), exact_problem()
    inputs = [random_x(m, 4096) for m in (1, 24, 130)]
    graph, outputs = capture([lambda x=x: case.run(*x, config) for x in inputs])
    graph.replay()
    torch.cuda.synchronize()
    wanted = [out.clone() for out in outputs]
    eager = [case.run(*x, config) for x in inputs]
    for out, expected in zip(eager, wanted, strict=True):
        check_bits(out, expected, f"{config}: eager against graph")

    wrong = torch.zeros(len(outputs), dtype=torch.int64, device="cuda")
    square = torch.randn(1024, 1024, device="cuda")
    wide = torch.empty(96 << 20, dtype=torch.uint8, device="cuda")
    small, scale = exact_x(5, 4112)
    side = torch.cuda.Stream()
    for i in range(REPLAYS):
        for out in outputs:
            out.view(torch.uint8).fill_(0xFF)
        match i % 5:
            case 0:
                square = (square @ square).clamp_(-1, 1)
            case 1:
                wide.fill_(i & 0xFF)
            case 2:
                other.run(small, scale, config)
            case 3:
                with torch.cuda.stream(side):
                    other.run(small, scale, config)
        graph.replay()
        for j, (out, expected) in enumerate(zip(outputs, wanted, strict=True)):
            wrong[j] += (out.view(torch.int16) != expected.view(torch.int16)).any()
    assert wrong.tolist() == [0] * len(outputs), config


@configs
def test_a_graph_reads_its_inputs_anew(config):
    case = exact_problem()
    x, scale = exact_x(17, 4112)
    graph, (out,) = capture([lambda: case.run(x, scale, config, out_dtype=FLOAT32)])
    for seed in range(5):
        fresh, fresh_scale = exact_x(17, 4112, seed=seed)
        x.view(torch.uint8).copy_(fresh.view(torch.uint8))
        scale.copy_(fresh_scale)
        graph.replay()
        check_bits(out, case.exact(fresh, fresh_scale, FLOAT32), f"{config}: replay {seed}")


@configs
def test_two_graphs_replayed_at_once(config):
    """Two graphs of the same shape on two streams, beside eager calls on a third."""
    case = random_problem()
    inputs = [random_x(33, 4096, seed) for seed in range(2)]
    wanted = [case.run(*x, config) for x in inputs]
    graphs = [capture([lambda x=x: case.run(*x, config)] * 8) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        assert same_bits(case.run(*inputs[0], config), wanted[0]), config
    torch.cuda.synchronize()
    for (_, outputs), expected in zip(graphs, wanted, strict=True):
        assert all(same_bits(out, expected) for out in outputs), config


def test_a_larger_problem_after_a_smaller_one():
    """Workspaces that grow: the first call of a stream is small, later ones need more."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for n, k, m in [(128, 256, 1), (520, 4112, 9), (17000, 256, 65), (128, 16384, 300)]:
            case = exact_problem(n, k)
            x, scale = exact_x(m, k)
            for _ in range(2):
                out = case.run(x, scale, out_dtype=FLOAT32)
                check_bits(out, case.exact(x, scale, FLOAT32), f"n = {n}, k = {k}, m = {m}")


def test_no_call_waits_for_the_device():
    """A call returns while the stream is still busy with what came before."""
    case = exact_problem()
    x = torch.ones(16, 4112, device="cuda")

    def calls() -> None:
        for _ in range(3):
            case.run(*ops.quantize_fp8(x))

    calls()
    torch.cuda.synchronize()
    busy(200)
    calls()
    dry = torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert not dry, "the stream was empty when the calls returned"


def test_memory_does_not_grow():
    case = exact_problem()
    x, scale = exact_x(64, 4112)
    for _ in range(3):
        case.run(x, scale)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        case.run(x, scale)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@two_devices
@configs
def test_a_device_that_is_not_the_current_one(config):
    case = exact_problem(device="cuda:1")
    x, scale = exact_x(33, 4112, device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = case.run(x, scale, config, out_dtype=FLOAT32)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    check_bits(out, case.exact(x, scale, FLOAT32), f"{config} on cuda:1")
    x8, _ = ops.quantize_fp8(torch.ones(3, 256, device="cuda:1"))
    assert x8.device == torch.device("cuda:1")


@two_devices
def test_devices_do_not_mix():
    case = exact_problem(device="cuda:1")
    x, scale = exact_x(3, 4112)
    with pytest.raises(RuntimeError, match=r"w_packed: expected device cuda:0 .*got cuda:1"):
        case.run(x, scale)
