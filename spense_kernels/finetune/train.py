# SPDX-License-Identifier: Apache-2.0
"""The training loop, on Hugging Face accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError, SpenseError
from spense_kernels.finetune.config import FinetuneConfig
from spense_kernels.finetune.loss import distillation_loss
from spense_kernels.finetune.student import student_layers
from spense_kernels.models import need
from spense_kernels.prune.calibrate import check_calibration
from spense_kernels.prune.store import model_fingerprint, tensor_digest, write_atomic

WARM_STEPS, TIMED_STEPS = 3, 5  # before a run that has a time to keep
_SPARE = 0.02  # share of that time for what the timed steps do not show


@dataclass
class FinetuneReport:
    """What a fine-tune did.

    Attributes:
        config: settings used; with a time to keep, the steps that fit.
        losses: mean KL in nats of every step of this call.
        first_step: where this call went on.
        seconds: wall-clock time of this call.
        tokens: token positions that this call trained on.
    """

    config: FinetuneConfig
    losses: list[float] = field(default_factory=list)
    first_step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def to_json(self) -> dict:
        return {**vars(self), "config": self.config.to_json()}


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    config: FinetuneConfig | None = None,
    *,
    accelerator=None,
    work_dir=None,
    progress=None,
    max_seconds: float | None = None,
) -> FinetuneReport:
    """Fit the student's predictions to the teacher's; weights change in place, masks never.

    Args:
        student: causal LM with StudentLinear (see make_student).
        teacher: the dense model, same vocabulary.
        windows: int64 [S, L] tokens, taken in a shuffled order again and again.
        config: settings; None for the defaults.
        accelerator: accelerate.Accelerator that says on which devices; None makes one.
        work_dir: folder for the saved state. A second call with the same student, windows and
            settings goes on from there and takes the same steps; None keeps nothing.
        progress: object with start(stage, total), advance(count), finish(), or None.
        max_seconds: take as many steps as fit in this time, whatever `config.steps` says, with the
            learning rate's whole schedule over them. Some steps are timed first, without a change
            to the weights; a run that goes on from a work_dir keeps its number of steps. None:
            `config.steps` steps.

    Raises PruneError when there is nothing to train, for max_seconds that is not above 0, and for a
    work_dir of another run; SpenseError when the loss is no longer finite.
    """
    config = config or FinetuneConfig()
    check_calibration(windows)
    if max_seconds is not None and not max_seconds > 0:
        raise PruneError(f"finetune: max_seconds must be above 0, got {max_seconds}")
    if not student_layers(student):
        raise PruneError("finetune: the model holds no StudentLinear; call make_student first")
    need("accelerate")
    if accelerator is None:
        import accelerate

        accelerator = accelerate.Accelerator()
    run = _Run(student, teacher, windows, config, accelerator, work_dir, max_seconds)
    return run.train(progress)


class _Run:
    def __init__(self, student, teacher, windows, config, accelerator, work_dir, max_seconds):
        self.begin = time.monotonic()
        self.config, self.windows, self.accelerator = config, windows, accelerator
        self.max_seconds, self.folder = max_seconds, None
        if work_dir is not None:
            fingerprint = _fingerprint(student, windows, config, max_seconds)
            self.folder = _State(Path(work_dir), fingerprint)
        self.teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        student = student.to(accelerator.device)
        weights = [layer.weight for layer in student_layers(student).values()]
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(
            weights, lr=config.lr, betas=config.betas, fused=accelerator.device.type == "cuda"
        )
        self.plain = student
        self.student, self.optimizer = accelerator.prepare(student, optimizer)

    def train(self, progress) -> FinetuneReport:
        first, steps = 0, None
        if self.folder is not None:
            first, steps = self.folder.load(self.accelerator)
        if self.max_seconds is not None:
            steps = steps or self._steps_that_fit()
            warmup = min(self.config.warmup, steps // 5)
            self.config = dataclasses.replace(self.config, steps=steps, warmup=warmup)
        config, report = self.config, FinetuneReport(self.config, first_step=first)
        if progress is not None:
            progress.start("fine-tune", config.steps)
            progress.advance(first)
        losses = []
        for step in range(first, config.steps):
            losses.append(self._step(step, config.lr * config.share(step)))
            report.tokens += config.batch * (self.windows.shape[1] - 1)
            done = step + 1
            if self.folder is not None and (done % config.save_every == 0 or done == config.steps):
                self.folder.save(self.accelerator, done, config.steps)
            if progress is not None:
                progress.advance()
        if progress is not None:
            progress.finish()
        report.losses = [float(loss) for loss in losses]
        report.seconds = time.monotonic() - self.begin
        return report

    def _steps_that_fit(self) -> int:
        """Steps in the time that is left, by the median of some that change no weight."""
        seconds = []
        for step in range(WARM_STEPS + TIMED_STEPS):
            begin = time.monotonic()
            float(self._step(step, 0.0))  # waits for the device
            seconds.append(time.monotonic() - begin)
        self.optimizer.state.clear()
        left = self.max_seconds * (1.0 - _SPARE) - (time.monotonic() - self.begin)
        fitting = torch.tensor([int(left / statistics.median(seconds[WARM_STEPS:]))])
        # The slowest process decides.
        return max(1, int(self.accelerator.gather(fitting.to(self.accelerator.device)).min()))

    def _step(self, step: int, lr: float) -> Tensor:
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ids = self.windows[self._rows(step)]
        mine = ids[accelerator.process_index :: accelerator.num_processes]
        parts = mine.split(config.micro_batch or max(1, len(mine)))
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(parts):
            loss = self._loss(part.to(accelerator.device)) * (len(part) / len(mine))
            if i + 1 < len(parts) and accelerator.num_processes > 1:
                with accelerator.no_sync(self.student):
                    accelerator.backward(loss)
            else:
                accelerator.backward(loss)
            total += loss.detach()
        if config.clip:
            accelerator.clip_grad_norm_(self.student.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step % 50 == 0 and not bool(torch.isfinite(total)):
            raise SpenseError(f"finetune: the loss of step {step} is {float(total)}")
        return total

    def _loss(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        # Through the wrapper's forward when there is one, so that it sees the gradients.
        hidden = self._hidden(ids)
        return distillation_loss(
            self.plain, self.teacher, hidden[:, :-1].flatten(0, 1), target[:, :-1].flatten(0, 1)
        )

    def _hidden(self, ids: Tensor) -> Tensor:
        if self.student is self.plain:
            return self.plain.base_model(input_ids=ids, use_cache=False).last_hidden_state
        out = self.student(
            input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        return out.hidden_states[-1]

    def _rows(self, step: int) -> Tensor:
        """Windows of a step: one shuffled pass after another, the same on every process."""
        count, batch = self.windows.shape[0], self.config.batch
        places = torch.arange(step * batch, (step + 1) * batch)
        rows = []
        for epoch in sorted(set((places // count).tolist())):
            seed = (self.config.seed << 20) + epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            rows.append(order[places[places // count == epoch] % count])
        return torch.cat(rows)


def _fingerprint(student: nn.Module, windows: Tensor, config: FinetuneConfig, seconds) -> str:
    parts = [config.fingerprint(), model_fingerprint(student), tensor_digest(windows)]
    if seconds is not None:
        parts.append(f"{seconds:g} s")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _State:
    """The newest saved state in a folder, and which run it belongs to."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.mark = folder / "finetune.json"
        if self.mark.exists():
            if self._read().get("fingerprint") != fingerprint:
                raise PruneError(
                    f"finetune: work_dir {folder} belongs to another model, text or setting; "
                    "name an empty folder"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise PruneError(f"finetune: work_dir {folder} must be empty")
        folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> dict:
        return json.loads(self.mark.read_text(encoding="utf-8"))

    def load(self, accelerator) -> tuple[int, int | None]:
        """Load the state, if there is one: the step to go on with, and steps in all (or None)."""
        if not self.mark.exists():
            return 0, None
        found = self._read()
        accelerator.load_state(str(self.folder / f"step_{found['step']:06d}"))
        return found["step"], found["steps"]

    def save(self, accelerator, step: int, steps: int) -> None:
        """Write the new state beside the old one, then name it, then drop the old one."""
        accelerator.save_state(str(self.folder / f"step_{step:06d}"))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        text = json.dumps({"fingerprint": self.fingerprint, "step": step, "steps": steps}).encode()
        write_atomic(self.mark, lambda file: file.write(text))
        for old in self.folder.glob("step_*"):
            if old.name != f"step_{step:06d}":
                for path in sorted(old.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                old.rmdir()
