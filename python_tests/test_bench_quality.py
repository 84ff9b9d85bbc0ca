# SPDX-License-Identifier: Apache-2.0
"""Scripts of bench/quality: the relaxed pattern, and the second family in its tiny form."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from prune_models import make, quick, tokens_for_calibration

from spense_kernels.prune import collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.hessian import damped_factor
from spense_kernels.prune.obs import sweep

QUALITY = Path(__file__).parents[1] / "bench" / "quality"


@pytest.fixture(autouse=True)
def _quality_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))


@pytest.fixture
def relaxed():
    return importlib.import_module("relaxed")


def layer(n=24, k=64, tokens=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return torch.randn(n, k, generator=generator), x.T @ x / tokens


def loss(weight, target, hessian):
    error = weight - target
    return float(((error @ hessian) * error).sum())


def test_six_of_eight_stay_and_the_others_make_up_for_them(relaxed):
    target, hessian = layer()
    factor = damped_factor(hessian, 0.01)[1]
    weight, mask = relaxed.relaxed_sweep(target, factor)
    assert (mask.unflatten(1, (-1, 8)).sum(dim=-1) == 6).all()
    assert torch.equal(weight != 0, mask)
    # The pruner's sweep compensates the same for this mask, and the mask alone loses far more.
    swept = sweep(target[None], factor[None], 64, mask=mask[None]).weight[0]
    torch.testing.assert_close(weight, swept, atol=1e-4, rtol=1e-4)
    assert loss(weight, target, hessian) < 0.6 * loss(target * mask, target, hessian)


def test_the_sweeps_mask_is_that_of_the_cheapest_weights_when_nothing_couples(relaxed):
    """A diagonal H: nothing is compensated, and a weight costs w^2 H_jj."""
    target, _ = layer()
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    factor = torch.diag(diagonal.rsqrt())
    weight, mask = relaxed.relaxed_sweep(target, factor)
    cost = (target.square() * diagonal).unflatten(1, (-1, 8))
    kept = torch.zeros_like(cost).scatter(-1, cost.topk(6, dim=-1).indices, 1.0)
    assert torch.equal(mask, kept.flatten(1).bool())
    assert torch.equal(weight, target * mask)


def test_a_k_that_is_no_multiple_of_eight_is_refused(relaxed):
    with pytest.raises(ValueError, match="expected a multiple of 8, got 12"):
        relaxed.relaxed_sweep(torch.ones(2, 12), torch.eye(12))


def test_equal_bytes(relaxed):
    """At the fraction, a hybrid weight takes as many bytes as the pattern."""
    for size in (relaxed.TIGHT_BYTES, relaxed.STRETCHED_BYTES):
        d = relaxed.equal_fraction(size)
        assert d + 0.625 * (1 - d) == pytest.approx(size)
    assert math.comb(8, 2) <= 2**5  # five bits name a group's pattern
    assert pytest.approx(0.828125) == relaxed.TIGHT_BYTES


@pytest.mark.parametrize("refit_steps", [0, 6])
def test_a_relaxed_model_has_the_pattern_and_less_error_than_2to4(relaxed, refit_steps):
    model, tokens = make("llama"), tokens_for_calibration()
    config = quick(dense_fraction=0.0, fp8=False, refit_steps=refit_steps, sinks=refit_steps > 0)
    statistics = collect_statistics(model, tokens, config)
    target, sparse = shallow_clone(model), shallow_clone(model)
    relaxed.prune_relaxed(target, statistics, tokens.numel(), config, "cpu")
    prune_model(sparse, tokens, config, statistics=statistics)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    assert len(names) == 14
    for name in names:
        weight = target.get_submodule(name).weight
        groups = (weight != 0).unflatten(1, (-1, 8)).sum(dim=-1)
        assert groups.max() <= 6
        assert groups.float().mean() > 5.9
    logits = [m(tokens).logits for m in (model, target, sparse)]
    wrong = [float((other - logits[0]).square().mean()) for other in logits[1:]]
    assert wrong[0] < wrong[1]


def test_rows_of_the_baselines_cover_what_they_compare():
    baselines = importlib.import_module("baselines")
    relaxed = importlib.import_module("relaxed")
    for rows in (baselines.ROWS, baselines.RELAXED):
        for name, config in rows.items():
            assert config.fp8 is (name.startswith("ours") and "no fp8" not in name), name
    fractions = {config.dense_fraction for config in baselines.ROWS.values()}
    assert relaxed.equal_fraction(relaxed.TIGHT_BYTES) in fractions
    assert relaxed.equal_fraction(relaxed.STRETCHED_BYTES) in fractions
    assert {c.method for c in baselines.ROWS.values()} == {"magnitude", "wanda", "obs"}
    assert {c.score for c in baselines.ROWS.values()} >= {"random", "magnitude", "wanda"}


def entry(fraction, nll, r, fp8=True, **more):
    part = {"nll": nll, "ppl": math.exp(nll), "r": r, "r_stderr": 0.01}
    return {
        "dense_fraction": fraction,
        "config": {"fp8": fp8},
        "test": part,
        "outside": part,
        **more,
    }


def test_tables_come_from_the_result_files(tmp_path):
    comparisons = importlib.import_module("comparisons")
    assert set(comparisons.parts(tmp_path).values()) == {comparisons.MISSING}
    rows = {
        "dense": entry(None, 3.0, 1.0, fp8=False),
        "ours 25 %": entry(0.25, 3.2, 0.7),
        "6:8": entry(None, 3.1, 0.9, fp8=False, bytes_a_weight={"tight": 0.828, "wide": 0.9375}),
    }
    setup = {"model": "m", "calibration_windows": 8, "test_windows": 4}
    result = {"setup": setup, "machine": {"device": "cpu"}, "rows": rows}
    (tmp_path / "quality_baselines.json").write_text(json.dumps(result))
    found = comparisons.parts(tmp_path)
    assert found["second"] == comparisons.MISSING
    assert "| ours 25 % | 0.719 | W, A | 24.53 | +0.2000 | 0.700 ± 0.010 | 0.700 |" in (
        found["baselines"].splitlines()
    )
    assert "| 6:8 | 0.828 or 0.938 |  |" in found["baselines"]
    assert "| dense | 2 (bf16) |" in found["baselines"]


def test_targets_are_means_over_seeds():
    comparisons = importlib.import_module("comparisons")

    def row(r, **more):
        return {part: {"r": r} for part in ("validation", "test", "outside")} | more

    rows = {
        "dense": row(1.0),
        "staircase 25 %, seed 0": row(0.7, prune_seconds=9.0),
        "staircase 25 %, seed 1": row(0.8, prune_seconds=11.0),
        "staircase 25 %, fine-tuned 60 s, seed 0": row(0.9, prune_seconds=9.0, tune_seconds=61.0),
    }
    setup = {"model": "m", "calibration_windows": 8, "validation_windows": 2, "test_windows": 4}
    table = comparisons.targets({"setup": setup, "machine": {"device": "cpu"}, "rows": rows})
    assert table.splitlines()[2:5] == [
        "| dense | 1 | 1.000 | 1.000 |  | 1.000 |  |",
        "| staircase 25 % | 2 | 0.750 | 0.750 | 0.700, 0.800 | 0.750 | 11 |",
        "| staircase 25 %, fine-tuned 60 s | 1 | 0.900 | 0.900 |  | 0.900 | 61 |",
    ]


def test_the_pages_are_what_the_results_say():
    document = importlib.import_module("document")
    pages = [page.read_text(encoding="utf-8") for page in document.PAGES]
    assert document.render(pages) == pages
    marker = "<!-- baselines -->\n"
    assert document.render([page.replace(marker, marker + "by hand\n") for page in pages]) == pages


def test_both_families_are_made():
    second = importlib.import_module("second_family")
    for family, norms in (("llama", False), ("qwen3", True)):
        model = second.make_model(family, second.TINY, 300, 0)
        assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 300)
        assert hasattr(model.model.layers[0].self_attn, "q_norm") is norms


def test_second_family_learns_prunes_and_measures(tmp_path, monkeypatch):
    second = importlib.import_module("second_family")
    out = tmp_path / "second.json"
    small = {"hidden": 64, "intermediate": 160, "layers": 1, "heads": 2, "kv_heads": 1}
    small |= {"length": 64, "calibration": 8, "test": 6}
    monkeypatch.setattr(second, "TINY", second.Size(**{**vars(second.TINY), **small}))
    words = ["--tiny", "--device", "cpu", "--max-steps", "50", "--admm-steps", "0"]
    monkeypatch.setattr(second, "FRACTIONS", (0.0, 0.25))
    monkeypatch.setattr(sys, "argv", ["second_family", *words, "--out", str(out)])
    second.main()
    result = json.loads(out.read_text())
    held = result["training"]["held_out_nll"]
    assert held[-1] < math.log(300) - 1.0  # it learned: far below a uniform guess
    assert result["training"]["kept"] == held.index(min(held)) + 1
    rows = result["rows"]
    assert (rows["dense"]["test"]["r"], rows["sparsegpt 2:4"]["test"]["r"]) == (1.0, 0.0)
    for kind in ("sparsegpt + dense columns", "uniform", "ours"):
        for d in second.FRACTIONS:
            if kind == "uniform" and d == 0.0:
                continue
            row = rows[f"{kind} {d:.1%}"]
            # Widths are multiples of 16 columns of 64 or 160; a staircase spends no more than d.
            assert abs(row["dense_fraction"] - d) <= 0.126
            assert row["config"]["fp8"]
    assert rows["dense fp8"]["dense_fraction"] == 1.0
    table = importlib.import_module("comparisons").second(result)
    assert len([line for line in table.splitlines() if line.startswith("| ours ")]) == 2
    assert f"{result['training']['text_tokens']:,} tokens" in table
    spent = [rows[f"ours {d:.1%}"]["mean_relative_error"] for d in second.FRACTIONS]
    assert spent[0] > spent[-1]


def test_every_epoch_of_training_is_cut_anew():
    second = importlib.import_module("second_family")
    size = second.Size(**{**vars(second.TINY), "length": 8, "batch": 2, "epochs": 3})
    pool = torch.cat([torch.zeros(6, 1), torch.arange(42).view(6, 7) + 1], dim=1).long()
    given = list(second.batches({"faq": pool, "book": pool + 100}, size, 0))
    assert [last for _, last in given] == [False, False, False, True] * 3
    for ids, _ in given:
        assert ids.shape == (2, 8)
        body = ids[:, 1:]
        assert (body[:, 1:] - body[:, :-1] == 1).all()  # windows are runs of the text
    first = {tuple(ids[:, 1].tolist()) for ids, _ in given[:4]}
    assert first != {tuple(ids[:, 1].tolist()) for ids, _ in given[4:8]}
