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

// 16 of 32 numbers: the first if `half` is 0, else the last.
inline I16 widen_half(S32 v, int half) {
    S16 halves[2];
    memcpy(halves, &v, sizeof v);
#ifdef __AVX512F__
    return (I16)_mm512_cvtepi16_epi32((__m256i)halves[half]);
#else
    return __builtin_convertvector(halves[half], I16);
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

// 32 numbers from -128 to 127.
inline S32 widen_bytes(const int8_t* from) {
    B32 v;
    memcpy(&v, from, sizeof v);
#ifdef __AVX512BW__
    return (S32)_mm512_cvtepi8_epi16((__m256i)v);
#else
    return __builtin_convertvector(v, S32);
#endif
}

// What `pack_halves` has packed.
inline S32 unpack_halves(const uint8_t* from) {
    B16 packed;
    memcpy(&packed, from, sizeof packed);
#ifdef __AVX512BW__
    const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256((__m128i)packed));
    return (S32)_mm512_mask_srli_epi16(twice, 0xFFFF0000u, twice, 4) & 15;
#else
    typedef uint16_t Unsigned __attribute__((vector_size(32)));
    const Unsigned bytes = __builtin_convertvector(packed, Unsigned);
    const Unsigned halves[2] = {bytes & 15, bytes >> 4};
    return bits_as<S32>(halves);
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
    S32 load(int64_t at) const {
        if (BITS == 4) return unpack_halves((const uint8_t*)codes + at / 2) - 8;
        const S32 high = widen_bytes(codes + at);
        return BITS == 12 ? high << 4 | unpack_halves(low + at / 2) : high;
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

// 65536 times the distance that update.py moves 32 codes.
struct Distance {
    F16 half[2];
};

// The rounded codes, some of which may be beyond the grid.
inline S32 moved(S32 code, const Distance& distance, int64_t index, Key key) {
    typedef uint16_t U32 __attribute__((vector_size(64)));
    const U16 hash = noise_of_group(index, key);
    const S32 carried = upper_halves((hash & 0xFFFFu) - (U16)to_int(distance.half[0]),
                                     (hash >> 16) - (U16)to_int(distance.half[1]));
    return (S32)((U32)code + (U32)carried);
}

// Adds the squares of a block's values to `total`.
template <int BITS, int GROUPS>
inline void add_squares(Codes<BITS> codes, uint16_t scale, int64_t at, F16& total) {
    I16 squares = {};
    for (int g = 0; g < GROUPS; g++) squares += pair_squares(codes.load(at + g * GROUP));
    const float wide = half_to_float(scale);
    total += to_float(squares) * (wide * wide);
}

// Moves one block, which may grow: then it is rounded anew.
template <int BITS, int GROUPS>
inline void move_growing(Codes<BITS> codes, uint16_t* scale, int64_t largest, int64_t at, int64_t index, Key key,
                         const Distance* distance) {
    F16 wanted[2 * GROUPS];
    S32 rounded[GROUPS], magnitudes = {};
    float farthest = 0;
    bool bad = false;
    for (int g = 0; g < GROUPS; g++) {
        const S32 code = codes.load(at + g * GROUP);
        rounded[g] = moved(code, distance[g], index + g * GROUP, key);
        magnitudes = larger_magnitude(magnitudes, rounded[g]);
        for (int i = 0; i < GROUP; i++) {
            const float d = distance[g].half[i / LANES][i % LANES];
            const bool near = std::fabs(std::nearbyint(d)) < 0x1p30f;
            const float v = near ? (float)rounded[g][i] : (float)code[i] - d * 0x1p-16f;
            wanted[2 * g + i / LANES][i % LANES] = v;
            bad |= v != v;
            farthest = std::max(farthest, std::fabs(v));
        }
    }
    if (!any_above(magnitudes, largest)) {
        for (int g = 0; g < GROUPS; g++) codes.store(at + g * GROUP, rounded[g]);
        return;
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

// Moves blocks of which at least one grows; returns `total` plus the squares of the new values.
template <int BITS, int GROUPS, int BLOCKS>
OUTLINE F16 move_growing_blocks(Codes<BITS> codes, uint16_t* scales, int64_t largest, int64_t at, int64_t index, Key key,
                                F16 total, const Distance* distance) {
    for (int b = 0; b < BLOCKS; b++) {
        const int64_t j = b * GROUPS * GROUP;
        move_growing<BITS, GROUPS>(codes, scales + b, largest, at + j, index + j, key, distance + b * GROUPS);
        add_squares<BITS, GROUPS>(codes, scales[b], at + j, total);
    }
    return total;
}

// Moves a few blocks; `direction(j)` is asked once for each 16 elements. Adds the squares of the new values to `total`.
template <int BITS, int GROUPS, int BLOCKS, class D>
inline INLINE void move_blocks(Codes<BITS> codes, uint16_t* scales, int64_t largest, int64_t at, int64_t index, float step,
                               float decay, Key key, F16& total, D direction) {
    constexpr int ALL = BLOCKS * GROUPS;
    float wide[BLOCKS], by[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
        wide[b] = half_to_float(scales[b]);
        by[b] = step / wide[b] * 65536.0f;  // multiplying by 65536 changes no rounding
    }
    Distance distance[ALL];
    S32 rounded[ALL], magnitudes = {};
#pragma GCC unroll 4
    for (int g = 0; g < ALL; g++) {
        const S32 code = codes.load(at + g * GROUP);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            F16 d = direction(g * GROUP + h * LANES) * by[g / GROUPS];
            if (decay != 0) d += to_float(widen_half(code, h)) * (decay * 65536.0f);
            distance[g].half[h] = d;
        }
        rounded[g] = moved(code, distance[g], index + g * GROUP, key);
        magnitudes = larger_magnitude(magnitudes, rounded[g]);
    }
    if (__builtin_expect(any_above(magnitudes, largest), 0)) {
        Distance copied[ALL];  // only here in memory, in registers otherwise
#pragma GCC unroll 4
        for (int g = 0; g < ALL; g++) copied[g] = distance[g];
        total = move_growing_blocks<BITS, GROUPS, BLOCKS>(codes, scales, largest, at, index, key, total, copied);
        return;
    }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
        I16 squares = {};
#pragma GCC unroll 4
        for (int g = b * GROUPS; g < (b + 1) * GROUPS; g++) {
            codes.store(at + g * GROUP, rounded[g]);
            squares += pair_squares(rounded[g]);
        }
        total += to_float(squares) * (wide[b] * wide[b]);
    }
}

}  // namespace
