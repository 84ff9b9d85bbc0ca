# SPDX-License-Identifier: Apache-2.0
"""The training loop, on Hugging Face accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError, SpenseError
from spense_kernels.finetune.attention import causal_windows
from spense_kernels.finetune.batches import Batches
from spense_kernels.finetune.config import FinetuneConfig
from spense_kernels.finetune.fuse import fused_norms, fused_rotary
from spense_kernels.finetune.loss import distillation_loss
from spense_kernels.finetune.report import Report
from spense_kernels.finetune.student import compiled_layers, student_layers
from spense_kernels.finetune.teacher import TeacherStates, last_hidden, without_waiting
from spense_kernels.models import need
from spense_kernels.prune.calibrate import check_calibration
from spense_kernels.prune.graph import Replayed
from spense_kernels.prune.store import model_fingerprint, tensor_digest, write_text

# Steps before `minutes` is turned into steps; the first ones also compile, allocate and capture.
_UNTIMED, _TIMED = 2, 4


@dataclass
class FinetuneReport(Report):
    """What a fine-tune did.

    Attributes:
        config: settings used; with `minutes`, `steps` and `warmup` as they were fitted.
        losses: mean KL in nats of every step of this call.
        first_step: where this call went on.
        seconds: wall-clock time of this call.
        tokens: token positions that this call trained on.
    """

    losses: list[float] = field(default_factory=list)
    first_step: int = 0


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
        max_seconds: end the run early, learning rate as it stands then; None for no limit.

    Raises PruneError when there is nothing to train, and for a work_dir of another run;
    SpenseError when the loss is no longer finite.
    """
    config = config or FinetuneConfig()
    check_calibration(windows)
    if not student_layers(student):
        raise PruneError("finetune: the model holds no StudentLinear; call make_student first")
    need("accelerate")
    if accelerator is None:
        import accelerate

        accelerator = accelerate.Accelerator()
    return _Run(student, teacher, windows, config, accelerator, work_dir).train(
        progress, max_seconds
    )


class _Run:
    def __init__(self, student, teacher, windows, config, accelerator, work_dir):
        self.config, self.windows, self.accelerator = config, windows, accelerator
        self.folder = None
        if work_dir is not None:
            self.folder = _State(Path(work_dir), _fingerprint(student, windows, config))
        self.device = accelerator.device
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        student = student.to(self.device)
        self.weights = weights = [layer.weight for layer in student_layers(student).values()]
        self.start = []
        if config.interpolation < 1.0:
            self.start = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        cuda = self.device.type == "cuda"
        self.compiled = cuda and config.compile
        graph = cuda and config.graph and accelerator.num_processes == 1
        # A graph reads the learning rate from the device.
        self.rate = torch.tensor(config.lr, device=self.device) if graph else None
        optimizer = torch.optim.Adam(
            weights, lr=config.lr, betas=config.betas, fused=cuda, capturable=graph
        )
        self.plain = student
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.update = Replayed(self._update, "finetune: steps") if graph else self._update
        self.batches = Batches(windows, config)
        again = config.minutes is not None or config.steps * config.batch > windows.shape[0]
        self.states = TeacherStates(
            self.teacher, windows, self.device, again and not self.batches.changed
        )

    def train(self, progress, max_seconds) -> FinetuneReport:
        """Take the steps that are left."""
        with ExitStack() as stack:
            # It holds this object and gigabytes: they must go with the last reference.
            stack.callback(lambda: setattr(self, "update", None))
            stack.enter_context(causal_windows(self.plain, self.teacher))
            if self.compiled:
                stack.enter_context(fused_norms(self.plain, self.teacher))
                stack.enter_context(fused_rotary(self.plain))
                stack.enter_context(compiled_layers(self.plain))
            return self._train(progress, max_seconds)

    def _train(self, progress, max_seconds) -> FinetuneReport:
        config, report, fitted = self.config, FinetuneReport(self.config), None
        if self.folder is not None:
            report.first_step, fitted = self.folder.load(self.accelerator)
            if fitted is not None:
                config = self.config = dataclasses.replace(config, **fitted)
        clock = None if config.minutes is None or fitted is not None else _Clock(config.minutes)
        if progress is not None:
            progress.start("fine-tune", config.steps)
            progress.advance(report.first_step)
        begin = time.monotonic()
        if self.states.kept and self.device.type == "cuda":
            self.states.fill()
        losses = []
        step = report.first_step
        while step < self.config.steps or clock is not None:
            losses.append(self._step(step))
            report.tokens += config.batch * (self.windows.shape[1] - 1)
            step = done = step + 1
            if clock is not None and clock.ready(losses):
                config = self.config = clock.fit(config, done, self.accelerator)
                clock, fitted = None, {"steps": config.steps, "warmup": config.warmup}
                if progress is not None:
                    progress.start("fine-tune", config.steps)
                    progress.advance(done - 1)
            if self.folder is not None and (done % config.save_every == 0 or done == config.steps):
                self.folder.save(self.accelerator, done, fitted)
            if progress is not None:
                progress.advance()
            if max_seconds is not None and time.monotonic() - begin > max_seconds:
                break
        self._interpolate()
        if progress is not None:
            progress.finish()
        report.config = self.config
        report.losses = [float(loss) for loss in losses]
        report.seconds = time.monotonic() - begin
        return report

    @torch.no_grad()
    def _interpolate(self) -> None:
        """Go back some of the way to the start; saved states are of the way itself."""
        for weight, start in zip(self.weights, self.start, strict=bool(self.start)):
            weight.copy_(start.lerp(weight, self.config.interpolation))

    def _step(self, step: int) -> Tensor:
        rate = self.config.lr * self.config.share(step)
        if self.rate is not None:
            rate = self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.batches.rows(step)
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        inputs = [without_waiting(self.batches.ids(step, rows)[mine], self.device)]
        if self.states.kept:
            inputs.append(self.states.of(rows[mine]))
        total = self.update(*inputs)
        if step % 50 == 0 and not bool(torch.isfinite(total)):
            raise SpenseError(f"finetune: the loss of step {step} is {float(total)}")
        return total

    def _update(self, ids: Tensor, target: Tensor | None = None) -> Tensor:
        """One step of the optimiser on windows [B, L]; their mean loss.

        Args:
            target: the teacher's last hidden states [B, L, D], or None to work them out.
        """
        config, accelerator = self.config, self.accelerator
        size = config.micro_batch or max(1, len(ids))
        starts = range(0, len(ids), size)
        total = torch.zeros((), device=self.device)
        for start in starts:
            part = slice(start, start + size)
            wanted = None if target is None else target[part]
            loss = self._loss(ids[part], wanted) * (len(ids[part]) / len(ids))
            if start != starts[-1] and accelerator.num_processes > 1:
                with accelerator.no_sync(self.student):
                    accelerator.backward(loss)
            else:
                accelerator.backward(loss)
            total += loss.detach()
        if config.clip:
            accelerator.clip_grad_norm_(self.student.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, ids: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            with torch.no_grad():
                target = last_hidden(self.teacher, ids)
        # Through the wrapper's forward when there is one, so that it sees the gradients.
        hidden = self._hidden(ids)
        return distillation_loss(
            self.plain, self.teacher, hidden[:, :-1].flatten(0, 1), target[:, :-1].flatten(0, 1),
            compiled=self.compiled,
        )  # fmt: skip

    def _hidden(self, ids: Tensor) -> Tensor:
        if self.student is self.plain:
            return last_hidden(self.plain, ids)
        out = self.student(
            input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        return out.hidden_states[-1]


class _Clock:
    """Times the first steps of a run whose length is given in minutes."""

    def __init__(self, minutes: float):
        self.start = time.monotonic()
        self.end = self.start + 60.0 * minutes

    def ready(self, losses: list[Tensor]) -> bool:
        """Call after every step: whether enough steps were timed."""
        if len(losses) not in (_UNTIMED, _UNTIMED + _TIMED):
            return False
        float(losses[-1])  # waits for the device
        if len(losses) == _UNTIMED:
            self.start = time.monotonic()
        return len(losses) != _UNTIMED

    def fit(self, config: FinetuneConfig, done: int, accelerator) -> FinetuneConfig:
        """The settings with the steps that fit, the same on every process."""
        now = time.monotonic()
        times = torch.tensor([(now - self.start) / _TIMED, self.end - now])
        seconds, left = accelerator.reduce(times.to(accelerator.device), "mean").tolist()
        return config.fitted(done, seconds, left)


def _fingerprint(student: nn.Module, windows: Tensor, config: FinetuneConfig) -> str:
    parts = (config.fingerprint(), model_fingerprint(student), tensor_digest(windows))
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

    def load(self, accelerator) -> tuple[int, dict | None]:
        """Load the state, if there is one; the step to go on with and the settings fitted."""
        if not self.mark.exists():
            return 0, None
        known = self._read()
        step = known["step"]
        accelerator.load_state(str(self.folder / f"step_{step:06d}"))
        return step, known["fitted"]

    def save(self, accelerator, step: int, fitted: dict | None) -> None:
        """Write the new state beside the old one, then name it, then drop the old one."""
        accelerator.save_state(str(self.folder / f"step_{step:06d}"))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        state = {"fingerprint": self.fingerprint, "step": step, "fitted": fitted}
        write_text(self.mark, json.dumps(state))
        for old in self.folder.glob("step_*"):
            if old.name != f"step_{step:06d}":
                for path in sorted(old.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                old.rmdir()
