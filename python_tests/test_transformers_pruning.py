# SPDX-License-Identifier: Apache-2.0
"""from_pretrained that prunes a dense model, by magnitude and with calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spense_kernels
from spense_kernels import SpenseConfig, SpenseLinear, neighbours
from spense_kernels.checkpoint import verify_checkpoint
from spense_kernels.errors import CheckpointError, PruneError
from spense_kernels.fusion import FusedPart
from spense_kernels.hf import attach
from spense_kernels.prune import PruneConfig, prune_magnitude, prune_model
from spense_kernels.quant import quantize_weight
from spense_kernels.testing.models import tiny_model
from spense_kernels.testing.numeric import assert_bitwise

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 120


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("Qwen2ForCausalLM").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_pruning_by_magnitude_while_loading(fraction, dense, tmp_path):
    """Every matrix holds what a few plain lines say: the columns of largest norm over all
    projections of the input, and of every four others the two largest weights."""
    recipe = SpenseConfig(dense_fraction=fraction)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=recipe)
    before = dict(AutoModelForCausalLM.from_pretrained(dense).named_modules())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SpenseLinear)}
    assert len(layers) == 14
    alike = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{n}" for group in alike if leaf in group for n in group]
        norms = sum(before[n].weight.float().square().sum(dim=0) for n in names)
        split = layer.split
        order = split.columns()[0]
        sparse, kept = order[: split.k - split.widths[0]], order[split.k - split.widths[0] :]
        assert split.widths[0] == round(fraction * split.k / 16) * 16
        if 0 < len(kept) < split.k:
            assert norms[kept].min() >= norms[sparse].max()
        weight = before[name].weight.float()
        mask = torch.ones_like(weight, dtype=torch.bool)
        if len(sparse):
            groups = weight[:, sparse].abs().unflatten(1, (-1, 4))
            # Two others at most beat a kept weight: larger ones, or as large and before it.
            pairs = groups[..., None, :] > groups[..., :, None]
            ties = (groups[..., None, :] == groups[..., :, None]).tril(diagonal=-1)
            mask[:, sparse] = ((pairs | ties).sum(dim=-1) < 2).flatten(1)
        codes, scale = quantize_weight(weight * mask)
        assert_bitwise(layer.w_scale, scale)
        assert torch.equal(
            layer.hybrid_weight().to_dense().view(torch.float8_e4m3fn).float(),
            codes.view(torch.float8_e4m3fn).float(),
        )
        if layer.has_bias:
            assert_bitwise(layer.bias, before[name].bias.float())
    model.save_pretrained(tmp_path / "m")
    assert verify_checkpoint(tmp_path / "m").ok
    assert_bitwise(logits(spense_kernels.load(tmp_path / "m")), logits(model))
    assert recipe.stored is None  # and can be used again


def test_pruning_with_calibration_while_loading(dense, tmp_path):
    calibration = torch.arange(64).reshape(4, 16) * 7 % 120
    settings = PruneConfig(dense_fraction=0.5, method="wanda", skip=("down_proj",))
    recipe = SpenseConfig(calibration=calibration, prune=settings, fuse=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=recipe)
    assert isinstance(model.model.layers[0].mlp.up_proj, FusedPart)
    same = AutoModelForCausalLM.from_pretrained(dense)
    prune_model(same, calibration, settings)
    assert_bitwise(logits(model), logits(neighbours.fuse(same)))
    model.save_pretrained(tmp_path / "m")
    said = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert said["provenance"]["settings"]["method"] == "wanda"
    assert said["provenance"]["calibration"]["tokens"] == 64
    assert "model.layers.0.mlp.down_proj" in said["modules_to_not_convert"]
    assert_bitwise(logits(spense_kernels.load(tmp_path / "m", fuse=True)), logits(model))


def test_recipes_as_dicts_and_their_limits(dense):
    recipe = {"quant_method": "spense", "dense_fraction": 0.5, "k_shards": 2}
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=recipe)
    splits = {n: m.split for n, m in model.named_modules() if isinstance(m, SpenseLinear)}
    assert {s.k_shards for n, s in splits.items() if "o_proj" in n or "down_proj" in n} == {2}
    assert {s.k_shards for n, s in splits.items() if "q_proj" in n or "up_proj" in n} == {1}
    for wrong in (
        {"dense_fraction": 2},
        {"prune": PruneConfig()},
        {"calibration": TOKENS, "prune": PruneConfig(fp8=False)},
    ):
        with pytest.raises(PruneError):
            SpenseConfig(**wrong)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(PruneError, match=r"model\.layers\.1\.mlp\.up_proj: .* row 3"):
        prune_magnitude(model)


def test_models_pruned_in_place_can_be_attached(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    prune_magnitude(model)
    attach(model, {"seed": 5}).save_pretrained(tmp_path / "m")
    assert_bitwise(logits(spense_kernels.load(tmp_path / "m")), logits(model))
    with pytest.raises(CheckpointError, match="found none"):
        attach(tiny_model("LlamaForCausalLM"))
