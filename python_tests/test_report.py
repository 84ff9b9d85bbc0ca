# SPDX-License-Identifier: Apache-2.0
"""`spense prune --report` and `--target-speedup`: what they write must be what the model is."""

import importlib.util
import json

import pytest
import torch
from tiny_model import make_tokenizer, save_tiny, write_text
from typer.testing import CliRunner

from spense_kernels import evaluate
from spense_kernels.checkpoint import load_checkpoint
from spense_kernels.cli.app import app
from spense_kernels.cost import gemm_us, speed_of
from spense_kernels.linear import SpenseLinear
from spense_kernels.report import document, write_report
from spense_kernels.report.pareto import add_recovery, measure
from spense_kernels.report.sensitivity import predicted_losses

SMALL = ("--samples", "8", "--seq-len", "32", "--dtype", "float32", "--admm-steps", "2")


def spense(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="spense")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, a text, a report and the checkpoint that came with it."""
    folder = tmp_path_factory.mktemp("report")
    save_tiny(folder / "dense")
    write_text(folder / "text.txt")
    done = spense(
        "prune", folder / "dense", "--report", folder / "report", "--out", folder / "pruned",
        "--calibration", folder / "text.txt", *SMALL, "--strategy", "staircase",
        "--dense-fraction", 0.3, "--report-fractions", 0, 1, "--report-windows", 6, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (folder / "printed.json").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def found(place):
    return json.loads((place / "report" / "report.json").read_text())


def row_of(found, key):
    return next(row for row in found["rows"] if row["key"] == key)


def splits_of(place):
    model = load_checkpoint(place / "pruned")
    return {name: m.split for name, m in model.named_modules() if isinstance(m, SpenseLinear)}


def test_rows_are_the_ends_the_fractions_and_the_own_one(found):
    assert [row["key"] for row in found["rows"]] == ["dense", "sparsegpt", "0", "0.3", "1"]
    assert [row["key"] for row in found["rows"] if row.get("chosen")] == ["0.3"]
    fractions = [row["speed"]["dense_fraction"] for row in found["rows"] if "speed" in row]
    assert fractions[0] == 0.0
    assert 0.2 < fractions[1] <= 0.3
    assert fractions[2] == 1.0


def test_the_measured_loss_is_that_of_the_saved_checkpoint(place, found):
    """Held-out windows: the last quarter of the file, as `evaluate.files` cuts it."""
    test = evaluate.files([place / "text.txt"]).test
    windows = evaluate.pick(evaluate.windows(make_tokenizer(), test, 32), 6)
    for folder, key in (("dense", "dense"), ("pruned", "0.3")):
        from spense_kernels.models import load_any

        loaded = load_any(place / folder, torch.float32)
        again = evaluate.perplexity(loaded.model, windows)
        assert again["window_nll"] == pytest.approx(row_of(found, key)["window_nll"], abs=1e-5)
    assert row_of(found, "dense")["nll"] != row_of(found, "0.3")["nll"]


def test_the_speed_is_that_of_the_checkpoints_tiles(place, found):
    splits = splits_of(place)
    groups = [
        [splits[f"model.layers.{i}.{name}_proj"] for name in names]
        for i in range(2)
        for names in (
            ("self_attn.q", "self_attn.k", "self_attn.v"), ("self_attn.o",),
            ("mlp.gate", "mlp.up"), ("mlp.down",),
        )
    ]  # fmt: skip
    speed = row_of(found, "0.3")["speed"]
    assert speed == speed_of(groups, 16).to_json()
    assert speed["packed_bytes"] == sum(s.packed_bytes for s in splits.values())
    assert row_of(found, "1")["speed"]["speedup"] == 1.0


def test_the_dense_columns_are_those_of_the_weights(place):
    """In a tile, a listed column may hold any weights; of four others two are zero."""
    record = json.loads((place / "report" / "dense_columns.json").read_text())
    model = load_checkpoint(place / "pruned")
    seen = set()
    for group in record["groups"]:
        for name in group["modules"]:
            seen.add(name)
            module = model.get_submodule(name)
            weight = module.dequantize(torch.float32).weight
            for tile, width in enumerate(group["widths"][name]):
                rows = weight[128 * tile : 128 * (tile + 1)]
                (order,) = group["order"]
                dense = order[len(order) - width :]
                assert (rows[:, dense] != 0).float().mean() > 0.9 or not width
                others = [c for c in range(group["k"]) if c not in set(dense)]
                if others:
                    assert (rows[:, others] != 0).float().mean() <= 0.5
    assert seen == set(splits_of(place))


def test_sensitivity_names_every_projection_and_falls_with_width(place, found):
    assert {x["name"] for x in found["sensitivity"]} == set(splits_of(place))
    for entry in found["sensitivity"]:
        assert entry["shares"] == sorted(entry["shares"])
        assert entry["shares"][0] == 0.0
        assert entry["shares"][-1] == 1.0
        assert entry["nats"][0] > 0.0
        assert entry["nats"][-1] == 0.0


def test_markdown_shows_every_row_and_the_picture_is_one(place, found):
    text = (place / "report" / "report.md").read_text()
    for row in found["rows"]:
        assert row["label"] in text
        assert f"{row['ppl']:.2f}" in text
    assert "modelled, not measured" in text
    picture = place / "report" / "report.png"
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "(report.png)" in text
    else:
        assert not picture.exists()
    written = {"report.json", "dense_columns.json", "report.md"}
    written |= {"report.png"} if picture.exists() else set()
    assert {entry.name for entry in (place / "report").iterdir()} == written


def test_what_is_printed_is_what_is_written(place, found):
    printed = json.loads((place / "printed.json").read_text())
    assert printed["out"] == str(place / "pruned")
    assert printed["speed"] == row_of(found, "0.3")["speed"]
    assert [row["nll"] for row in printed["report"]["rows"]] == [r["nll"] for r in found["rows"]]
    assert spense("verify", place / "pruned").exit_code == 0


def test_without_matplotlib_there_is_no_picture(found, place, tmp_path, monkeypatch):
    columns = json.loads((place / "report" / "dense_columns.json").read_text())["groups"]
    monkeypatch.setattr(document.importlib.util, "find_spec", lambda _: None)
    paths = write_report({**found, "columns": columns}, tmp_path / "new")
    assert [p.name for p in paths] == ["report.json", "dense_columns.json", "report.md"]
    assert "report.png" not in paths[2].read_text()


def row(key, losses):
    return {"key": key, "window_nll": losses, "nll": sum(losses) / len(losses)}


def test_recovery_by_hand():
    rows = [row("dense", [1.0, 2.0]), row("sparsegpt", [2.0, 4.0]), row("x", [1.5, 2.5])]
    add_recovery(rows)
    assert [r["r"] for r in rows] == pytest.approx([1.0, 0.0, 2 / 3])
    assert [r["r_stderr"] for r in rows[:2]] == [0.0, 0.0]
    # Windows: low - x = 0.5, 1.5; low - high = 1, 2; so d = -1/6, 1/6 over a gap of 1.5.
    assert rows[2]["r_stderr"] == pytest.approx(1 / 6 / 1.5)
    rows = [row("dense", [2.0]), row("sparsegpt", [2.0])]
    add_recovery(rows)
    assert [r["r"] for r in rows] == [None, None]


def test_predicted_losses_are_quadratic_in_the_errors():
    """Weights a tenth the size have errors a tenth the size: about a hundredth of the loss."""
    from prune_models import make, quick, tokens_for_calibration

    from spense_kernels.prune import collect_statistics

    tokens, config = tokens_for_calibration(), quick(sensitivity_labels="text")
    before, after = make("llama"), make("llama")
    with torch.no_grad():
        after.model.layers[0].mlp.down_proj.weight.mul_(0.1)

    def nats(model):
        statistics = collect_statistics(model, tokens, config)
        found = predicted_losses(model, tokens, statistics, config, "cpu")
        return {x["name"]: x["nats"][0] for x in found}

    name = "model.layers.0.mlp.down_proj"
    old, new = nats(before)[name], nats(after)[name]
    assert 0.003 * old < new < 0.03 * old
    assert predicted_losses(before, tokens, None, config, "cpu") == []


def test_hessians_that_do_not_fit_are_streamed(monkeypatch):
    from prune_models import make, quick, tokens_for_calibration

    from spense_kernels.report import pareto

    model, tokens = make("llama"), tokens_for_calibration()
    options = {"fractions": (), "config": quick(dense_fraction=0.25)}
    kept, _ = measure(model, tokens, tokens[:2], **options)
    monkeypatch.setattr(pareto, "_memory", lambda: 1000)
    streamed, _ = measure(model, tokens, tokens[:2], **options)
    assert kept["sensitivity"]
    assert streamed["sensitivity"] == []
    assert [r["nll"] for r in kept["rows"]] == pytest.approx([r["nll"] for r in streamed["rows"]])
    text = document.markdown({**streamed, "source": "m", "text": "t"})
    assert "No predicted losses" in text


def test_a_gpu_prunes_as_many_layers_together_as_fit(monkeypatch):
    from spense_kernels.prune import Statistics
    from spense_kernels.prune.statistics import LayerStatistics
    from spense_kernels.report.pareto import layers_at_once

    layers = [LayerStatistics([], {"q": torch.zeros(256, 256)}) for _ in range(6)]
    statistics = Statistics(layers, "norm")
    free = {"bytes": 16 * 4 * 256**2 * 4}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free["bytes"], 0))
    assert layers_at_once(statistics, "cuda") == 4
    free["bytes"] = 1 << 40
    assert layers_at_once(statistics, "cuda:0") == 6
    free["bytes"] = 0
    assert layers_at_once(statistics, "cuda") == 1
    assert layers_at_once(statistics, "cpu") == layers_at_once(None, "cuda") == 1


# --- --target-speedup ---


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One layer, wide enough that bytes count beside the launches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    write_text(folder / "text.txt")
    return folder


def test_target_speedup_is_kept_by_the_checkpoint(wide, tmp_path):
    done = spense(
        "prune", wide / "dense", "--out", tmp_path / "pruned", "--target-speedup", 1.08,
        "--calibration", wide / "text.txt", "--samples", 2, "--seq-len", 32, "--method", "wanda",
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["target_speedup"] == 1.08
    assert result["speed"]["speedup"] >= 1.08
    assert 0.0 < result["totals"]["dense_fraction"] < 1.0
    # What the saved layers would take, added up by hand.
    us = dense = 0.0
    model = load_checkpoint(tmp_path / "pruned")
    layer = model.model.layers[0]
    for parts in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.self_attn.o_proj,), (layer.mlp.gate_proj, layer.mlp.up_proj),
        (layer.mlp.down_proj,),
    ):  # fmt: skip
        n, k = sum(p.split.n for p in parts), parts[0].split.k
        us += gemm_us(16, n, k, sum(p.w_packed.numel() for p in parts))
        dense += gemm_us(16, n, k, n * k)
    assert dense / us == pytest.approx(result["speed"]["speedup"], rel=1e-3)


def test_a_dry_run_shows_the_fraction_of_a_target(wide):
    fractions = []
    for target in (1.02, 1.06, 1.1):
        args = ("prune", wide / "dense", "--dry-run", "--json", "--target-speedup", target)
        done = spense(*args)
        assert done.exit_code == 0, done.output
        plan = json.loads(done.stdout)
        assert plan["speed"]["speedup"] >= target
        fractions.append(plan["settings"]["dense_fraction"])
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] > fractions[2]
    assert "times as fast as dense FP8" in spense("prune", wide / "dense", "--dry-run").stdout


# --- settings ---

MISTAKES = {
    "out of reach": (("--target-speedup", 3), r"most that these layers can reach at batch 16 is 1"),
    "no number": (("--target-speedup", 0), "expected a number above 0"),
    "both budgets": (("--target-speedup", 1.1, "--dense-fraction", 0.5), "give one of the two"),
    "both budgets, set": (
        ("--target-speedup", 1.1, "--set", "dense_fraction=0.5"), "give one of the two",
    ),
    "no name": (("--set", "sinks"), "expected NAME=VALUE, got 'sinks'"),
    "unknown name": (("--set", "speed=1"), "no setting 'speed'; there are admm_steps"),
    "no bool": (("--set", "sinks=maybe"), "expected true or false, got 'maybe'"),
    "no int": (("--set", "search_rows=many"), "expected a whole number, got 'many'"),
    "no float": (("--set", "damping=little"), "expected a number, got 'little'"),
    "no list of floats": (("--set", "widths=0,half"), "expected a number, got 'half'"),
    "twice": (("--admm-steps", 3, "--set", "admm_steps=4"), "admm_steps is given twice"),
    "float weights": (("--set", "fp8=false"), "a checkpoint holds FP8 weights"),
    "outside its range": (("--set", "damping=-1"), "damping must be above 0"),
    "negative steps": (("--admm-steps", -1), "admm_steps must be an int >= 0"),
    "fractions without a report": (("--report-fractions", 0.5), "needs --report"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_clear_line(name, place):
    args, words = MISTAKES[name]
    done = spense("prune", place / "dense", "--dry-run", *args)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stdout == ""


def test_a_report_does_not_replace_another(place):
    args = ("prune", place / "dense", "--report", place / "report", *SMALL)
    done = spense(*args)
    assert done.exit_code == 2
    assert "--report" in done.stderr
    assert "pass --force" in done.stderr


def test_a_fraction_outside_is_refused_before_the_work(place, tmp_path):
    done = spense(
        "prune", place / "dense", "--report", tmp_path / "r", "--calibration", place / "text.txt",
        *SMALL, "--report-fractions", 0.5, 1.5,
    )  # fmt: skip
    assert done.exit_code == 2
    assert "must be in 0..1, got 1.5" in done.stderr
    assert not (tmp_path / "r").exists()


def test_settings_reach_the_pruner(place):
    args = ("--admm-steps", 0, "--search-rounds", 7, "--refit-steps", 3, "--skip", "k_proj", "v_p")
    args += ("--set", "widths=0,0.5,1", "sinks=false", "score=obs", "damping=0.02", "k_shards=2")
    done = spense("prune", place / "dense", "--dry-run", "--json", *args)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    settings = plan["settings"]
    assert (settings["admm_steps"], settings["search_rounds"], settings["refit_steps"]) == (0, 7, 3)
    assert settings["skip"] == ["k_proj", "v_p"]
    assert settings["widths"] == [0, 0.5, 1]
    assert (settings["sinks"], settings["score"], settings["damping"]) == (False, "obs", 0.02)
    assert settings["k_shards"] == 2
