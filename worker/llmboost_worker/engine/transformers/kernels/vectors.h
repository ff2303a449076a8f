// Vectors of 16 floats, in GCC's and Clang's vector extensions; the compiler maps them to whatever the machine has.

#pragma once

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;  // floats in a vector

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Halves __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quarters __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));

struct BFloat16 {
  uint16_t bits;
};

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// GCC 12 converts vectors of integers one by one, where AVX-512 has an instruction for all of them.
#ifdef __AVX512F__
inline Words widened(Shorts x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
inline Shorts narrowed(Words x) { return (Shorts)_mm512_cvtepi32_epi16((__m512i)x); }
inline Ints widened(Bytes x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
#else
inline Words widened(Shorts x) { return __builtin_convertvector(x, Words); }
inline Shorts narrowed(Words x) { return __builtin_convertvector(x, Shorts); }
inline Ints widened(Bytes x) { return __builtin_convertvector(x, Ints); }
#endif

inline Floats load(const BFloat16* from) {
  return (Floats)(widened(*reinterpret_cast<const Shorts*>(from)) << 16);
}

inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

// To nearest, ties to even; NaN stays NaN.
#ifdef __AVX512BF16__
inline Shorts halved(Floats x) { return (Shorts)_mm512_cvtneps_pbh((__m512)x); }
#else
inline Shorts halved(Floats x) {
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrowed((x == x) ? rounded : (bits >> 16) | 0x40);
}
#endif

inline void store(BFloat16* to, Floats x) { *reinterpret_cast<Shorts*>(to) = halved(x); }

// As if stored and loaded again.
template <class T>
inline Floats rounded(Floats x);
template <>
inline Floats rounded<float>(Floats x) { return x; }
template <>
inline Floats rounded<BFloat16>(Floats x) { return (Floats)(widened(halved(x)) << 16); }

inline Floats all(float x) { return Floats{} + x; }
inline Floats least(Floats a, Floats b) { return a < b ? a : b; }
inline Floats most(Floats a, Floats b) { return a < b ? b : a; }

inline float sum(Floats x) {
  Halves a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  Quarters b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float largest(Floats x) {
  float best = x[0];
  for (int i = 1; i < WIDTH; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// Cephes' expf (S. Moshier), two units in the last place; what is below e^-87 comes out as that. NaN stays NaN.
inline Floats exponential(Floats exponent) {
  Floats x = least(most(exponent, all(-87.0f)), all(88.0f));
  Floats scaled = x * 1.44269504088896341f;
  Ints power = __builtin_convertvector(scaled + (scaled < 0.0f ? all(-0.5f) : all(0.5f)), Ints);
  Floats whole = __builtin_convertvector(power, Floats);
  Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = (p * rest * rest + rest + 1.0f) * (Floats)((power + 127) << 23);
  return exponent == exponent ? p : exponent;
}

inline Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

template <class T>
inline Floats silu(Floats x) {
  return rounded<T>(x / (exponential(-x) + 1.0f));
}

}  // namespace
