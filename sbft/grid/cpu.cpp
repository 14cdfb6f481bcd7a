// Weights on a grid in the CPU's memory: reading their values, and quantizing. Compiled on first use by cpu.py.

#include "blocks.h"

namespace {

// Values that are read back

inline void store_values(float* to, F16 first, F16 second) {
    memcpy(to, &first, sizeof first);
    memcpy(to + LANES, &second, sizeof second);
}

#if !(defined(__AVX512BF16__) && defined(__AVX512BW__))
inline H16 round_to_bf16(F16 v) {  // to nearest, ties to even
    U16 bits = (U16)v;
    bits += 0x7FFFu + ((bits >> 16) & 1u);
    bits = v != v ? U16{} + 0x7FC00000u : bits;
    return narrow(bits >> 16);
}
#endif

inline void store_values(bf16* to, F16 first, F16 second) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    // It takes numbers below 2^-126 for zero, which no code times a scale is.
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    memcpy(to, &both, sizeof both);
#else
    const H16 both[2] = {round_to_bf16(first), round_to_bf16(second)};
    memcpy(to, both, sizeof both);
#endif
}

// `count` elements from `at` on; both are multiples of 32, and `at` of the block.
template <int BITS, class T>
inline void read_values(const Planes& w, int64_t at, int64_t count, T* to) {
    const Codes<BITS> codes{w.codes, w.low};
    const uint16_t* scale = w.scales + at / w.block;
    for (int64_t begin = 0; begin < count; begin += w.block, scale++) {
        const float wide = half_to_float(*scale);
        for (int64_t j = begin; j < begin + w.block; j += GROUP) {
            const S32 code = codes.load(at + j);
            store_values(to + j, to_float(widen_half(code, 0)) * wide, to_float(widen_half(code, 1)) * wide);
        }
    }
}

constexpr int64_t RUN = 32768;

template <int BITS, class T>
void dequantize(const Planes& w, int64_t count, T* to, int threads) {
    const int64_t run = std::max(w.block, RUN / w.block * w.block);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < count; begin += run)
        read_values<BITS>(w, begin, std::min(run, count - begin), to + begin);
}

template <int BITS, class T>
void gather(const Planes& w, const int64_t* index, int64_t indices, int64_t row, T* to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < indices; i++) read_values<BITS>(w, index[i] * row, row, to + i * row);
}

// Quantizing, as codes.py defines it

template <int BITS, class T>
void quantize(const Planes& w, const T* from, int64_t count, int threads) {
    const Codes<BITS> codes{w.codes, w.low};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < count; begin += w.block) {
        U16 most = {};
        for (int64_t j = begin; j < begin + w.block; j += LANES)
            most = larger(most, (U16)load(from + j) & 0x7FFFFFFFu);  // ordered as the numbers are; NaN is above infinity
        uint32_t bits = 0;
        for (int i = 0; i < LANES; i++) bits = std::max<uint32_t>(bits, most[i]);
        const uint16_t scale = w.scales[begin / w.block] = smallest_scale(bits_as<float>(bits), w.largest);
        const F16 wide = splat(half_to_float(scale));
        for (int64_t j = begin; j < begin + w.block; j += GROUP) {
            const I16 first = to_int(load(from + j) / wide), second = to_int(load(from + j + LANES) / wide);
            codes.store(j, scale == HALF_NAN ? S32{} : upper_halves((U16)first << 16, (U16)second << 16));
        }
    }
}

}  // namespace

// What cpu.py calls.

extern "C" {

#define FOR_BITS(CALL)                 \
    switch (w->bits) {                 \
        case 4: CALL(4); break;        \
        case 8: CALL(8); break;        \
        default: CALL(12);             \
    }

// `count` elements from the first on.
void sbft_dequantize(const Planes* w, int64_t count, void* to, int32_t is_bf16, int32_t threads) {
#define CALL(BITS)                                               \
    if (is_bf16) dequantize<BITS>(*w, count, (bf16*)to, threads); \
    else dequantize<BITS>(*w, count, (float*)to, threads)
    FOR_BITS(CALL)
#undef CALL
}

// Entries of `row` elements each. Returns the position of the first index that is out of range, or -1 if none is.
int64_t sbft_gather(const Planes* w, int64_t entries, int64_t row, const int64_t* index, int64_t indices, void* to,
                    int32_t is_bf16, int32_t threads) {
    for (int64_t i = 0; i < indices; i++)
        if (index[i] < 0 || index[i] >= entries) return i;
#define CALL(BITS)                                                             \
    if (is_bf16) gather<BITS>(*w, index, indices, row, (bf16*)to, threads);    \
    else gather<BITS>(*w, index, indices, row, (float*)to, threads)
    FOR_BITS(CALL)
#undef CALL
    return -1;
}

void sbft_quantize(const Planes* w, const void* from, int64_t count, int32_t is_bf16, int32_t threads) {
#define CALL(BITS)                                                  \
    if (is_bf16) quantize<BITS>(*w, (const bf16*)from, count, threads); \
    else quantize<BITS>(*w, (const float*)from, count, threads)
    FOR_BITS(CALL)
#undef CALL
}
}
