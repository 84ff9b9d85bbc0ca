# SPDX-License-Identifier: Apache-2.0
"""All rivals of one layer, made when they are first needed; what cannot run is named once."""

from __future__ import annotations

from collections.abc import Callable

from gemm.ceiling import RINGS, Copy
from gemm.rivals import BFloat16, CublasLt, CusparseLt, Spense, TwoLibrary
from gemm.shapes import Layer
from gemm.timing import Call, Recorder
from spense_kernels.format import Split

RIVALS = (
    "spense",
    "spense_promoted",  # fast_accum=False
    "cublas_tensor",
    "cublas_row",
    "bf16",
    "cusparselt",
    "two_library",
    "two_library_add",
    *RINGS,
)
CPU_RIVALS = ("spense", "cublas_tensor", "bf16")  # what has a CPU twin, for trying the logic
SEARCH_COPIES = 4
SPARSE_COLUMNS = 64  # cuSPARSELt's part is a multiple of this many columns


class Workload:
    """The rivals of a layer, on the same device and in the same run."""

    def __init__(self, layer: Layer, recorder: Recorder, names: list[str]):
        unknown = sorted(set(names) - set(RIVALS))
        if unknown:
            raise SystemExit(f"--only: expected some of {', '.join(RIVALS)}, got {unknown[0]}")
        on_cpu = recorder.device.type == "cpu"
        self.names = [name for name in names if not on_cpu or name in CPU_RIVALS]
        self.layer, self.recorder = layer, recorder
        self._made: dict[str, object] = {}
        self._failed: set[str] = set()
        self.split: Split | None = None
        self.d = 0.0

    def set_dense(self, d: float) -> None:
        """Drops what depends on the dense fraction and takes a new one."""
        self.d, self.split = d, Split.from_fraction(self.layer.n, self.layer.k, d)
        for name in ("spense", "sparse_part", "dense_part"):
            self._made.pop(name, None)

    def calls(self, m: int) -> dict[str, list[Call]]:
        """One call a copy of the weight, for every rival that runs here."""
        makers: dict[str, Callable[[], list[Call]]] = {
            "spense": lambda: self._spense().calls(m),
            "spense_promoted": lambda: self._spense().calls(m, fast_accum=False),
            "cublas_tensor": lambda: self._dense(False).calls(m),
            "cublas_row": lambda: self._dense(True).calls(m),
            "bf16": lambda: self._get("bf16", BFloat16).calls(m),
            "cusparselt": lambda: self._get("cusparselt", CusparseLt, best=self._best).calls(m),
            "two_library": lambda: self._two(False).calls(m),
            "two_library_add": lambda: self._two(True).calls(m),
            **{ring: lambda ring=ring: Copy(self._spense(), ring).calls(m) for ring in RINGS},
        }
        found = {}
        for name in self.names:
            if not self._meant(name):
                continue
            if name.startswith("spense"):  # a failure of ours is one of the run
                found[name] = makers[name]()
                continue
            try:
                found[name] = makers[name]()
                found[name][0]()
            except (RuntimeError, AttributeError, TypeError, ValueError) as problem:
                found.pop(name, None)
                if name not in self._failed:
                    print(f"{self.layer.label}, M = {m}: no {name}: {problem!r:.300}")
                self._failed.add(name)
        return found

    def _meant(self, name: str) -> bool:
        """Two libraries make sense only where both have work."""
        return not name.startswith("two_library") or 0 < self._sparse_columns() < self.layer.k

    def _sparse_columns(self) -> int:
        exact = self.layer.k - self.split.widths[0]
        return round(exact / SPARSE_COLUMNS) * SPARSE_COLUMNS

    def _get(self, key: str, make: type, **kwargs) -> object:
        if key not in self._made:
            self._made[key] = make(self.layer, device=self.recorder.device, **kwargs)
        return self._made[key]

    def _spense(self) -> Spense:
        return self._get("spense", Spense, d=self.d)

    def _dense(self, by_row: bool) -> CublasLt:
        return self._get(f"cublas {by_row}", CublasLt, by_row=by_row)

    def _two(self, add: bool) -> TwoLibrary:
        columns = self._sparse_columns()
        sparse = self._get("sparse_part", CusparseLt, best=self._best, columns=columns)
        if "dense_part" not in self._made:
            rest = Layer("", "", self.layer.n, self.layer.k - columns)
            self._made["dense_part"] = CublasLt(rest, self.recorder.device, by_row=False)
        return TwoLibrary(sparse, self._made["dense_part"], add)

    def _best(self, choices: list[list[Call]]) -> int:
        """The fastest of several ways to the same product, over a few copies of the weight."""
        few = [calls[:SEARCH_COPIES] for calls in choices]
        recordings = {str(i): self.recorder.record(c, len(c)) for i, c in enumerate(few)}
        times = self.recorder.measure(recordings, seconds=0, min_rounds=3)
        return min(range(len(choices)), key=lambda i: times[str(i)]["us"])
