// Blocks of codes: loading, storing, and the update that update.py defines, bit for bit.

#pragma once

#include "vectors.h"

namespace {

constexpr int GROUP = 32;          // elements that are packed together and share 16 hashes
constexpr uint16_t HALF_NAN = 0x7E00;

// Integer vectors of a group

// The upper halves of 32 numbers, 16 of them in each argument.
inline S32 upper_halves(U16 first, U16 second) {
#ifdef __AVX512BW__
    alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (S32)_mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(odd), (__m512i)second);
#else
    H16 both[2] = {narrow(first >> 16), narrow(second >> 16)};
    return bits_as<S32>(both);
#endif
}

// The sum of the squares of each two neighbours.
inline I16 pair_squares(S32 v) {
#ifdef __AVX512BW__
    return (I16)_mm512_madd_epi16((__m512i)v, (__m512i)v);
#else
    const I16 pairs = (I16)v, even = pairs << 16 >> 16, odd = pairs >> 16;
    return even * even + odd * odd;
#endif
}

inline B32 low_bytes(S32 v) {
#ifdef __AVX512BW__
    return (B32)_mm512_cvtepi16_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, B32);
#endif
}

// 32 numbers from 0 to 15 in 16 bytes: byte j has number j in its low half, number 16 + j in its high half.
inline B16 pack_halves(S32 v) {
    S16 half[2];
    memcpy(half, &v, sizeof v);
    const S16 bytes = half[0] | half[1] << 4;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (B16)_mm256_cvtepi16_epi8((__m256i)bytes);
#else
    return __builtin_convertvector(bytes, B16);
#endif
}

inline U16 widen_bytes(const uint8_t* from) {
    B16 v;
    memcpy(&v, from, sizeof v);
#ifdef __AVX512F__
    return (U16)_mm512_cvtepu8_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, U16);
#endif
}

inline I16 widen_bytes(const int8_t* from) {
#ifdef __AVX512F__
    return (I16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    typedef int8_t Signed __attribute__((vector_size(16)));
    Signed v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, I16);
#endif
}

// The larger magnitude of each pair; the smallest number's is 32768.
inline S32 larger_magnitude(S32 magnitudes, S32 v) {
#ifdef __AVX512BW__
    return (S32)_mm512_max_epu16((__m512i)magnitudes, _mm512_abs_epi16((__m512i)v));
#else
    typedef uint16_t U32 __attribute__((vector_size(64)));
    const U32 old = (U32)magnitudes, made = (U32)(v < 0 ? -v : v);
    return (S32)(made > old ? made : old);
#endif
}

inline bool any_above(S32 magnitudes, int64_t limit) {
#ifdef __AVX512BW__
    return _mm512_cmpgt_epu16_mask((__m512i)magnitudes, _mm512_set1_epi16((int16_t)limit)) != 0;
#else
    uint16_t most = 0;
    for (int i = 0; i < 2 * LANES; i++) most = std::max(most, (uint16_t)magnitudes[i]);
    return most > limit;
#endif
}

// A weight on a grid; codes as codes.py lays them out

struct Planes {  // of Python
    int8_t* codes;
    uint8_t* low;
    uint16_t* scales;
    int64_t block;
    int64_t bits, largest;
};

template <int BITS>
struct Codes {
    int8_t* codes;
    uint8_t* low;

    // The 32 codes from element `at` on.
    void load(int64_t at, I16& first, I16& second) const {
        if (BITS == 4) {
            const U16 both = widen_bytes((const uint8_t*)codes + at / 2);
            first = (I16)(both & 15) - 8;
            second = (I16)(both >> 4) - 8;
            return;
        }
        first = widen_bytes(codes + at);
        second = widen_bytes(codes + at + LANES);
        if (BITS == 12) {
            const U16 both = widen_bytes(low + at / 2);
            first = first << 4 | (I16)(both & 15);
            second = second << 4 | (I16)(both >> 4);
        }
    }

    void store(int64_t at, S32 values) const {
        if (BITS == 4) {
            const B16 packed = pack_halves(values + 8);
            memcpy(codes + at / 2, &packed, sizeof packed);
            return;
        }
        const B32 bytes = low_bytes(BITS == 12 ? values >> 4 : values);
        memcpy(codes + at, &bytes, sizeof bytes);
        if (BITS == 12) {
            const B16 packed = pack_halves(values & 15);
            memcpy(low + at / 2, &packed, sizeof packed);
        }
    }
};

// As in codes.py. NaN where the value is not finite or no float16 reaches it.
inline uint16_t smallest_scale(float largest_value, int64_t largest_code) {
    if (!std::isfinite(largest_value)) return HALF_NAN;
    uint16_t scale = float_to_half(largest_value / (float)largest_code);
    if (half_to_float(scale) * (float)largest_code < largest_value) scale++;
    scale = std::max<uint16_t>(scale, 1);
    return scale >= 0x7C00 ? HALF_NAN : scale;
}

inline U16 noise_of_group(int64_t index, Key key) {
    return key.stochastic ? hashes(((uint64_t)index >> 5) * 16, key) : U16{} + 0x80008000u;  // 32768 rounds to nearest
}

// Rounds a block that grows. `distance` is 65536 times that of update.py, `rounded` are the new codes, some beyond the grid.
template <int BITS, int GROUPS>
OUTLINE void grow_block(Codes<BITS> codes, uint16_t* scale, int64_t largest, int64_t at, const F16* distance,
                        const S32* rounded, int64_t index, Key key) {
    F16 wanted[2 * GROUPS];
    float farthest = 0;
    bool bad = false;
    for (int g = 0; g < GROUPS; g++) {
        I16 code[2];
        codes.load(at + g * GROUP, code[0], code[1]);
        for (int i = 0; i < GROUP; i++) {
            const float d = distance[2 * g + i / LANES][i % LANES];
            const bool near = std::fabs(std::nearbyint(d)) < 0x1p30f;
            const float v = near ? (float)rounded[g][i] : (float)code[i / LANES][i % LANES] - d * 0x1p-16f;
            wanted[2 * g + i / LANES][i % LANES] = v;
            bad |= v != v;
            farthest = std::max(farthest, std::fabs(v));
        }
    }
    const float old = half_to_float(*scale);
    *scale = bad ? HALF_NAN : smallest_scale(farthest * old, largest);
    const bool lost = *scale == HALF_NAN;
    const F16 ratio = splat(lost ? 0.0f : old / half_to_float(*scale));
    const Key second = {key.second, key.first, key.stochastic};
    const S32 most = S32{} + (int16_t)largest;
    for (int g = 0; g < GROUPS; g++) {
        const U16 hash = noise_of_group(index + g * GROUP, second);
        S32 made = upper_halves((U16)to_int(wanted[2 * g] * ratio * 65536.0f) + (hash & 0xFFFFu),
                                (U16)to_int(wanted[2 * g + 1] * ratio * 65536.0f) + (hash >> 16));
        made = made > most ? most : made;
        made = made < -most ? -most : made;
        codes.store(at + g * GROUP, lost ? S32{} : made);
    }
}

// Adds the squares of a block's values to `total`.
template <int BITS, int GROUPS>
inline void add_squares(Codes<BITS> codes, uint16_t scale, int64_t at, F16& total) {
    I16 squares = {};
    for (int g = 0; g < GROUPS; g++) {
        I16 first, second;
        codes.load(at + g * GROUP, first, second);
        squares += pair_squares(upper_halves((U16)first << 16, (U16)second << 16));
    }
    const float wide = half_to_float(scale);
    total += to_float(squares) * (wide * wide);
}

// Moves one block; `direction(j)` is asked once for each 16 elements. Adds the squares of the new values to `total`.
template <int BITS, int GROUPS, class D>
inline INLINE void move_block(Codes<BITS> codes, uint16_t* scale, int64_t largest, int64_t at, int64_t index,
                              float step, float decay, Key key, F16& total, D direction) {
    const float wide = half_to_float(*scale);
    // Multiplying by 65536 changes no rounding.
    const F16 by = splat(step / wide * 65536.0f), shrink = splat(decay * 65536.0f);
    F16 distance[2 * GROUPS];
    S32 rounded[GROUPS], magnitudes = {};
    I16 squares = {};
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
        I16 code[2];
        codes.load(at + g * GROUP, code[0], code[1]);
        for (int h = 0; h < 2; h++) {
            F16 d = direction(g * GROUP + h * LANES) * by;
            if (decay != 0) d += to_float(code[h]) * shrink;
            distance[2 * g + h] = d;
        }
        const U16 hash = noise_of_group(index + g * GROUP, key);
        rounded[g] = upper_halves(((U16)code[0] << 16) - (U16)to_int(distance[2 * g]) + (hash & 0xFFFFu),
                                  ((U16)code[1] << 16) - (U16)to_int(distance[2 * g + 1]) + (hash >> 16));
        magnitudes = larger_magnitude(magnitudes, rounded[g]);
        squares += pair_squares(rounded[g]);
    }
    if (__builtin_expect(any_above(magnitudes, largest), 0)) {
        grow_block<BITS, GROUPS>(codes, scale, largest, at, distance, rounded, index, key);
        return add_squares<BITS, GROUPS>(codes, *scale, at, total);
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) codes.store(at + g * GROUP, rounded[g]);
    total += to_float(squares) * (wide * wide);
}

}  // namespace
