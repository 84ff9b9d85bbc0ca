// SPDX-License-Identifier: Apache-2.0
// Gated activations: the formulas and the constants that the CPU and the GPU evaluate in float32.
//
//   silu       g / (1 + 2^t),           t = -log2(e) g
//   gelu tanh  g / (1 + 2^t),           t = g (kGeluLinear + kGeluCubic g^2); this is
//              g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))), for 1 + tanh(z) = 2 / (1 + e^-2z)
//   gelu erf   g Phi(g), Phi(g) = 1 - Phi(-g), and for g < 0
//              Phi(g) = 2^(-log2(e) / 2 g^2) r q(r), r = 1 / (1 + h / 2), h = min(|g| / sqrt 2, 10)
//
// q is a least-maximum fit of erfcx(h) / (2 r) over h in [0, 10], relative error below 5e-8.
#pragma once

namespace spense {

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGeluErf = 2 };

namespace activation {

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kGeluLinear = -2.30220819f;   // -2 log2(e) sqrt(2 / pi)
inline constexpr float kGeluCubic = -0.102943240f;   // 0.044715 times that
inline constexpr float kGeluSquare = -0.721347520f;  // -log2(e) / 2
inline constexpr float kInverseSqrt2 = 0.707106781f;
inline constexpr float kLargestH = 10.0f;
inline constexpr int kTailDegree = 8;
// Coefficients of q. A function, because device code has no namespace-scope arrays.
constexpr float tail(int i) {
  constexpr float kCoefficients[] = {0x1.20db42p-3f,  0x1.212700p-3f,  0x1.f1e04ep-4f,
                                     0x1.9f1aa8p-4f,  -0x1.b44358p-7f, 0x1.1cbe54p-3f,
                                     -0x1.f2e528p-3f, 0x1.2367f0p-3f,  -0x1.e3e520p-6f};
  return kCoefficients[i];
}

// 2^f for f in [-1/2, 1/2], relative error below 2e-9 before rounding.
inline constexpr float kExp2[] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdap-3f, 0x1.c6aed4p-5f,
                                  0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d32ep-13f};
inline constexpr int kExp2Degree = 6;

}  // namespace activation
}  // namespace spense
