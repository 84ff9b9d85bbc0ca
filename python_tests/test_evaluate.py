# SPDX-License-Identifier: Apache-2.0
"""Texts, windows, perplexity, generation, op counting."""

import math

import pytest
import torch
from tiny_model import TEXT, make_model, make_tokenizer

from spense_kernels import evaluate
from spense_kernels.errors import SpenseError, UserError
from spense_kernels.evaluate import measure
from spense_kernels.evaluate import text as text_module


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(vocabulary=len(tokenizer))


def paragraphs(documents):
    return [" ".join(p.split()) for d in documents for p in d.split("\n\n") if p.strip()]


def test_python_docs_hold_out_text_that_is_not_in_the_calibration_part():
    corpus = evaluate.python_docs()
    calibration, test = paragraphs(corpus.calibration), paragraphs(corpus.test)
    assert len(calibration) + len(test) == len(set(calibration) | set(test))
    share = sum(map(len, test)) / sum(map(len, test + calibration))
    assert 0.15 < share < 0.4
    assert sum(map(len, test)) > 60_000  # over 8,000 tokens of test text
    assert corpus == evaluate.python_docs()
    assert corpus.sha256 == evaluate.python_docs().sha256


def test_files_split_each_file_and_drop_repeats(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("\n\n".join(f"a{i:04}" for i in range(100)))
    two.write_text("\n\n".join([f"b{i:04}" for i in range(100)] + ["a0000", "b0000"]))
    corpus = evaluate.files([one, two])
    assert len(corpus.calibration) == len(corpus.test) == 2
    parts = paragraphs(corpus.calibration), paragraphs(corpus.test)
    assert [len(p) for p in parts] == [150, 50]
    assert parts[1][0] == "a0075"
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not found"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"caf\xe9 au lait", "expected UTF-8, got byte 0xe9 at offset 3"),
        (b"a\0b", "NUL"),
    ],
)
def test_bad_text_files(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        evaluate.files([path])


def test_a_folder_is_no_text_file(tmp_path):
    with pytest.raises(UserError, match="text file"):
        text_module.read_text(tmp_path)


def test_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert text_module.read_text(path) == "hello"


def test_windows_start_with_bos_and_continue_the_text(tokenizer):
    windows = evaluate.windows(tokenizer, [TEXT[:2000], TEXT[2000:4000]], length=32)
    assert windows.dtype == torch.int64
    assert windows.shape[1] == 32
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    tokens = [t for d in (TEXT[:2000], TEXT[2000:4000]) for t in tokenizer(d).input_ids]
    assert windows[:, 1:].flatten().tolist() == tokens[: windows.shape[0] * 31]
    assert windows.shape[0] == len(tokens) // 31


def test_windows_without_bos(tokenizer):
    bare = make_tokenizer()
    bare.bos_token = None
    with_bos = evaluate.windows(tokenizer, [TEXT], 32)
    without = evaluate.windows(bare, [TEXT], 32)
    assert without[0, :31].tolist() == with_bos[0, 1:].tolist()
    assert evaluate.windows(bare, ["short"], 512).shape == (0, 512)


def test_pick_is_even_or_seeded():
    pool = torch.arange(10)[:, None]
    assert evaluate.pick(pool, 5).flatten().tolist() == [0, 2, 4, 6, 8]
    assert evaluate.pick(pool, 99) is pool
    one = evaluate.pick(pool, 4, seed=1)
    assert torch.equal(one, evaluate.pick(pool, 4, seed=1))
    assert len(set(one.flatten().tolist())) == 4
    assert any(not torch.equal(one, evaluate.pick(pool, 4, seed=s)) for s in range(2, 6))


def test_perplexity_is_the_models_own_loss(model, tokenizer, monkeypatch):
    windows = evaluate.windows(tokenizer, [TEXT], 24)[:5]
    # 3 rows of logits at a time, so that chunk edges fall inside a window.
    monkeypatch.setattr(measure, "LOGIT_BYTES", 3 * 4 * len(tokenizer))
    seen = []
    result = evaluate.perplexity(model, windows, batch=2, progress=seen.append)
    with torch.no_grad():
        expected = [model(w[None], labels=w[None]).loss.item() for w in windows]
    # float32 sums of 23 terms near 6, in another order: a few units in the last place each.
    assert result["window_nll"] == pytest.approx(expected, rel=23 * 2**-23)
    assert result["tokens"] == 5 * 23
    assert result["nll"] == pytest.approx(sum(expected) / 5, rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(result["nll"]))
    assert seen == [2, 2, 1]


def test_standard_errors_by_hand():
    result = measure.summarise([1.0, 2.0, 3.0], tokens_a_window=10)
    assert result["nll"] == 2.0
    assert result["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert result["ppl_stderr"] == pytest.approx(math.exp(2) / math.sqrt(3))
    assert result["tokens"] == 30
    other = measure.summarise([1.1, 2.1, 3.1], tokens_a_window=10)
    difference = evaluate.paired_difference(other, result)
    assert difference["nll"] == pytest.approx(0.1)
    assert difference["stderr"] == pytest.approx(0.0, abs=1e-12)
    assert measure.summarise([1.0], 10)["stderr"] is None
    with pytest.raises(SpenseError, match="3 windows against 1"):
        evaluate.paired_difference(result, measure.summarise([1.0], 10))


def test_a_model_that_breaks_down_is_an_error(model, tokenizer):
    broken = make_model(vocabulary=len(tokenizer))
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    windows = evaluate.windows(tokenizer, [TEXT], 16)[:1]
    with pytest.raises(SpenseError, match="loss of window 0 is nan"):
        evaluate.perplexity(broken, windows)
    with pytest.raises(UserError, match="windows must be"):
        evaluate.perplexity(model, windows[:0])


def test_softcapped_and_scaled_logits(tokenizer):
    """Gemma 2 caps its logits and Granite divides them; chunking must not lose that."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    cap = {"head_dim": 16, "final_logit_softcapping": 0.05}
    models = [
        Gemma2ForCausalLM(Gemma2Config(**size, **cap)),
        GraniteForCausalLM(GraniteConfig(**size, logits_scaling=0.25)),
    ]
    windows = evaluate.windows(tokenizer, [TEXT], 16)[:2]
    for model in models:
        model.eval()
        with torch.no_grad():
            expected = [model(w[None], labels=w[None]).loss.item() for w in windows]
        assert evaluate.perplexity(model, windows)["window_nll"] == pytest.approx(
            expected, rel=15 * 2**-23
        )


def test_generate_is_greedy(model, tokenizer):
    prompt = "Paragraph 12: the column"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(6):
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best[None, None]], dim=1)
        if best == tokenizer.eos_token_id:
            break
    start = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert evaluate.generate(model, tokenizer, prompt, 6) == expected
    with pytest.raises(UserError, match="empty"):
        evaluate.generate(model, tokenizer, "  ")
    with pytest.raises(UserError, match="max_new_tokens"):
        evaluate.generate(model, tokenizer, "a", 0)


def test_op_counter_counts_only_its_namespace():
    with evaluate.OpCounter("aten") as ops:
        torch.ones(2) + torch.ones(2)
    assert ops.calls["add"] == 1
    with evaluate.OpCounter() as ours:
        torch.ones(2) + torch.ones(2)
        torch.ops.spense.quantize_fp8(torch.randn(3, 32))
    assert dict(ours.calls) == {"quantize_fp8": 1}
