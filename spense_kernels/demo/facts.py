# SPDX-License-Identifier: Apache-2.0
"""Facts about the model, the machine and the software for the demo's report."""

from __future__ import annotations

import datetime
import os
import platform

import torch

from spense_kernels.env import cpu_configs, cpu_name, versions

BF16_BYTES = 2
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def model_facts(loaded) -> dict:
    """Name, source, compute dtype, parameters and bytes of the lm_head as bf16."""
    model = loaded.model
    return {
        "name": loaded.name,
        "source": loaded.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "lm_head_bytes": BF16_BYTES * model.get_output_embeddings().weight.numel(),
    }


def dense_sizes(model) -> dict:
    """The keys of layers.totals() for an unpruned model stored in bf16 (lm_head apart)."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = sum(m.weight.numel() for m in layers)
    return {
        "layers": len(layers),
        "weights": weights,
        "dense_fraction": 1.0,
        "kept_fraction": 1.0,
        "packed_bytes": BF16_BYTES * weights,
        "logical_bytes": BF16_BYTES * weights,
        "linear_bytes_per_token": BF16_BYTES * weights,
    }


def machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "configs": cpu_configs(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def software() -> dict:
    return versions(*PACKAGES)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def provenance(report, source: str, text: dict) -> dict:
    """What a checkpoint tells about its making: method, settings, text, seed, versions."""
    return {
        "source": source,
        "method": report.config.method,
        "settings": report.config.to_json(),
        "calibration": {**text, **report.calibration},
        "seed": report.config.seed,
        "mean_relative_error": report.mean_relative_error,
        "notes": report.notes,
        "versions": software(),
    }
