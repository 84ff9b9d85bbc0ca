# SPDX-License-Identifier: Apache-2.0
"""The command line on a tiny model: the whole way, a user's mistakes, nothing half written."""

import json
import resource
import subprocess
import sys

import pytest
from tiny_model import save_tiny, write_text
from typer.testing import CliRunner

from spense_kernels.cli import commands, guard
from spense_kernels.cli.app import app, spread

LAYERS = 2 * 7  # q, k, v, o, gate, up, down of two decoder layers
SMALL = ("--samples", "4", "--seq-len", "32", "--dtype", "float32")


def spense(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="spense")


def spense_process(*args, before=None):
    command = [sys.executable, "-m", "spense_kernels.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, a text and a checkpoint made from them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "dense")
    write_text(folder / "text.txt")
    done = spense(
        "prune", folder / "dense", "--out", folder / "pruned",
        "--calibration", folder / "text.txt", *SMALL, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (folder / "prune.json").write_text(done.stdout)
    return folder


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*"))


def test_prune_tells_what_it_did(place):
    result = json.loads((place / "prune.json").read_text())
    assert result["totals"]["layers"] == LAYERS
    assert 0.2 < result["totals"]["dense_fraction"] < 0.3
    assert result["out"] == str(place / "pruned")
    assert all(0 <= layer["rel_error"] < 1 for layer in result["layers"])


def test_verify_and_inspect(place):
    assert spense("verify", place / "pruned").exit_code == 0
    found = json.loads(spense("inspect", place / "pruned", "--json").stdout)
    assert found["totals"]["layers"] == LAYERS
    shapes = {x["name"]: (x["n"], x["k"]) for x in found["layers"]}
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 160)
    assert found["totals"]["packed_bytes"] >= found["totals"]["logical_bytes"]
    assert "lm_head" in " ".join(found["modules_to_not_convert"])
    assert found["provenance"]
    text = spense("inspect", place / "pruned", "--layers").stdout
    assert "bytes per token" in text
    assert "model.layers.0.self_attn.q_proj" in text


def test_eval_of_both_models_and_the_same_numbers_in_a_new_process(place):
    args = ("--text", place / "text.txt", "--windows", 3, "--seq-len", 32, "--dtype", "float32")
    dense = json.loads(spense("eval", place / "dense", *args, "--json").stdout)
    pruned = json.loads(spense("eval", place / "pruned", *args, "--json").stdout)
    assert dense["tokens"] == pruned["tokens"] == 93
    assert dense["ppl"] != pruned["ppl"]
    again = spense_process("eval", place / "pruned", *args, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["window_nll"] == pruned["window_nll"]
    assert "evaluate: 100%" in again.stderr
    assert "perplexity" in spense("eval", place / "pruned", *args).stdout


def test_generate_runs_through_the_op(place):
    done = spense(
        "generate", place / "pruned", "--prompt", "Paragraph", "the matrix",
        "--max-new-tokens", 3, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [r["prompt"] for r in result["results"]] == ["Paragraph", "the matrix"]
    # One call a layer and forward pass; a pass a token, fewer only when the model ends the text.
    assert result["op_calls"]["hybrid_gemm"] % LAYERS == 0
    assert 2 * LAYERS <= result["op_calls"]["hybrid_gemm"] <= 6 * LAYERS


def test_dry_run_writes_nothing(place, tmp_path):
    before = files_of(place)
    done = spense("prune", place / "dense", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["totals"]["layers"] == LAYERS
    assert files_of(place) == before


def test_work_dir_resumes(place, tmp_path):
    args = ("prune", place / "dense", "--calibration", place / "text.txt", *SMALL)
    work = tmp_path / "work"
    first = spense(*args, "--out", tmp_path / "a", "--work-dir", work)
    assert first.exit_code == 0, first.output
    assert any(work.rglob("*"))
    refused = spense(*args, "--out", tmp_path / "b", "--work-dir", work)
    assert refused.exit_code == 2
    assert "--work-dir" in refused.stderr
    again = spense(*args, "--out", tmp_path / "b", "--work-dir", work, "--resume")
    assert again.exit_code == 0, again.output
    one, two = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert one == two


def test_env(place):
    facts = json.loads(spense("env", "--json").stdout)
    assert facts["backends"]["cpu"].startswith("runs")
    assert "torch" in spense("env").stdout


@pytest.mark.parametrize("command", ["", *commands.ALL])
def test_help_has_examples(command):
    done = spense(*[command] if command else [], "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.stdout
    assert f"spense {command}".strip() in done.stdout


def bad_text(path, data):
    path.write_bytes(data)
    return path


MISTAKES = {
    "no such model": (lambda p, t: ("eval", t / "absent"), "neither a directory"),
    "a folder without a model": (lambda p, t: ("eval", t), r"no config.json"),
    "dense model given to inspect": (lambda p, t: ("inspect", p / "dense"), "not a spense"),
    "no such checkpoint to verify": (lambda p, t: ("verify", t / "absent"), "no such folder"),
    "pruned twice": (lambda p, t: ("prune", p / "pruned", "--out", t / "o"), "pruned already"),
    "fraction above one": (
        lambda p, t: ("prune", p / "dense", "--out", t / "o", "--dense-fraction", "1.5"),
        "dense_fraction",
    ),
    "unknown strategy": (
        lambda p, t: ("prune", p / "dense", "--out", t / "o", "--strategy", "spiral"),
        "spiral",
    ),
    "unknown method": (
        lambda p, t: ("prune", p / "dense", "--out", t / "o", "--method", "guess"),
        "guess",
    ),
    "no out": (lambda p, t: ("prune", p / "dense"), "--out is missing"),
    "out exists": (lambda p, t: ("prune", p / "dense", "--out", p / "pruned"), "pass --force"),
    "out is a file": (lambda p, t: ("prune", p / "dense", "--out", p / "text.txt"), "not a folder"),
    "resume without work-dir": (
        lambda p, t: ("prune", p / "dense", "--out", t / "o", "--resume"),
        "needs --work-dir",
    ),
    "empty text": (
        lambda p, t: ("eval", p / "dense", "--text", bad_text(t / "e.txt", b"")),
        "empty",
    ),
    "binary text": (
        lambda p, t: ("eval", p / "dense", "--text", bad_text(t / "b.txt", b"\xff\xfe\x00")),
        "expected UTF-8",
    ),
    "text not there": (lambda p, t: ("eval", p / "dense", "--text", t / "no.txt"), "not found"),
    "text too short": (
        lambda p, t: ("eval", p / "dense", "--text", bad_text(t / "s.txt", b"two words")),
        "shorter than one window",
    ),
    "calibration too short": (
        lambda p, t: (
            "prune", p / "dense", "--out", t / "o", "--calibration", bad_text(t / "s.txt", b"hi"),
        ),
        "shorter than one window",
    ),
    "no such device": (
        lambda p, t: ("eval", p / "dense", "--device", "tpu"),
        "--device",
    ),
    "unknown dtype": (lambda p, t: ("eval", p / "dense", "--dtype", "int8"), "--dtype"),
    "empty prompt": (lambda p, t: ("generate", p / "dense", "--prompt", " "), "--prompt"),
    "demo fraction": (lambda p, t: ("demo", "--dense-fraction", "-1"), "--dense-fraction"),
    "demo out exists": (lambda p, t: ("demo", "--out", p / "dense"), "pass --force"),
    "unknown option": (lambda p, t: ("eval", p / "dense", "--speed"), "No such option"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_clear_line(name, place, tmp_path):
    make, words = MISTAKES[name]
    args = make(place, tmp_path)
    before = files_of(tmp_path), files_of(place)
    done = spense(*args)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    if "No such option" not in words:
        errors = [line for line in done.stderr.splitlines() if line.startswith("spense: error:")]
        assert len(errors) == 1
    assert done.stdout == ""
    assert (files_of(tmp_path), files_of(place)) == before


def damaged(place, tmp_path, change):
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(place / "pruned", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    return copy


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b[: len(b) // 2], id="truncated"),
        pytest.param(lambda b: b[:-1] + bytes([b[-1] ^ 0x55]), id="one byte changed"),
        pytest.param(lambda b: b"", id="empty"),
    ],
)
def test_damaged_checkpoints(place, tmp_path, change):
    copy = damaged(place, tmp_path, change)
    checked = spense("verify", copy, "--json")
    assert checked.exit_code == 1, checked.output
    assert json.loads(checked.stdout)["problems"]
    used = spense("generate", copy, "--prompt", "a", "--max-new-tokens", 1)
    assert used.exit_code == 2, used.output
    assert used.stderr.startswith("spense: error:")
    assert used.exception is None or isinstance(used.exception, SystemExit)


def limit_file_size():
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_full_disk_leaves_nothing_half_written(place, tmp_path):
    done = spense_process(
        "prune", place / "dense", "--out", tmp_path / "out",
        "--calibration", place / "text.txt", *SMALL, before=limit_file_size,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len([x for x in done.stderr.splitlines() if x.startswith("spense: error:")]) == 1
    assert files_of(tmp_path) == []


def test_too_little_space_is_seen_before_the_work(place, tmp_path, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda _: usage)
    done = spense("prune", place / "dense", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 2
    assert "the disk has 0.00 GB left" in done.stderr


def test_interrupt_leaves_nothing(place, tmp_path, monkeypatch):
    from spense_kernels.cli import pruning

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune_model", interrupt)
    done = spense(
        "prune", place / "dense", "--out", tmp_path / "out",
        "--calibration", place / "text.txt", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert files_of(tmp_path) == []


def test_force_replaces_a_checkpoint_and_nothing_else(place, tmp_path):
    out = tmp_path / "out"
    args = ("prune", place / "dense", "--out", out, "--calibration", place / "text.txt", *SMALL)
    out.mkdir()
    (out / "letter").write_text("mine")
    refused = spense(*args, "--force")
    assert refused.exit_code == 2
    assert "holds no spense checkpoint" in refused.stderr
    assert (out / "letter").read_text() == "mine"
    (out / "letter").unlink()
    assert spense(*args, "--dense-fraction", 0).exit_code == 0
    assert spense(*args).exit_code == 2
    assert spense(*args, "--dense-fraction", 1, "--force").exit_code == 0
    found = json.loads(spense("inspect", out, "--json").stdout)
    assert found["totals"]["dense_fraction"] == 1.0
    assert spense("verify", out).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_debug_shows_the_traceback(tmp_path):
    done = spense_process("eval", tmp_path / "absent", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    plain = spense_process("eval", tmp_path / "absent")
    assert plain.returncode == 2
    assert plain.stderr.splitlines()[-1].startswith("spense: error: load_dense:")


def test_version_and_no_arguments():
    assert spense("--version").stdout.startswith("spense 0.")
    assert "Examples:" in spense().output


def test_list_options_take_several_values():
    assert spread(["demo", "--text", "a", "b", "--seed", "1"]) == [
        "demo", "--text", "a", "--text", "b", "--seed", "1",
    ]  # fmt: skip
    assert spread(["eval", "m", "--text", "a", "--text", "b", "c"])[2:] == [
        "--text", "a", "--text", "b", "--text", "c",
    ]  # fmt: skip
    assert spread(["prune", "m", "--seed", "1", "x"]) == ["prune", "m", "--seed", "1", "x"]


def test_finetune_makes_a_closer_checkpoint(place, tmp_path):
    args = (
        "finetune", place / "pruned", "--teacher", place / "dense", "--out", tmp_path / "tuned",
        "--calibration", place / "text.txt", *SMALL, "--steps", 12, "--batch", 4, "--lr", 5e-5,
    )  # fmt: skip
    done = spense(*args, "--work-dir", tmp_path / "work", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["last_loss"] < result["first_loss"]
    assert spense("verify", tmp_path / "tuned").exit_code == 0
    found = json.loads(spense("inspect", tmp_path / "tuned", "--json").stdout)
    assert found["provenance"]["finetune"]["settings"]["steps"] == 12
    assert found["provenance"]["settings"]
    eval_args = ("--text", place / "text.txt", "--windows", 3, "--seq-len", 32)
    assert spense("eval", tmp_path / "tuned", *eval_args, "--dtype", "float32").exit_code == 0
    assert (
        spense(*args, "--work-dir", tmp_path / "work", "--resume").exit_code == 2
    )  # --out is there
    again = spense(*args, "--work-dir", tmp_path / "work", "--resume", "--force")
    assert again.exit_code == 0, again.output


def test_finetune_layer_by_layer(place, tmp_path):
    args = (
        "finetune", place / "pruned", "--teacher", place / "dense", "--out", tmp_path / "tuned",
        "--calibration", place / "text.txt", *SMALL, "--layerwise", "--batch", 2, "--lr", 3e-4,
    )  # fmt: skip
    done = spense(*args, "--steps", 12)
    assert done.exit_code == 0, done.output
    assert "relative error of a decoder layer's output" in done.output
    assert spense("verify", tmp_path / "tuned").exit_code == 0
    found = json.loads(spense("inspect", tmp_path / "tuned", "--json").stdout)
    errors = found["provenance"]["finetune"]["layer_errors"]
    assert all(after < before for before, after in errors)
    for more in (("--minutes", 1), ("--splice", 2), ("--work-dir", tmp_path / "work")):
        done = spense(*args, "--force", *more)
        assert done.exit_code == 2
        assert f"--layerwise: expected no {more[0]}" in done.output
    assert not (tmp_path / "work").exists()


def test_finetune_tells_a_mistake(place, tmp_path):
    out = ("--out", tmp_path / "tuned")
    done = spense("finetune", place / "dense", "--teacher", place / "dense", *out)
    assert done.exit_code == 2
    assert "no spense checkpoint" in done.output
    done = spense("finetune", place / "pruned", "--teacher", place / "pruned", *out)
    assert done.exit_code == 2
    assert "pruned already" in done.output
    done = spense("finetune", place / "pruned", "--teacher", place / "dense", *out, "--lr", "0")
    assert done.exit_code == 2
    assert not (tmp_path / "tuned").exists()
