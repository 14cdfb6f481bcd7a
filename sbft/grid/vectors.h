// Sixteen float32 lanes, their loads and conversions, and the noise of stochastic rounding: what all compiled CPU kernels share.
//
// Vectors are GCC's portable extension: AVX-512, AVX2 or NEON, whatever -march=native has. A few intrinsics stand where the
// compiler makes several instructions of one; each computes the same bits as the portable line beside it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

typedef uint16_t bf16;

#define INLINE __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))

// Loads, stores, conversions

inline F16 splat(float x) { return F16{} + x; }

inline F16 load(const float* p) {
    F16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline U16 widen(H16 h) {
#ifdef __AVX512F__
    return (U16)_mm512_cvtepu16_epi32((__m256i)h);
#else
    return __builtin_convertvector(h, U16);
#endif
}

inline H16 narrow(U16 u) {
#ifdef __AVX512F__
    return (H16)_mm512_cvtepi32_epi16((__m512i)u);
#else
    return __builtin_convertvector(u, H16);
#endif
}

inline F16 load(const bf16* p) {
    H16 h;
    memcpy(&h, p, sizeof h);
    return (F16)(widen(h) << 16);
}

template <class T>
OUTLINE F16 load_part(const T* p, int64_t n) {  // n < LANES values, then zeros
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T>
inline F16 load_any(const T* p, int64_t n) {
    return n >= LANES ? load(p) : load_part(p, n);
}

// The first half of a vector plus the last.
template <class Half, class V>
inline Half halves_added(V v) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    return halves[0] + halves[1];
}

inline float sum(F16 v) {
    typedef float F2 __attribute__((vector_size(8)));
    typedef float F4 __attribute__((vector_size(16)));
    typedef float F8 __attribute__((vector_size(32)));
    const F2 pair = halves_added<F2>(halves_added<F4>(halves_added<F8>(v)));
    return pair[0] + pair[1];
}

inline F16 root(F16 v) {
#ifdef __AVX512F__
    return (F16)_mm512_sqrt_ps((__m512)v);
#else
    float part[LANES];
    memcpy(part, &v, sizeof v);
    for (int i = 0; i < LANES; i++) part[i] = std::sqrt(part[i]);
    memcpy(&v, part, sizeof v);
    return v;
#endif
}

// Rounding

struct Key {
    uint32_t first, second;
    bool stochastic;  // else to nearest
};

// 32-bit hashes of the 16 counters that start at `counter`, a multiple of 16: the noise of 32 elements, low halves first.
inline U16 hashes(uint64_t counter, Key key) {
    const U16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    U16 x = lanes + (uint32_t)counter + key.first;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= (x >> 15) ^ (key.second ^ (uint32_t)(counter >> 32) * 0x9E3779B9u);
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x;
}

typedef int16_t S32 __attribute__((vector_size(64)));
typedef int16_t S16 __attribute__((vector_size(32)));
typedef int8_t B32 __attribute__((vector_size(32)));
typedef uint8_t B16 __attribute__((vector_size(16)));

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Rounds to int32, ties to even. What is not below 2^31, NaN included, may become any number of at least 2^30 in magnitude.
inline I16 to_int(F16 v) {
#if defined(__AVX512F__)
    return (I16)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    __m256 half[2];
    memcpy(half, &v, sizeof v);
    __m256i made[2] = {_mm256_cvtps_epi32(half[0]), _mm256_cvtps_epi32(half[1])};
    return bits_as<I16>(made);
#else
    I16 made;
    for (int i = 0; i < LANES; i++) made[i] = std::fabs(v[i]) < 0x1p30f ? (int32_t)lrintf(v[i]) : 1 << 30;
    return made;
#endif
}

inline F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }

// The larger of each pair, without a sign.
inline U16 larger(U16 a, U16 b) {
#ifdef __AVX512F__
    return (U16)_mm512_max_epu32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}

// float16

inline float half_to_float(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    const uint32_t magnitude = h & 0x7FFF;
    float value = magnitude >= 0x7C00 ? (magnitude > 0x7C00 ? NAN : INFINITY)
                  : magnitude < 0x400 ? (float)magnitude * 0x1p-24f
                                      : bits_as<float>((magnitude << 13) + (112u << 23));
    return h & 0x8000 ? -value : value;
#endif
}

// To nearest, ties to even; `value` is not negative and not NaN.
inline uint16_t float_to_half(float value) {
#ifdef __F16C__
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    if (value < 0x1p-14f) return (uint16_t)lrintf(value * 0x1p24f);  // a multiple of 2^-24
    const uint32_t bits = bits_as<uint32_t>(value) - (112u << 23);
    return (uint16_t)std::min((bits + 0xFFF + ((bits >> 13) & 1)) >> 13, 0x7C00u);
#endif
}

}  // namespace
