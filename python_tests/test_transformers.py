# SPDX-License-Identifier: Apache-2.0
"""transformers loads, runs, saves and makes spense checkpoints, and refuses damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import spense_kernels
from spense_kernels import SpenseConfig, SpenseLinear, fuse_projections
from spense_kernels.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from spense_kernels.errors import CheckpointError, SpenseError
from spense_kernels.fusion import FusedPart
from spense_kernels.hf import SpenseQuantizer
from spense_kernels.prune import prune_magnitude
from spense_kernels.testing.models import TINY, tiny_model
from spense_kernels.testing.numeric import assert_bitwise

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 120
QUERY, NORM = "model.layers.1.self_attn.q_proj", "model.layers.0.input_layernorm.weight"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert_bitwise(b[name], tensor)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each tiny model, made by our own writer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for architecture in TINY:
        model = tiny_model(architecture)
        prune_magnitude(model)
        made[architecture] = save_checkpoint(model, folder / architecture, provenance={"seed": 7})
    return made


@pytest.fixture(scope="module")
def llama(checkpoints) -> Path:
    return checkpoints["LlamaForCausalLM"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("Qwen2ForCausalLM").save_pretrained(folder)
    return folder


def test_importing_us_registers_without_importing_transformers():
    code = """
import sys, importlib
import spense_kernels
assert "transformers" not in sys.modules
importlib.reload(spense_kernels)
waiting = [f for f in sys.meta_path if type(f).__name__ == "_Waiting"]
assert len(waiting) == 1
from transformers.quantizers import auto
assert "spense" in auto.AUTO_QUANTIZER_MAPPING and "spense" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any(type(f).__name__ == "_Waiting" for f in sys.meta_path)
importlib.reload(spense_kernels)
importlib.reload(sys.modules["spense_kernels.hf"])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("architecture", TINY)
def test_round_trip(architecture, checkpoints, tmp_path):
    """Loaded as our own loader does; written back, in many files, with the same bytes."""
    folder = checkpoints[architecture]
    ours = load_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(ours)
    assert_same_tensors(ours.state_dict(), model.state_dict())
    assert_bitwise(logits(model), logits(ours))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    model.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert_same_tensors(stored(folder), stored(tmp_path / "a"))
    report = verify_checkpoint(tmp_path / "a")
    assert report.ok
    assert "some tensors have no checksum" not in report.notes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config.quantization_config.stored.provenance["seed"] == 7
    fuse_projections(again)
    again.save_pretrained(tmp_path / "b")
    assert_same_tensors(stored(folder), stored(tmp_path / "b"))
    said = [json.loads((tmp_path / f / "config.json").read_text()) for f in "ab"]
    assert said[0] == said[1]
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(TOKENS, **greedy), ours.generate(TOKENS, **greedy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtype_casts_only_what_is_not_converted(dtype, llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_bitwise(logits(model), logits(load_checkpoint(llama, dtype=dtype)))


def test_other_dtypes_are_refused(llama):
    with pytest.raises(SpenseError, match=r"dtype: expected one of .* got torch\.float64"):
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)


PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")


ON_DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize(
    ("device_map", "offload_buffers"),
    [("cpu", False), ("auto", False), ({"": "cpu"}, False), (ON_DISK, False), (ON_DISK, True)],
    ids=["cpu", "auto", "dict", "disk", "disk with buffers"],
)
def test_device_maps(device_map, offload_buffers, checkpoints, tmp_path):
    """On disk go the parameters of that layer; its spense layers have none and stay."""
    folder = checkpoints["Qwen2ForCausalLM"]
    model = spense_kernels.load(
        folder, device_map=device_map, offload_folder=tmp_path, offload_buffers=offload_buffers
    )
    assert_bitwise(logits(model), logits(load_checkpoint(folder)))
    layer = model.model.layers[1]
    assert layer.input_layernorm.weight.is_meta == (device_map is ON_DISK)
    assert not any(b.is_meta for b in layer.buffers())


def test_the_meta_device_is_refused(llama):
    with pytest.raises(CheckpointError, match=r"a device for model\.layers\.0\..*, got meta"):
        spense_kernels.load(llama, device_map="meta")


def test_tensor_parallelism_inside_transformers_is_refused():
    model = tiny_model("LlamaForCausalLM")
    model.config.distributed_config = object()
    quantizer = SpenseQuantizer(SpenseConfig(), pre_quantized=False)
    with pytest.raises(SpenseError, match="tensor parallelism inside transformers"):
        quantizer.preprocess_model(model)


def test_placeholders_have_the_final_sizes(llama, monkeypatch):
    """What transformers spreads over devices is what will be there."""
    from spense_kernels.hf.layers import LayerLoader

    seen = {}
    prepare = LayerLoader.prepare

    def watch(self, model):
        prepare(self, model)
        seen.update({name: (b.shape, b.dtype) for name, b in model.named_buffers()})

    monkeypatch.setattr(LayerLoader, "prepare", watch)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert seen == {name: (b.shape, b.dtype) for name, b in model.named_buffers()}


def test_a_base_model_loads_without_its_head(llama, tmp_path):
    base = AutoModel.from_pretrained(llama)
    ours = load_checkpoint(llama)
    with torch.no_grad():
        expected = ours.model(TOKENS).last_hidden_state
        assert_bitwise(base(TOKENS).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert_bitwise(whole.model(TOKENS).last_hidden_state, expected)


def change(tensors: dict, name: str, how) -> None:
    tensors[name] = how(tensors[name])


def first_byte(value: int):
    def write(tensor):
        tensor = tensor.clone()
        tensor.view(torch.uint8)[0] = value
        return tensor

    return write


DAMAGES = {
    "missing layer tensor": (lambda t: t.pop(f"{QUERY}.indices"), f"{QUERY}.indices: missing"),
    "missing scale": (lambda t: t.pop(f"{QUERY}.w_scale"), f"{QUERY}.w_scale: missing"),
    "missing norm": (lambda t: t.pop(NORM), f"{NORM}: missing tensor"),
    "illegal nibble": (
        lambda t: change(t, f"{QUERY}.indices", first_byte(0x00)),
        f"{QUERY}.indices: a nibble whose places are not ascending",
    ),
    "NaN": (lambda t: change(t, f"{QUERY}.values", first_byte(0x7F)), f"{QUERY}.values: NaN"),
    "bytes for FP8": (
        lambda t: change(t, f"{QUERY}.values", lambda x: x.view(torch.uint8)),
        f"{QUERY}.values: expected dtype F8_E4M3, got U8",
    ),
    "wide integers": (
        lambda t: change(t, f"{QUERY}.indices", lambda x: x.long()),
        f"{QUERY}.indices: expected dtype U8, got I64",
    ),
    "bf16 scales": (
        lambda t: change(t, f"{QUERY}.w_scale", lambda x: x.bfloat16()),
        f"{QUERY}.w_scale: expected dtype F32, got BF16",
    ),
    "short payload": (
        lambda t: change(t, f"{QUERY}.values", lambda x: x[:-1].clone()),
        f"{QUERY}.values: must have shape",
    ),
    "no permutation": (
        lambda t: change(t, f"{QUERY}.k_perm", lambda x: torch.zeros_like(x)),
        "k_perm must be a permutation",
    ),
    "wide norm": (
        lambda t: change(t, NORM, lambda x: torch.cat((x, x))),
        f"{NORM}: expected shape [64], got [128]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_transformers_does_not_check_is_refused(damage, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    spoil, message = DAMAGES[damage]
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as fault:
        AutoModelForCausalLM.from_pretrained(folder)
    assert message in str(fault.value)


@pytest.mark.parametrize("name", [f"{QUERY}.dense", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_refused(name, llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + begin] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: its checksum differs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_configs_that_do_not_fit_are_refused(llama, dense, tmp_path):
    def refused(edit, message):
        folder = shutil.copytree(llama, tmp_path / "m", dirs_exist_ok=True)
        config = json.loads((llama / "config.json").read_text())
        edit(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)

    refused(lambda q: q.update(version=2), "the checkpoint has version 2")
    refused(lambda q: q.pop("modules"), "quantization_config.modules: expected dict")
    refused(lambda q: q["modules"][QUERY].update(n=63), r"the model expects \(n, k, bias\)")
    refused(lambda q: q["modules"].update({"x.y": q["modules"][QUERY]}), "the model has no 'x.y'")
    refused(
        lambda q: (q.clear(), q.update(quant_method="spense", dense_fraction=0.5)),
        "expected that of a spense checkpoint",
    )
    with pytest.raises(CheckpointError, match="not a spense checkpoint"):
        spense_kernels.load(dense)
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(CheckpointError, match="from its files, not from state_dict"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_dequantize(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = model.get_submodule(QUERY).dequantize(torch.bfloat16).weight
    fuse_projections(model)
    plain = model.dequantize()
    assert not any(isinstance(m, SpenseLinear) for m in plain.modules())
    assert_bitwise(plain.get_submodule(QUERY).weight, expected)
    assert not hasattr(plain.config, "quantization_config")


def test_our_own_writer_takes_models_that_transformers_loaded(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    save_checkpoint(model, tmp_path / "m")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (llama / name).read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", TINY)
def test_on_a_gpu(architecture, checkpoints, tmp_path):
    """Placed, fused and saved on a GPU; the logits are near those of the CPU. The bound is loose:
    it catches wrong weights (random ones differ by the size of the logits), not rounding."""
    folder = checkpoints[architecture]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    assert {b.device.type for b in model.buffers()} == {"cuda"}
    assert isinstance(model.model.layers[0].mlp.up_proj, FusedPart)
    expected = logits(load_checkpoint(folder)).float()
    assert (logits(model).cpu().float() - expected).norm() < 0.1 * expected.norm()
    model.save_pretrained(tmp_path / "m")
    assert_same_tensors(stored(folder), stored(tmp_path / "m"))
    assert model.generate(TOKENS.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 13)
