# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end."""

from __future__ import annotations

import gc

import torch

from spense_kernels import checkpoint, evaluate
from spense_kernels.demo import facts, plot
from spense_kernels.demo import report as report_module
from spense_kernels.demo.layers import layer_records, totals
from spense_kernels.demo.settings import DemoSettings
from spense_kernels.demo.steps import Steps, current_rss_bytes, say
from spense_kernels.demo.worker import run_in_new_process
from spense_kernels.errors import UserError
from spense_kernels.models import LoadedModel, load_dense, need
from spense_kernels.progress import Bars, bar
from spense_kernels.prune import PruneConfig, collect_statistics, prune_model, shallow_clone


def run_demo(settings: DemoSettings) -> dict:
    """Run every step of the demo and write report.json, report.png and checkpoint/ to out.

    Returns the report. Raises UserError for a bad text, PruneError when the model cannot be
    pruned, SpenseError when the hybrid layers did not all run through the op.
    """
    need("matplotlib", extra="demo")  # now, not when the report is drawn
    return _Demo(settings).run()


class _Demo:
    def __init__(self, settings: DemoSettings):
        self.settings = settings
        self.steps = Steps(total=8)
        self.methods: list[dict] = []
        self.config = PruneConfig(
            dense_fraction=settings.dense_fraction, seed=settings.seed, **settings.pruner
        )

    def run(self) -> dict:
        with self.steps.step(f"load {self.settings.model}"):
            self.loaded = self._load()
            self.facts = facts.model_facts(self.loaded)
        with self.steps.step("read text"):
            self._read_text()
        with self.steps.step("original: perplexity and continuations"):
            self.original = self._perplexity(self.loaded.model, "original")
            self.samples = self._continuations()
            self._add("original", "original", self.original, facts.dense_sizes(self.loaded.model))
        with self.steps.step(f"calibrate on {self.calibration.numel():,} tokens"):
            self.statistics = self._collect()
        with self.steps.step("FP8 dense: convert, perplexity"):
            self._variant("fp8", "FP8 dense", 1.0)
        with self.steps.step("pure 2:4: prune, perplexity"):
            self._variant("sparse", "pure 2:4", 0.0)
        with self.steps.step(f"hybrid at {self.settings.dense_fraction:.0%} dense: prune, save"):
            layers = self._hybrid()
        with self.steps.step("hybrid: load the checkpoint in a new process, perplexity"):
            answer = self._new_process()
        report = self._report(layers, answer)
        report_module.write_json(report, self.settings.out / "report.json")
        plot.write_png(report, self.settings.out / "report.png")
        return report

    def _load(self) -> LoadedModel:
        loaded = load_dense(self.settings.model)
        if loaded.licence_notice:
            say("\n" + loaded.licence_notice + "\n")
        return loaded

    def _read_text(self) -> None:
        settings = self.settings
        corpus = evaluate.files(settings.text) if settings.text else evaluate.python_docs()
        tokenizer, length = self.loaded.tokenizer, settings.length
        calibration = evaluate.windows(tokenizer, corpus.calibration, length)
        test = evaluate.windows(tokenizer, corpus.test, length)
        for name, windows in (("calibration", calibration), ("test", test)):
            if windows.shape[0] < 2:
                raise UserError(
                    f"demo: the {name} part of {corpus.name} has {windows.shape[0]} windows of "
                    f"{length} tokens, expected at least 2: give more text"
                )
        self.corpus = corpus
        self.calibration = evaluate.pick(calibration, settings.calibration_windows, settings.seed)
        self.test = evaluate.pick(test, settings.test_windows)
        say(
            f"      {corpus.name}: {self.calibration.numel():,} calibration tokens, "
            f"{self.test.shape[0] * (length - 1):,} test tokens"
        )
        if self.test.shape[0] < settings.test_windows:
            say(f"      note: the text is short, {settings.test_windows} test windows were wanted")

    def _perplexity(self, model, label: str) -> dict:
        with bar(self.test.shape[0], f"perplexity, {label}") as progress:
            return evaluate.perplexity(model, self.test, progress=progress.update)

    def _continuations(self) -> list[str]:
        texts = []
        with bar(len(self.settings.prompts), "continuations, original") as progress:
            for prompt in self.settings.prompts:
                model, tokenizer = self.loaded.model, self.loaded.tokenizer
                texts.append(evaluate.generate(model, tokenizer, prompt, self.settings.new_tokens))
                progress.update(1)
        return texts

    def _collect(self):
        with Bars() as bars:
            return collect_statistics(
                self.loaded.model, self.calibration, self.config, progress=bars
            )

    def _pruned_copy(self, dense_fraction: float):
        """A pruned copy of the model (it shares what is not pruned) and the pruner's report."""
        pruned = shallow_clone(self.loaded.model)
        config = self.config.replace(dense_fraction=dense_fraction)
        with Bars() as bars:
            report = prune_model(
                pruned, self.calibration, config, statistics=self.statistics, progress=bars
            )
        return pruned, report

    def _variant(self, key: str, label: str, dense_fraction: float) -> None:
        pruned, _ = self._pruned_copy(dense_fraction)
        self._add(key, label, self._perplexity(pruned, label), totals(pruned))
        del pruned
        gc.collect()

    def _hybrid(self) -> list[dict]:
        pruned, report = self._pruned_copy(self.settings.dense_fraction)
        self.statistics = None
        errors = {m.name: m.relative_error for m in report.modules}
        records = layer_records(pruned, errors)
        self.checkpoint = self.settings.out / "checkpoint"
        self.settings.out.mkdir(parents=True, exist_ok=True)
        provenance = facts.provenance(report, self.facts["source"], self._text())
        checkpoint.save_checkpoint(
            pruned,
            self.checkpoint,
            tokenizer=self.loaded.tokenizer,
            provenance=provenance,
            overwrite=self.settings.force,
        )
        return records

    def _new_process(self) -> dict:
        self.loaded.model = None
        gc.collect()
        answer = run_in_new_process(
            {
                "checkpoint": str(self.checkpoint),
                "dtype": self.facts["dtype"],
                "threads": torch.get_num_threads(),
                "windows": self.test.tolist(),
                "prompts": list(self.settings.prompts),
                "new_tokens": self.settings.new_tokens,
            }
        )
        self.steps.child(answer["peak_bytes"], current_rss_bytes())
        self._add("hybrid", "hybrid", answer["perplexity"], answer["sizes"])
        return answer

    def _add(self, key: str, label: str, result: dict, sizes: dict) -> None:
        baseline = self.methods[0] if self.methods else None
        above = evaluate.paired_difference(result, baseline) if baseline else None
        model_bytes = sizes["linear_bytes_per_token"] + self.facts["lm_head_bytes"]
        self.methods.append(
            {
                "key": key,
                "label": label,
                **result,
                "above_original": above,
                **sizes,
                "model_bytes_per_token": model_bytes,
            }
        )
        text = report_module.plus_minus(result["ppl"], result["ppl_stderr"])
        say(f"      {label}: perplexity {text}")

    def _text(self) -> dict:
        settings = self.settings
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "calibration_tokens": self.calibration.numel(),
            "test_tokens": self.test.shape[0] * (settings.length - 1),
            "window": settings.length,
            "seed": settings.seed,
        }

    def _report(self, layers: list[dict], answer: dict) -> dict:
        triples = zip(self.settings.prompts, self.samples, answer["continuations"], strict=True)
        return {
            "report": "spense demo",
            "version": report_module.REPORT_VERSION,
            "created": facts.now(),
            "short": self.settings.short,
            "model": self.facts,
            "text": self._text(),
            "settings": self.config.to_json(),
            "machine": facts.machine(),
            "software": facts.software(),
            "methods": self.methods,
            "continuations": [
                {"prompt": prompt, "original": original, "hybrid": hybrid}
                for prompt, original, hybrid in triples
            ],
            "ops": answer["ops"],
            "checkpoint_bytes": sum(p.stat().st_size for p in self.checkpoint.iterdir()),
            "steps_seconds": {name: round(t, 1) for name, t in self.steps.seconds.items()},
            "total_seconds": round(self.steps.total_seconds, 1),
            "peak_memory_bytes": self.steps.peak_bytes,
            "layers": layers,
        }
