# SPDX-License-Identifier: Apache-2.0
"""Faults put into the SM100 kernel, one at a time. The model must notice each of them."""

from __future__ import annotations

from typing import NamedTuple

ONE = "t128x16_g1_s4x14_o2"
FOUR = "t128x64_g1_s6x12_o1"
PAIR = "t256x192_g2_s5x9_o1"


class Mutation(NamedTuple):
    name: str
    file: str  # below csrc
    old: str  # occurs once
    new: str
    config: str = ONE
    reason: str = ""  # of an equivalent one


LOADERS, MAINLOOP, EPILOGUE = "sm100/loaders.cuh", "sm100/mainloop.cuh", "sm100/epilogue.cuh"
KERNEL, TRAITS, MMA, LAUNCH = (
    "sm100/kernel.cuh",
    "sm100/traits.cuh",
    "sm100/mma.cuh",
    "sm100/launch.cpp",
)
BUDGET, SCHEDULE, STREAM = "heuristics/sm100.h", "heuristics/schedule.h", "format/tile_stream.h"

MUTATIONS = [
    # --- descriptors and layouts ---
    Mutation(
        "rows of an operand too close", MMA, "uint64_t{1024 >> 4} << 32", "uint64_t{512 >> 4} << 32"
    ),
    Mutation("no swizzle", MMA, "uint64_t{2} << 61", "uint64_t{0} << 61"),
    Mutation("another swizzle", MMA, "uint64_t{2} << 61", "uint64_t{4} << 61"),
    Mutation("no descriptor version", MMA, "uint64_t{1} << 46", "uint64_t{0} << 46"),
    Mutation(
        "metadata rows too far",
        MMA,
        "uint64_t{8 * format::kMetadataRowBytes >> 4} << 32",
        "uint64_t{16 * format::kMetadataRowBytes >> 4} << 32",
    ),
    Mutation("instruction with half the tokens", MMA, "(tokens >> 3) << 17", "(tokens >> 4) << 17"),
    Mutation("instruction with half the rows", MMA, "(rows >> 4) << 24", "(rows >> 5) << 24"),
    Mutation("dense descriptor for sparse", MMA, "sparse ? 1u << 2 : 0u", "sparse ? 0u : 0u"),
    Mutation("float16 sums", MMA, "kFloat32Sums = 1u << 4", "kFloat32Sums = 0u << 4"),
    Mutation(
        "values step",
        MMA,
        "w_step(int i) { return static_cast<uint32_t>(i) * 32 >> 4; }",
        "w_step(int i) { return static_cast<uint32_t>(i) * 64 >> 4; }",
    ),
    Mutation(
        "dense step of x",
        MMA,
        "dense_x_step(int i) { return static_cast<uint32_t>(i) * 32",
        "dense_x_step(int i) { return static_cast<uint32_t>(i) * 64",
    ),
    Mutation("sparse step of x", MMA, "(i % 2) * 64 >> 4", "(i % 2) * 32 >> 4"),
    Mutation("sparse step of x over the block", MMA, "(i % 2) * 64 >> 4", "(i) * 64 >> 4"),
    Mutation("metadata step", MMA, "(i) * 2; }", "(i) * 1; }"),
    Mutation(
        "second metadata block",
        MAINLOOP,
        "metadata_offset(0, 128 * half)",
        "metadata_offset(0, 64 * half)",
    ),
    Mutation("values without swizzle", STREAM, "(((j / 16) ^ (m % 8)) * 16)", "((j / 16) * 16)"),
    Mutation(
        "metadata in K order",
        STREAM,
        "(k / 128) * (kTileRows * kMetadataRowBytes) + m *",
        "(k / 128) * kMetadataRowBytes + 2 * m *",
    ),
    # --- tensor memory ---
    Mutation("metadata slots overlap", BUDGET, "kMetadataColumns = 8", "kMetadataColumns = 4"),
    Mutation("one metadata slot for all stages", MAINLOOP, "w_.slot * T::kMetadataColumns", "0"),
    Mutation(
        "metadata inside the sums",
        TRAITS,
        "kMetadata = kAccumulators * kTokens",
        "kMetadata = (kAccumulators - 1) * kTokens",
    ),
    Mutation(
        "accumulators overlap",
        MAINLOOP,
        "const uint32_t sums = tmem_ + sums_.slot * T::kTokens;",
        "const uint32_t sums = tmem_ + sums_.slot * (T::kTokens / 2);",
    ),
    Mutation(
        "epilogue reads the other accumulator",
        EPILOGUE,
        "tmem_ + sums_.slot * T::kTokens + token",
        "tmem_ + (1 - sums_.slot) * T::kTokens + token",
    ),
    Mutation(
        "lanes of another warp",
        EPILOGUE,
        "static_cast<uint32_t>(32 * warp) << 16",
        "static_cast<uint32_t>(32 * (3 - warp)) << 16",
    ),
    Mutation(
        "not freed as allocated",
        KERNEL,
        "tmem_free<T::kCtas>(tmem, T::kTmemColumns)",
        "tmem_free<T::kCtas>(tmem, T::kTmemColumns / 2)",
    ),
    Mutation("address not read", KERNEL, "ptx::load_shared(smem + T::kTmem)", "0u"),
    # --- barriers: counts ---
    Mutation(
        "two arrivals fill a unit",
        BUDGET,
        "w_full_arrivals() { return 1; }",
        "w_full_arrivals() { return 2; }",
    ),
    Mutation(
        "two commits empty a block",
        BUDGET,
        "x_empty_arrivals() { return 1; }",
        "x_empty_arrivals() { return 2; }",
    ),
    Mutation(
        "jobs freed too early",
        BUDGET,
        "job_empty_arrivals() { return kEpilogueWarps + 2; }",
        "job_empty_arrivals() { return kEpilogueWarps + 1; }",
    ),
    Mutation(
        "jobs never freed",
        BUDGET,
        "job_empty_arrivals() { return kEpilogueWarps + 2; }",
        "job_empty_arrivals() { return kEpilogueWarps + 3; }",
    ),
    Mutation(
        "sums freed by three warps",
        BUDGET,
        "return kEpilogueWarps * c.ctas; }",
        "return kEpilogueWarps * c.ctas - 1; }",
    ),
    Mutation(
        "sums freed by one CTA",
        BUDGET,
        "return kEpilogueWarps * c.ctas; }",
        "return kEpilogueWarps; }",
        PAIR,
    ),
    Mutation(
        "every lane frees the sums",
        EPILOGUE,
        "    if (lane() == 0) {\n      const uint32_t empty",
        "    if (lane() >= 0) {\n      const uint32_t empty",
    ),
    Mutation(
        "every lane frees the job", KERNEL, "jobs.done(ptx::lane_id() == 0)", "jobs.done(true)"
    ),
    Mutation("bytes of a pair", LOADERS, "T::kCtas * kBytes", "kBytes", PAIR),
    Mutation("bytes of a pair's x", LOADERS, "T::kCtas * T::kXStageBytes", "T::kXStageBytes", PAIR),
    Mutation(
        "bytes of a dense unit",
        LOADERS,
        "8 * at_.slot, kBytes);",
        "8 * at_.slot, kSparseUnitBytes);",
    ),
    # --- barriers: stages and phases ---
    Mutation("parity never turns", LOADERS, "      parity ^= 1;\n", ""),
    Mutation(
        "a ring of one slot less",
        LOADERS,
        "if (++slot == kStages) {",
        "if (++slot == kStages - 1) {",
    ),
    Mutation(
        "w fills what is in use",
        LOADERS,
        "ptx::barrier_wait(smem_ + T::kWEmpty + 8 * at_.slot, at_.parity ^ 1);\n    __syncwarp();\n  }\n\n  // Unit",
        "__syncwarp();\n  }\n\n  // Unit",
    ),
    Mutation(
        "x fills what is in use",
        LOADERS,
        "ptx::barrier_wait(smem_ + T::kXEmpty + 8 * at_.slot, at_.parity ^ 1);",
        "",
    ),
    Mutation(
        "w waits for the wrong pass",
        LOADERS,
        "T::kWEmpty + 8 * at_.slot, at_.parity ^ 1",
        "T::kWEmpty + 8 * at_.slot, at_.parity",
    ),
    Mutation(
        "jobs wait for the wrong pass",
        LOADERS,
        "T::kJobFull + 8 * at_.slot, at_.parity",
        "T::kJobFull + 8 * at_.slot, at_.parity ^ 1",
    ),
    Mutation(
        "w not waited for",
        MAINLOOP,
        "ptx::barrier_wait(smem_ + T::kWFull + 8 * w_.slot, w_.parity);",
        "",
    ),
    Mutation(
        "x not waited for",
        MAINLOOP,
        "ptx::barrier_wait(smem_ + T::kXFull + 8 * x_.slot, x_.parity);",
        "",
    ),
    Mutation(
        "sums not waited for",
        MAINLOOP,
        "ptx::barrier_wait(smem_ + T::kSumsEmpty + 8 * sums_.slot, sums_.parity ^ 1);",
        "",
    ),
    Mutation(
        "epilogue does not wait",
        EPILOGUE,
        "ptx::barrier_wait(smem_ + T::kSumsFull + 8 * sums_.slot, sums_.parity);",
        "",
    ),
    Mutation(
        "unit released before its use",
        MAINLOOP,
        "    release_x();\n    release_w();\n  }\n\n  __device__ void drain",
        "  }\n\n  __device__ void drain",
    ),
    Mutation(
        "x released early",
        MAINLOOP,
        "const uint32_t x_slot = wait_for_x();\n",
        "const uint32_t x_slot = wait_for_x();\n      ptx::tensor_commit<T::kCtas>(smem_ + T::kXEmpty + 8 * x_.slot);\n",
    ),
    Mutation(
        "sums given before they are complete",
        MAINLOOP,
        "    begun_[0] = begun_[1] = false;\n",
        "    begun_[0] = begun_[1] = false;\n    ptx::tensor_commit<T::kCtas>(smem_ + T::kSumsFull + 8 * sums_.slot);\n",
    ),
    Mutation("one accumulator for two", MAINLOOP, "    sums_.advance();\n", ""),
    Mutation("epilogue stays at one accumulator", EPILOGUE, "    sums_.advance();\n", ""),
    Mutation(
        "drain waits for nothing", MAINLOOP, "ptx::barrier_wait(smem_ + T::kDrained, drained_);", ""
    ),
    Mutation("drain's parity never turns", MAINLOOP, "    drained_ ^= 1;\n", ""),
    Mutation("no drain", MAINLOOP, "#define SPENSE_SM100_DRAIN 1", "#define SPENSE_SM100_DRAIN 0"),
    Mutation(
        "w leaves before its commits",
        KERNEL,
        "  loader.finish();\n}\n\n// One thread.\ntemplate <class T>\n__device__ __forceinline__ void load_activations",
        "}\n\n// One thread.\ntemplate <class T>\n__device__ __forceinline__ void load_activations",
    ),
    Mutation(
        "no fence behind a wait",
        EPILOGUE,
        "    __syncwarp();\n    ptx::tmem_fence_after();\n",
        "    __syncwarp();\n",
    ),
    Mutation("no fence before the sums are freed", EPILOGUE, "    ptx::tmem_fence_before();\n", ""),
    Mutation(
        "the pair waits at its own barrier",
        LOADERS,
        "ptx::remote_smem(smem + T::kWFull, 0)",
        "smem + T::kWFull",
        PAIR,
    ),
    # --- dependent launch ---
    Mutation(
        "x before the kernel ahead",
        KERNEL,
        "  ptx::grid_dependency_wait();\n  ActivationLoader",
        "  ActivationLoader",
    ),
    Mutation(
        "scales before the kernel ahead",
        KERNEL,
        "  ptx::grid_dependency_wait();  // before",
        "  // before",
    ),
    # --- units ---
    Mutation(
        "dense units from the wrong place",
        LOADERS,
        "block - sparse, sparse",
        "block - 2 * sparse, sparse",
    ),
    Mutation(
        "dense units one too far", LOADERS, "block - sparse, sparse", "block - sparse + 1, sparse"
    ),
    Mutation(
        "tile offset in blocks of half",
        LOADERS,
        "(tile_begin) * format::kBlockBytes",
        "(tile_begin) * (format::kBlockBytes / 2)",
    ),
    Mutation(
        "second block of a step",
        LOADERS,
        "put((2 * step + 1) * kRowBytes, row);",
        "put(2 * step * kRowBytes, row);",
    ),
    Mutation(
        "tokens of x",
        LOADERS,
        "job.token_tile * T::kTokens + rank_ * T::kXBoxTokens",
        "job.token_tile * T::kXBoxTokens + rank_ * T::kTokens",
        PAIR,
    ),
    Mutation("both CTAs load the same tokens", LOADERS, "+ rank_ * T::kXBoxTokens", "", PAIR),
    Mutation(
        "own unit where the rows sit out",
        LOADERS,
        "holds_sparse(job, rank_, step) ? rank_ : 1 - rank_",
        "rank_",
        PAIR,
    ),
    Mutation(
        "dense begins too late",
        TRAITS,
        "2 * max(job.step_begin, min(",
        "2 * max(job.step_begin, max(",
        PAIR,
    ),
    Mutation(
        "sparse ends too early", TRAITS, "min(job.step_end, max(", "min(job.step_end, min(", PAIR
    ),
    Mutation(
        "K ends at a step",
        TRAITS,
        "dense_end = min(2 * job.step_end, k_blocks);",
        "dense_end = 2 * job.step_end;",
    ),
    Mutation(
        "rows sit out on the wrong side",
        MAINLOOP,
        "rows.off.cta[0] = first ? 0 : ~0u;\n    rows.off.cta[1] = second ? 0 : ~0u;",
        "rows.off.cta[0] = second ? 0 : ~0u;\n    rows.off.cta[1] = first ? 0 : ~0u;",
        PAIR,
    ),
    Mutation(
        "nobody sits out",
        MAINLOOP,
        "rows.off.cta[1] = second ? 0 : ~0u;",
        "rows.off.cta[1] = 0;",
        PAIR,
    ),
    Mutation(
        "sums kept from the tile before", MAINLOOP, "    begun_[0] = begun_[1] = false;\n", ""
    ),
    Mutation(
        "every unit starts from zero",
        MAINLOOP,
        "    begun_[0] |= first;\n",
        "    begun_[0] = false;\n",
    ),
    Mutation(
        "w as a swizzled matrix",
        LAUNCH,
        "unit_bytes / format::kRowBytes, false}",
        "unit_bytes / format::kRowBytes, true}",
        PAIR,
    ),
    Mutation(
        "x boxes of all tokens",
        LAUNCH,
        "heuristics::sm100::box_tokens(config), true}",
        "config.tokens, true}",
        PAIR,
    ),
    # --- epilogue ---
    Mutation(
        "scale of the chunk's first tokens",
        EPILOGUE,
        "scales_ + 4 * (token + i)",
        "scales_ + 4 * (token + i / 2)",
    ),
    Mutation(
        "scales of the first token tile", EPILOGUE, "min(token0 + i, p_.m - 1)", "min(i, p_.m - 1)"
    ),
    Mutation("one scale for all", EPILOGUE, "token * p_.x_scale_step", "0 * p_.x_scale_step"),
    Mutation(
        "scale of the warp's first row",
        EPILOGUE,
        "min(row, p_.n - 1)",
        "min(row - lane(), p_.n - 1)",
    ),
    Mutation(
        "rows of the leader",
        EPILOGUE,
        "(job.row_tile + rank_) * kTileRows",
        "job.row_tile * kTileRows",
        PAIR,
    ),
    Mutation("rows beyond n", EPILOGUE, "    if (row >= p_.n) return;\n", ""),
    Mutation("tokens beyond m", EPILOGUE, "if (token0 + token + i >= p_.m) break;", ""),
    Mutation(
        "every second token",
        EPILOGUE,
        "    for (int token = 0; token < T::kTokens; token += T::kChunk) {\n      float v",
        "    for (int token = 0; token < T::kTokens; token += 2 * T::kChunk) {\n      float v",
        FOUR,
    ),
    # --- stream-K ---
    Mutation(
        "parts in each other's place",
        SCHEDULE,
        "return 2 * cluster + (holds_step_zero ? 1 : 0);",
        "return cluster + (holds_step_zero ? 1 : 0);",
    ),
    Mutation("every part holds step zero", EPILOGUE, "place(c, c == job.first)", "place(c, true)"),
    Mutation("own part forgotten", EPILOGUE, "c == cluster_ ? v[i] :", "c == cluster_ ? 0.0f :"),
    Mutation(
        "warps share a counter",
        EPILOGUE,
        "heuristics::sm100::kEpilogueWarps + warp_",
        "heuristics::sm100::kEpilogueWarps",
    ),
    Mutation(
        "CTAs share a counter",
        EPILOGUE,
        "(job.first * T::kCtas + rank_) * heuristics",
        "(job.first * T::kCtas) * heuristics",
        PAIR,
    ),
    Mutation(
        "counter of the own cluster",
        EPILOGUE,
        "p_.counters + (job.first * T::kCtas",
        "p_.counters + (cluster_ * T::kCtas",
    ),
    Mutation(
        "one contributor too many",
        EPILOGUE,
        "static_cast<uint32_t>(job.last - job.first)",
        "static_cast<uint32_t>(job.last - job.first + 1)",
    ),
    Mutation(
        "counter not reset",
        EPILOGUE,
        "      if (lane() == 0) ptx::store_relaxed(counter, 0);\n",
        "",
    ),
    Mutation(
        "contributors off by one",
        SCHEDULE,
        "out.first = owner(position_ + p_.snap);",
        "out.first = owner(position_);",
    ),
    Mutation(
        "cuts overlap",
        SCHEDULE,
        "stream_end_ = raw_cut(cluster_ + 1);",
        "stream_end_ = raw_cut(cluster_ + 1) + 5;",
    ),
]

# Faults that change nothing that can be seen, and why.
EQUIVALENT = [
    Mutation(
        "leading offset of a swizzled operand",
        MMA,
        "kLeading = uint64_t{1} << 16;",
        "kLeading = uint64_t{2} << 16;",
        reason="an operand is one swizzle atom wide, so that the offset is never added",
    ),
    Mutation(
        "leading offset of metadata",
        MMA,
        "uint64_t{format::kMetadataRowBytes >> 4} << 16",
        "uint64_t{2} << 16",
        reason="a copy takes 16 bytes of a row, so that the offset is never added",
    ),
    Mutation(
        "snap",
        "heuristics/sm100.cpp",
        "kSparseBlocks * config.ctas, least / 4",
        "0, least / 4",
        reason="where cuts fall is a matter of speed",
    ),
]
