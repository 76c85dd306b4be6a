// The innermost loops of the join: whether any two of some fingerprints lie within distance k, and which.
//
// Hits are rare, so the fast question is "is there any near these few rows": popcounts are folded into a running
// minimum for each row, and only rows with a hit are asked which they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "isa.hpp"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, on registers it means to leave undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace slmfast {

constexpr std::size_t kScanBlock = 1024;  // most fingerprints in one call of `which`, so that hits fit a fixed buffer

// Some rows side by side: bit r of `near` says that row at + r may have a hit; without it there is none.
struct Rows {
    std::size_t at;
    unsigned near;

    // Calls visit(row) for each that may have a hit.
    template <class Visit>
    void each_near(Visit&& visit) const {
        for (unsigned left = near; left != 0; left &= left - 1) visit(at + static_cast<std::size_t>(__builtin_ctz(left)));
    }
};

// Rows are taken some at a time. From row `from` on, which starts such a batch: the first batch that has a row within k
// of a later one of the n (of any of b), or {the number of rows, 0}.
using FirstWithin = Rows (*)(const std::uint64_t* fp, std::size_t n, int k, std::size_t from);
using FirstBetween = Rows (*)(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b, std::size_t n_b, int k,
                              std::size_t from);
// Writes the positions in `to` that lie within k of `from`, ascending, and returns how many. hits holds kScanBlock.
using Which = std::size_t (*)(std::uint64_t from, const std::uint64_t* to, std::size_t n, int k, std::uint32_t* hits);

struct NearScan {
    FirstWithin first_within;
    FirstBetween first_between;
    Which which;
    std::size_t batch;
};

inline std::size_t which_scalar(std::uint64_t from, const std::uint64_t* to, std::size_t n, int k,
                                std::uint32_t* hits) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        hits[count] = static_cast<std::uint32_t>(i);
        count += __builtin_popcountll(from ^ to[i]) <= k;
    }
    return count;
}

inline Rows first_between_scalar(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b, std::size_t n_b, int k,
                                 std::size_t from) {
    for (; from < n_a; ++from)
        for (std::size_t j = 0; j < n_b; ++j)
            if (__builtin_popcountll(a[from] ^ b[j]) <= k) return {from, 1};
    return {n_a, 0};
}

inline Rows first_within_scalar(const std::uint64_t* fp, std::size_t n, int k, std::size_t from) {
    for (; from < n; ++from)
        if (first_between_scalar(fp + from, 1, fp + from + 1, n - from - 1, k, 0).near != 0) return {from, 1};
    return {n, 0};
}

#if defined(__x86_64__)

#define SLMFAST_AVX2 __attribute__((target("avx2,popcnt")))

// Popcount by nibbles from a table, summed over each 64-bit lane (Mula, Kurz and Lemire, 2018).
SLMFAST_AVX2 inline __m256i distance_avx2(__m256i a, __m256i b) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i x = _mm256_xor_si256(a, b);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
    return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}

SLMFAST_AVX2 inline __m256i broadcast_avx2(std::uint64_t value) {
    return _mm256_set1_epi64x(static_cast<long long>(value));
}

SLMFAST_AVX2 inline __m256i load_avx2(const std::uint64_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

SLMFAST_AVX2 inline std::size_t which_avx2(std::uint64_t from, const std::uint64_t* to,
                                                                     std::size_t n, int k, std::uint32_t* hits) {
    const __m256i here = broadcast_avx2(from);
    const __m256i limit = _mm256_set1_epi64x(k);
    std::size_t count = 0;
    std::size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const __m256i far = _mm256_cmpgt_epi64(distance_avx2(here, load_avx2(to + i)), limit);
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

SLMFAST_AVX2 inline unsigned any_below_avx2(__m256i beyond, __m256i least) {
    return _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(beyond, least))) != 0;
}

// Which of up to four rows lie within k of any of b.
SLMFAST_AVX2 inline unsigned near_rows_avx2(const std::uint64_t* rows, std::size_t count, const std::uint64_t* b,
                                            std::size_t n_b, int k) {
    const __m256i beyond = _mm256_set1_epi64x(k + 1);
    const std::size_t whole = n_b / 4 * 4;
    const __m256i row0 = broadcast_avx2(rows[0]);
    const __m256i row1 = broadcast_avx2(rows[std::min<std::size_t>(1, count - 1)]);
    const __m256i row2 = broadcast_avx2(rows[std::min<std::size_t>(2, count - 1)]);
    const __m256i row3 = broadcast_avx2(rows[count - 1]);
    __m256i least0 = beyond, least1 = beyond, least2 = beyond, least3 = beyond;
    for (std::size_t j = 0; j < whole; j += 4) {
        const __m256i there = load_avx2(b + j);
        least0 = _mm256_min_epu16(least0, distance_avx2(row0, there));
        least1 = _mm256_min_epu16(least1, distance_avx2(row1, there));
        least2 = _mm256_min_epu16(least2, distance_avx2(row2, there));
        least3 = _mm256_min_epu16(least3, distance_avx2(row3, there));
    }
    unsigned near = any_below_avx2(beyond, least0) | any_below_avx2(beyond, least1) << 1 |
                    any_below_avx2(beyond, least2) << 2 | any_below_avx2(beyond, least3) << 3;
    near &= (1u << count) - 1;  // rows past the end repeat the last one
    for (std::size_t r = 0; r < count; ++r)
        near |= first_between_scalar(rows + r, 1, b + whole, n_b - whole, k, 0).near << r;
    return near;
}

SLMFAST_AVX2 inline Rows first_between_avx2(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b,
                                            std::size_t n_b, int k, std::size_t from) {
    for (; from < n_a; from += 4) {
        const unsigned near = near_rows_avx2(a + from, std::min<std::size_t>(4, n_a - from), b, n_b, k);
        if (near != 0) return {from, near};
    }
    return {n_a, 0};
}

SLMFAST_AVX2 inline Rows first_within_avx2(const std::uint64_t* fp, std::size_t n, int k, std::size_t from) {
    for (; from < n; from += 4) {
        const std::size_t rows = std::min<std::size_t>(4, n - from);
        unsigned near = near_rows_avx2(fp + from, rows, fp + from + rows, n - from - rows, k);
        for (std::size_t r = 0; r + 1 < rows; ++r)
            near |= first_between_scalar(fp + from + r, 1, fp + from + r + 1, rows - r - 1, k, 0).near << r;
        if (near != 0) return {from, near};
    }
    return {n, 0};
}

#define SLMFAST_AVX512 __attribute__((target("avx512f,avx512vpopcntdq,popcnt")))

SLMFAST_AVX512 inline __m512i distance_avx512(std::uint64_t row, __m512i there) {
    return _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_set1_epi64(static_cast<long long>(row)), there));
}

SLMFAST_AVX512 inline std::size_t which_avx512(std::uint64_t from, const std::uint64_t* to, std::size_t n, int k,
                                               std::uint32_t* hits) {
    const __m512i limit = _mm512_set1_epi64(k);
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; i += 8) {
        const std::size_t left = n - i;
        const auto lanes = static_cast<__mmask8>(left >= 8 ? 0xFF : (1u << left) - 1);
        const __m512i there = _mm512_maskz_loadu_epi64(lanes, to + i);
        unsigned near = _mm512_mask_cmple_epu64_mask(lanes, distance_avx512(from, there), limit);
        for (; near != 0; near &= near - 1)
            hits[count++] = static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(__builtin_ctz(near));
    }
    return count;
}

// Which of eight rows may lie within k of any of b: two rows at a time, since telling every row from the others takes
// more instructions where nothing is near, and telling none of them more where something is.
SLMFAST_AVX512 inline unsigned near_rows_avx512(const std::uint64_t* rows, const std::uint64_t* b, std::size_t n_b,
                                                int k) {
    __m512i least[4];  // distances, lane by lane
    for (__m512i& two : least) two = _mm512_set1_epi64(64);
    for (std::size_t j = 0; j < n_b; j += 8) {
        const std::size_t left = n_b - j;
        const auto lanes = static_cast<__mmask8>(left >= 8 ? 0xFF : (1u << left) - 1);
        // Lanes past the end repeat b[j]: no pair is made up.
        const __m512i there = _mm512_mask_loadu_epi64(_mm512_set1_epi64(static_cast<long long>(b[j])), lanes, b + j);
        for (int r = 0; r < 8; ++r) least[r / 2] = _mm512_min_epu64(least[r / 2], distance_avx512(rows[r], there));
    }
    const __m512i limit = _mm512_set1_epi64(k);
    const __m512i all = _mm512_min_epu64(_mm512_min_epu64(least[0], least[1]), _mm512_min_epu64(least[2], least[3]));
    if (_mm512_cmple_epu64_mask(all, limit) == 0) return 0;
    unsigned near = 0;
    for (int two = 0; two < 4; ++two)
        near |= (_mm512_cmple_epu64_mask(least[two], limit) != 0 ? 3u : 0u) << (2 * two);
    return near;
}

SLMFAST_AVX512 inline Rows first_between_avx512(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b,
                                                std::size_t n_b, int k, std::size_t from) {
    for (; from < n_a; from += 8) {
        std::uint64_t rows[8];
        for (std::size_t r = 0; r < 8; ++r) rows[r] = a[std::min(from + r, n_a - 1)];
        const unsigned real = (1u << std::min<std::size_t>(8, n_a - from)) - 1;
        const unsigned near = near_rows_avx512(rows, b, n_b, k) & real;
        if (near != 0) return {from, near};
    }
    return {n_a, 0};
}

SLMFAST_AVX512 inline Rows first_within_avx512(const std::uint64_t* fp, std::size_t n, int k, std::size_t from) {
    const __m512i limit = _mm512_set1_epi64(k);
    for (; from < n; from += 8) {
        const std::size_t rows = std::min<std::size_t>(8, n - from);
        const auto valid = static_cast<__mmask8>((1u << rows) - 1);
        const __m512i here = _mm512_maskz_loadu_epi64(valid, fp + from);
        unsigned near = rows == 8 ? near_rows_avx512(fp + from, fp + from + 8, n - from - 8, k) : 0;
        const auto later = [&](unsigned r) { return static_cast<__mmask8>((0xFEu << r) & valid); };
        __m512i least = _mm512_set1_epi64(64);  // each of the eight with those after it
        for (unsigned r = 0; r + 1 < rows; ++r)
            least = _mm512_mask_min_epu64(least, later(r), least, distance_avx512(fp[from + r], here));
        if (_mm512_cmple_epu64_mask(least, limit) != 0) {
            for (unsigned r = 0; r + 1 < rows; ++r) {
                const __m512i distance = distance_avx512(fp[from + r], here);
                near |= unsigned{_mm512_mask_cmple_epu64_mask(later(r), distance, limit) != 0} << r;
            }
        }
        if (near != 0) return {from, near};
    }
    return {n, 0};
}

#endif

inline NearScan near_scan(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return {first_within_avx512, first_between_avx512, which_avx512, 8};
    if (isa == Isa::avx2) return {first_within_avx2, first_between_avx2, which_avx2, 4};
#endif
    (void)isa;
    return {first_within_scalar, first_between_scalar, which_scalar, 1};
}

}  // namespace slmfast
