// A quicker first look at a small group: 32 bits of each fingerprint stand for all 64. What is near has near tags, so only
// rows whose tags have hits are looked at in full. Twice as many tags as fingerprints fit a vector, and sixteen rows at a
// time leave little beside the comparisons themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "near_scan.hpp"

namespace slmfast {

constexpr std::size_t kTagRows = 16;    // rows asked about at once
constexpr std::size_t kMostTags = 128;  // the largest group

// Writes the tag of each of n fingerprints, 0 < n <= kMostTags, and fills up the last kTagRows. A tag is four bytes of the
// fingerprint that cover as many bits of `telling` as such bytes can, from the lowest up.
using CutTags = void (*)(const std::uint64_t* fp, std::size_t n, std::uint64_t telling, std::uint32_t* tags);
// Bit r says that the tag of row from + r may lie within k of a later one of the n; without it none does.
using NearTags = unsigned (*)(const std::uint32_t* tags, std::size_t n, std::size_t from, int k);
// Writes the later ones of the n fingerprints that lie within k of that of `row`, ascending, and returns how many.
using WhichTags = std::size_t (*)(const std::uint32_t* tags, const std::uint64_t* fp, std::size_t n, std::size_t row,
                                  int k, std::uint32_t* hits);

struct TagScan {
    CutTags cut;
    NearTags near;
    WhichTags which;
};

#if defined(__x86_64__)

#define SLMFAST_AVX512_TAGS __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vpopcntdq,popcnt")))

SLMFAST_AVX512_TAGS inline void cut_tags_avx512(const std::uint64_t* fp, std::size_t n, std::uint64_t telling,
                                                std::uint32_t* tags) {
    std::uint64_t places = 0;
    for (int byte = 0; byte < 4 && telling != 0; ++byte) {
        const auto lowest = static_cast<unsigned>(__builtin_ctzll(telling));
        places |= std::uint64_t{lowest} << (8 * byte);
        telling &= ~(std::uint64_t{0xFF} << lowest);
    }
    const __m512i control = _mm512_set1_epi64(static_cast<long long>(places));
    for (std::size_t i = 0; i < n; i += 8) {
        const std::size_t left = n - i;
        const auto lanes = static_cast<__mmask8>(left >= 8 ? 0xFF : (1u << left) - 1);
        const __m512i picked = _mm512_multishift_epi64_epi8(control, _mm512_maskz_loadu_epi64(lanes, fp + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tags + i), _mm512_cvtepi64_epi32(picked));
    }
    const std::uint32_t filler = ~tags[n - 1];  // far from where tags lie close together
    for (std::size_t i = n; i % kTagRows != 0; ++i) tags[i] = filler;
}

SLMFAST_AVX512_TAGS inline __m512i tag_distance_avx512(__m512i a, __m512i b) {
    return _mm512_popcnt_epi32(_mm512_xor_si512(a, b));
}

SLMFAST_AVX512_TAGS inline __m512i every_lane_avx512(std::uint32_t value) {
    return _mm512_set1_epi32(static_cast<int>(value));
}

SLMFAST_AVX512_TAGS inline bool any_within_avx512(__m512i distances, int k) {
    return _mm512_cmple_epu32_mask(distances, _mm512_set1_epi32(k)) != 0;
}

// Which of sixteen rows lie within k of one of them that comes later.
SLMFAST_AVX512_TAGS inline unsigned near_one_another_avx512(const std::uint32_t* rows, int k) {
    const __m512i here = _mm512_loadu_si512(rows);
    unsigned near = 0;
    for (unsigned r = 0; r + 1 < kTagRows; ++r) {
        const __m512i distance = tag_distance_avx512(every_lane_avx512(rows[r]), here);
        const auto later = static_cast<__mmask16>(0xFFFEu << r);
        near |= unsigned{_mm512_mask_cmple_epu32_mask(later, distance, _mm512_set1_epi32(k)) != 0} << r;
    }
    return near;
}

SLMFAST_AVX512_TAGS inline unsigned near_tags_avx512(const std::uint32_t* tags, std::size_t n, std::size_t from, int k) {
    const std::uint32_t* rows = tags + from;
    const __m512i here = _mm512_loadu_si512(rows);
    const __m512i one = every_lane_avx512(1);
    __m512i turn = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0);
    __m512i within = every_lane_avx512(32);
    for (int by = 1; by <= 8; ++by) {  // turned by one to eight places, each of the sixteen meets each other
        within = _mm512_min_epu32(within, tag_distance_avx512(here, _mm512_permutexvar_epi32(turn, here)));
        turn = _mm512_add_epi32(turn, one);
    }
    __m512i least[8];  // two rows at a time, as in near_rows_avx512
    for (__m512i& two : least) two = every_lane_avx512(32);
    for (std::size_t j = from + kTagRows; j < n; j += kTagRows) {
        const __m512i there = _mm512_loadu_si512(tags + j);
        for (std::size_t r = 0; r < kTagRows; ++r)
            least[r / 2] = _mm512_min_epu32(least[r / 2], tag_distance_avx512(every_lane_avx512(rows[r]), there));
    }
    __m512i all = within;
    for (const __m512i& two : least) all = _mm512_min_epu32(all, two);
    if (!any_within_avx512(all, k)) return 0;
    unsigned near = any_within_avx512(within, k) ? near_one_another_avx512(rows, k) : 0;
    for (int two = 0; two < 8; ++two) near |= (any_within_avx512(least[two], k) ? 3u : 0u) << (2 * two);
    const std::size_t real = n - from;
    return real >= kTagRows ? near : near & ((1u << real) - 1);
}

SLMFAST_AVX512_TAGS inline std::size_t which_tags_avx512(const std::uint32_t* tags, const std::uint64_t* fp,
                                                         std::size_t n, std::size_t row, int k, std::uint32_t* hits) {
    const __m512i tag = every_lane_avx512(tags[row]);
    const __m512i limit = _mm512_set1_epi32(k);
    std::size_t count = 0;
    for (std::size_t j = row / kTagRows * kTagRows; j < n; j += kTagRows) {
        unsigned near = _mm512_cmple_epu32_mask(tag_distance_avx512(tag, _mm512_loadu_si512(tags + j)), limit);
        if (j <= row) near &= 0xFFFEu << (row - j);
        if (j + kTagRows > n) near &= (1u << (n - j)) - 1;
        for (; near != 0; near &= near - 1) {
            const std::size_t other = j + static_cast<std::size_t>(__builtin_ctz(near));
            hits[count] = static_cast<std::uint32_t>(other);
            count += __builtin_popcountll(fp[row] ^ fp[other]) <= k;
        }
    }
    return count;
}

#endif

// Without AVX-512 all members are null: whole fingerprints are as quick there.
inline TagScan tag_scan(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return {cut_tags_avx512, near_tags_avx512, which_tags_avx512};
#endif
    (void)isa;
    return {nullptr, nullptr, nullptr};
}

}  // namespace slmfast
