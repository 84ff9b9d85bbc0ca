# SPDX-License-Identifier: Apache-2.0
"""All rivals of one layer, made when they are first needed; what cannot run is named once."""

from __future__ import annotations

from collections.abc import Callable, Collection

from gemm.ceiling import Copy
from gemm.copy_stream import RINGS
from gemm.lost import DeviceLost, usable
from gemm.rivals import BFloat16, CublasLt, CusparseLt, Spense, TwoLibrary, sparse_columns
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
# What a dense fraction other than the main one adds: only the rivals that its targets name.
MAIN_DENSE = 0.25
AT_DENSE = {0.0: ("cusparselt",), 1.0: ("cublas_row",)}
BETWEEN = ("two_library", "two_library_add")
COPY_TOKENS = 64  # above, nothing is bound by the copy


class Workload:
    """The rivals of a layer, on the same device and in the same run."""

    def __init__(
        self,
        layer: Layer,
        recorder: Recorder,
        names: list[str],
        every_rival: bool = False,
        avoid: Collection[str] = (),
    ):
        unknown = sorted(set(names) - set(RIVALS))
        if unknown:
            raise SystemExit(f"--only: expected some of {', '.join(RIVALS)}, got {unknown[0]}")
        on_cpu = recorder.device.type == "cpu"
        self.names = [name for name in names if not on_cpu or name in CPU_RIVALS]
        self.layer, self.recorder, self.every_rival = layer, recorder, every_rival
        self.avoid = avoid  # of cuSPARSELt's shapes and algorithms
        self._made: dict[str, object] = {}
        self.missing: dict[str, str] = {}  # rival -> why, where it first failed
        self._gone: set[str] = set()  # not tried again
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
            "cublas_tensor": lambda: self._get("cublas", CublasLt).calls(m),
            "cublas_row": lambda: self._get("cublas", CublasLt).calls(m, by_row=True),
            "bf16": lambda: self._get("bf16", BFloat16).calls(m),
            "cusparselt": lambda: self._sparse("cusparselt", None).calls(m),
            "two_library": lambda: self._two(False).calls(m),
            "two_library_add": lambda: self._two(True).calls(m),
            **{ring: lambda ring=ring: Copy(self._spense(), ring).calls(m) for ring in RINGS},
        }
        found = {}
        for name in self.meant(m):
            if name.startswith("spense"):  # a failure of ours is one of the run
                found[name] = makers[name]()
                continue
            try:
                found[name] = makers[name]()
                found[name][0]()
            except DeviceLost:
                raise
            except Exception as problem:  # whatever a library comes up with, the sweep goes on
                found.pop(name, None)
                self.note(name, m, problem)
            self.check()
        return found

    def check(self) -> None:
        """Raises lost.DeviceLost where cuSPARSELt ran and the GPU takes no more calls."""
        if usable(self.recorder.device):
            return
        shapes = [x.shape for x in self._made.values() if isinstance(x, CusparseLt)]
        if shapes:
            raise DeviceLost(shapes)
        raise RuntimeError(f"{self.layer.label}: the GPU takes no more calls")

    def note(self, name: str, m: int, problem: Exception) -> None:
        """Says once that a rival does not run."""
        if name not in self.missing:
            self.missing[name] = f"M = {m}, {self.d:.1%} dense: {problem!r:.300}"
            print(f"{self.layer.label}: no {name}: {self.missing[name]}", flush=True)

    def give_up(self, name: str, m: int, problem: Exception) -> None:
        """Leaves a rival out from here on that ran, but could not be recorded."""
        self.note(name, m, problem)
        self._gone.add(name)

    def meant(self, m: int) -> list[str]:
        """The rivals that are timed at m tokens and the dense fraction that was set."""
        return [name for name in self.names if name not in self._gone and self._meant(name, m)]

    def _meant(self, name: str, m: int) -> bool:
        """Two libraries make sense only where both have work, a copy where bytes are the limit."""
        if name.startswith("two_library") and not 0 < sparse_columns(self.split) < self.layer.k:
            return False
        if name in RINGS and m > COPY_TOKENS:
            return False
        if self.d == MAIN_DENSE or self.every_rival:
            return True
        return name in ("spense", "cublas_tensor", *AT_DENSE.get(self.d, BETWEEN))

    def _get(self, key: str, make: type, **kwargs) -> object:
        if key not in self._made:
            self._made[key] = make(self.layer, device=self.recorder.device, **kwargs)
        return self._made[key]

    def _spense(self) -> Spense:
        return self._get("spense", Spense, d=self.d)

    def _two(self, add: bool) -> TwoLibrary:
        columns = sparse_columns(self.split)
        sparse = self._sparse("sparse_part", columns)
        if "dense_part" not in self._made:
            rest = Layer("", "", self.layer.n, self.layer.k - columns)
            self._made["dense_part"] = CublasLt(rest, self.recorder.device)
        return TwoLibrary(sparse, self._made["dense_part"], add)

    def _sparse(self, key: str, columns: int | None) -> CusparseLt:
        more = {"quick": self._quick, "columns": columns, "avoid": self.avoid}
        return self._get(key, CusparseLt, **more)

    def _quick(self, choices: list[list[Call]]) -> list[float]:
        return self.recorder.quick(choices)
