# SPDX-License-Identifier: Apache-2.0
"""The work behind `spense finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.cli.pruning import load as load_teacher
from spense_kernels.errors import UserError
from spense_kernels.finetune import (
    FinetuneConfig,
    finetune,
    finish_student,
    make_student,
    reconstruct,
)
from spense_kernels.models import LoadedModel, is_spense_checkpoint, load_any, need
from spense_kernels.progress import Bars
from spense_kernels.prune.statistics import describe_calibration


@dataclass
class Models:
    """The pruned model and the dense one that teaches it."""

    pruned: LoadedModel
    teacher: LoadedModel


def load(checkpoint: Path, teacher: str, dtype: torch.dtype | None) -> Models:
    """Both models, or UserError when they do not belong together."""
    need("accelerate")
    if not is_spense_checkpoint(checkpoint):
        raise UserError(f"finetune: {checkpoint} is no spense checkpoint")
    pruned, dense = load_any(checkpoint, dtype), load_teacher(teacher, dtype)
    sizes = [
        (m.model.get_output_embeddings().weight.shape, type(m.model).__name__)
        for m in (pruned, dense)
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"finetune: --teacher {teacher}: expected a {sizes[0][1]} with head "
            f"{list(sizes[0][0])} like {checkpoint}, got a {sizes[1][1]} with {list(sizes[1][0])}"
        )
    return Models(pruned, dense)


def run(
    models: Models,
    windows: torch.Tensor,
    config: FinetuneConfig,
    device: str,
    work_dir: Path | None,
    out: Path,
    force: bool,
    text_name: str,
    layerwise: bool,
) -> dict:
    """Fine-tune, save, and return what `--json` prints."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=device == "cpu")
    model = models.pruned.model
    with Bars(indent="") as bars:
        if layerwise:
            if accelerator.num_processes > 1:
                raise UserError(
                    f"finetune: --layerwise: expected one process, got {accelerator.num_processes}"
                )
            report = reconstruct(
                model, models.teacher.model, windows, config, device=device, progress=bars
            )
            told = {"layer_errors": report.losses}
        else:
            report = finetune(
                make_student(model), models.teacher.model, windows, config,
                accelerator=accelerator, work_dir=work_dir, progress=bars,
            )  # fmt: skip
            told = {
                "first_step": report.first_step,
                "first_loss": report.losses[0] if report.losses else None,
                "last_loss": report.losses[-1] if report.losses else None,
            }
    result = {
        "out": str(out),
        "teacher": models.teacher.source,
        "settings": report.config.to_json(),
        "text": {"name": text_name, "windows": list(windows.shape)},
        **told,
        "tokens": report.tokens,
        "seconds": report.seconds,
    }
    if accelerator.is_main_process:
        model = finish_student(model)
        save_checkpoint(
            model, out, tokenizer=models.pruned.tokenizer,
            provenance=_provenance(model, result, windows), overwrite=force,
        )  # fmt: skip
    accelerator.wait_for_everyone()
    return result


def _provenance(model, result: dict, windows: torch.Tensor) -> dict:
    """What the pruned checkpoint told, and the fine-tune."""
    found = getattr(model.config, "quantization_config", None)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    inherited = dict(found.get("provenance", {})) if isinstance(found, dict) else {}
    kept = ("teacher", "settings", "text", "last_loss", "layer_errors", "tokens")
    note = {key: result[key] for key in kept if key in result}
    inherited["finetune"] = {**note, "text": {**result["text"], **describe_calibration(windows)}}
    return inherited


def text(result: dict) -> str:
    """The result for a terminal."""
    loss = ""
    if "layer_errors" in result:
        found = [errors for errors in result["layer_errors"] if None not in errors]
        first, last = (sum(errors[i] for errors in found) / len(found) for i in (0, 1))
        loss = f"relative error of a decoder layer's output, mean {first:.4f} -> {last:.4f}"
    elif result["last_loss"] is not None:
        loss = f"KL to the dense model {result['first_loss']:.4f} -> {result['last_loss']:.4f} nats"
    return (
        f"{result['out']}: {result['settings']['steps']} steps, {result['tokens']} tokens, "
        f"{result['seconds']:.0f} s\n{loss}\n"
        f"next: spense verify {result['out']}; spense eval {result['out']}"
    )
