// The innermost loop of the join: which of n fingerprints lie within distance k of one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slmfast {

constexpr std::size_t kScanBlock = 1024;  // most fingerprints in one call, so that hits fit a fixed buffer

// Writes the positions of the hits, ascending, and returns how many. hits holds kScanBlock.
using Scan = std::size_t (*)(std::uint64_t from, const std::uint64_t* to, std::size_t n, int k, std::uint32_t* hits);

inline std::size_t scan_scalar(std::uint64_t from, const std::uint64_t* to, std::size_t n, int k, std::uint32_t* hits) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        hits[count] = static_cast<std::uint32_t>(i);
        count += __builtin_popcountll(from ^ to[i]) <= k;
    }
    return count;
}

#if defined(__x86_64__)

// Popcount by nibbles from a table, summed over each 64-bit lane (Mula, Kurz and Lemire, 2018).
__attribute__((target("avx2,popcnt"))) inline std::size_t scan_avx2(std::uint64_t from, const std::uint64_t* to,
                                                                    std::size_t n, int k, std::uint32_t* hits) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i here = _mm256_set1_epi64x(static_cast<long long>(from));
    const __m256i limit = _mm256_set1_epi64x(k);
    std::size_t count = 0;
    std::size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const __m256i there = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + i));
        const __m256i x = _mm256_xor_si256(here, there);
        const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
        const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
        const __m256i bits = _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
        const __m256i far = _mm256_cmpgt_epi64(bits, limit);
        auto near = static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(far))) ^ 15u;
        for (; near != 0; near &= near - 1)
            hits[count++] = static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(__builtin_ctz(near));
    }
    for (; i < n; ++i) {
        hits[count] = static_cast<std::uint32_t>(i);
        count += __builtin_popcountll(from ^ to[i]) <= k;
    }
    return count;
}

__attribute__((target("avx512f,avx512vpopcntdq,popcnt"))) inline std::size_t scan_avx512(
    std::uint64_t from, const std::uint64_t* to, std::size_t n, int k, std::uint32_t* hits) {
    const __m512i here = _mm512_set1_epi64(static_cast<long long>(from));
    const __m512i limit = _mm512_set1_epi64(k);
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; i += 8) {
        const std::size_t left = n - i;
        const auto lanes = static_cast<__mmask8>(left >= 8 ? 0xFF : (1u << left) - 1);
        const __m512i there = _mm512_maskz_loadu_epi64(lanes, to + i);
        const __m512i bits = _mm512_popcnt_epi64(_mm512_xor_si512(here, there));
        unsigned near = _mm512_mask_cmple_epu64_mask(lanes, bits, limit);
        for (; near != 0; near &= near - 1)
            hits[count++] = static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(__builtin_ctz(near));
    }
    return count;
}

#endif

inline Scan scan_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return scan_avx512;
    if (isa == Isa::avx2) return scan_avx2;
#endif
    (void)isa;
    return scan_scalar;
}

}  // namespace slmfast
