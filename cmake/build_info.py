# SPDX-License-Identifier: Apache-2.0
"""Writes build.json: build_info.py OUT key=value... [--library libspense_cuda.so]

With a library, counts the kernels of each architecture in it and fails when one of `archs` has
none. The count reads the library's own .nv_fatbin section, so it needs no CUDA tools.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

FATBIN_MAGIC = 0xBA55ED50
KIND_ELF = 2


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every section of a 64-bit little-endian ELF file."""
    offset, size, count, names_at = (
        *struct.unpack_from("<Q", elf, 40),
        *struct.unpack_from("<HHH", elf, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(count)]
    names = headers[names_at][4]
    for name, kind, _, _, start, length in headers:
        end = elf.index(b"\0", names + name)
        content = b"" if kind == 8 else elf[start : start + length]  # 8: occupies no file space
        yield elf[names + name : end].decode(), content


def cubins(fatbin: bytes) -> Iterator[tuple[int, bytes]]:
    """(architecture number, ELF image) of every device binary in a .nv_fatbin section."""
    at = 0
    while (at := fatbin.find(struct.pack("<I", FATBIN_MAGIC), at)) >= 0:
        _, _, header, length = struct.unpack_from("<IHHQ", fatbin, at)
        entry, end = at + header, at + header + length
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", fatbin, entry)
            (arch,) = struct.unpack_from("<I", fatbin, entry + 28)
            if kind == KIND_ELF:
                start = entry + entry_header
                yield arch, fatbin[start : start + payload]
            entry += entry_header + payload
        at = end


def kernels_by_arch(library: Path) -> dict[str, list[str]]:
    """Mangled names of the kernels for each architecture number ("90"), sorted."""
    found: dict[str, set[str]] = {}
    for name, content in sections(library.read_bytes()):
        if name != ".nv_fatbin":
            continue
        for arch, image in cubins(content):
            kernels = found.setdefault(str(arch), set())
            if image[:4] != b"\x7fELF":
                raise SystemExit(f"{library}: a device binary is compressed; cannot count kernels")
            kernels.update(s[6:] for s, _ in sections(image) if s.startswith(".text."))
    return {arch: sorted(names) for arch, names in found.items()}


def main(out: str, *words: str) -> None:
    library = None
    facts: dict[str, object] = {}
    rest = iter(words)
    for word in rest:
        if word == "--library":
            library = Path(next(rest))
        else:
            key, _, value = word.partition("=")
            facts[key] = value or None
    archs = str(facts["archs"] or "").split(";") if facts["archs"] else []
    facts["archs"] = archs
    kernels = kernels_by_arch(library) if library else {}
    facts["kernels"] = {arch: kernels.get(arch.rstrip("af"), []) for arch in archs}
    missing = [arch for arch, names in facts["kernels"].items() if not names]
    if missing:
        raise SystemExit(f"spense_kernels: no kernel was built for {', '.join(missing)}")
    Path(out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
