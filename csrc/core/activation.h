// SPDX-License-Identifier: Apache-2.0
// Gated activations: the formulas and the constants that the CPU and the GPU evaluate in float32.
//
//   silu       g / (1 + 2^t),           t = -log2(e) g
//   gelu tanh  g / (1 + 2^t),           t = g (kGeluLinear + kGeluCubic g^2); this is
//              g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))), for 1 + tanh(z) = 2 / (1 + e^-2z)
//   gelu erf   max(g, 0) - |g| Phi(-|g|), with
//              Phi(-|g|) = 2^(-log2(e) / 2 g^2) r q(r), r = 1 / (|g| + kTailShift)
//
// q is a fit of Phi(-a) e^(a^2 / 2) / r for a in [0, 14.5], where the power of two vanishes:
// relative error below 4.2e-6, a seventh of what is allowed.
#pragma once

namespace spense {

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGeluErf = 2 };

namespace activation {

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kGeluLinear = -2.30220819f;   // -2 log2(e) sqrt(2 / pi)
inline constexpr float kGeluCubic = -0.102943240f;   // 0.044715 times that
inline constexpr float kGeluSquare = -0.721347520f;  // -log2(e) / 2
inline constexpr float kTailShift = 3.24f;
inline constexpr int kTailDegree = 5;
// Coefficients of q. A function, because device code has no namespace-scope arrays.
constexpr float tail(int i) {
  constexpr float kCoefficients[] = {0x1.994792p-2f, 0x1.40cccap+0f, 0x1.2724acp+2f,
                                     0x1.16a33ap+0f, 0x1.0acbdap+6f, -0x1.5b140ep+6f};
  return kCoefficients[i];
}

// 2^f for f in [-1/2, 1/2], relative error below 2e-9 before rounding.
inline constexpr float kExp2[] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdap-3f, 0x1.c6aed4p-5f,
                                  0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d32ep-13f};
inline constexpr int kExp2Degree = 6;

}  // namespace activation
}  // namespace spense
