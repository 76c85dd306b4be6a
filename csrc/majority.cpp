#include "majority.hpp"

#include <algorithm>

#include "simhash.hpp"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, on registers it means to leave undefined
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace slmfast {
namespace {

std::uint64_t verdict(const std::uint64_t (&ones)[64], std::uint64_t votes) {
    std::uint64_t bits = 0;
    for (unsigned bit = 0; bit < 64; ++bit) {
        const std::uint64_t twice = 2 * ones[bit];
        const std::uint64_t value = twice == votes ? bit & 1 : twice > votes;
        bits |= value << bit;
    }
    return bits;
}

std::uint64_t majority_scalar(const std::uint64_t* votes, std::size_t count) {
    std::uint64_t ones[64] = {};
    for (std::size_t i = 0; i < count; ++i)
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += votes[i] >> bit & 1;
    return verdict(ones, count);
}

#if defined(__x86_64__)

constexpr std::size_t kByteRun = 255;  // votes that a byte counter holds

constexpr std::uint64_t kOddBits = 0xAAAAAAAAAAAAAAAAu;  // a tied bit b is b & 1

// Bits of which more than half of the votes are ones, from two masks over one count a bit: above half, and equal to it.
std::uint64_t verdict(std::uint64_t above, std::uint64_t equal, std::size_t votes) {
    return votes % 2 == 0 ? above | (equal & kOddBits) : above;
}

#define SLMFAST_AVX2 __attribute__((target("avx2")))

struct ByteCounts {  // of bits 0 to 31 and 32 to 63
    __m256i low;
    __m256i high;
};

// At most kByteRun votes. Each byte of a vote is spread over eight lanes, and each lane tests one bit.
SLMFAST_AVX2 inline ByteCounts count_avx2(const std::uint64_t* votes, std::size_t count) {
    const __m256i spread_low = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                                2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i spread_high = _mm256_add_epi8(spread_low, _mm256_set1_epi8(4));
    const __m256i lane_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    ByteCounts counts{_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (std::size_t i = 0; i < count; ++i) {
        const __m256i vote = _mm256_set1_epi64x(static_cast<long long>(votes[i]));
        const __m256i a = _mm256_and_si256(_mm256_shuffle_epi8(vote, spread_low), lane_bit);
        const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(vote, spread_high), lane_bit);
        counts.low = _mm256_sub_epi8(counts.low, _mm256_cmpeq_epi8(a, lane_bit));
        counts.high = _mm256_sub_epi8(counts.high, _mm256_cmpeq_epi8(b, lane_bit));
    }
    return counts;
}

SLMFAST_AVX2 inline std::uint64_t equal_bytes(const ByteCounts& a, __m256i low, __m256i high) {
    const auto first = static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.low, low)));
    const auto second = static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.high, high)));
    return first | std::uint64_t{second} << 32;
}

SLMFAST_AVX2 std::uint64_t majority_avx2(const std::uint64_t* votes, std::size_t count) {
    if (count <= kByteRun) {
        const ByteCounts counts = count_avx2(votes, count);
        const __m256i half = _mm256_set1_epi8(static_cast<char>(count / 2));
        const std::uint64_t not_above =
            equal_bytes(counts, _mm256_min_epu8(counts.low, half), _mm256_min_epu8(counts.high, half));
        return verdict(~not_above, equal_bytes(counts, half, half), count);
    }
    std::uint64_t ones[64] = {};
    for (std::size_t begin = 0; begin < count; begin += kByteRun) {
        const ByteCounts counts = count_avx2(votes + begin, std::min(count - begin, kByteRun));
        alignas(32) unsigned char bytes[64];
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), counts.low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 32), counts.high);
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += bytes[bit];
    }
    return verdict(ones, count);
}

#define SLMFAST_VOTES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vbmi,avx512bitalg,gfni")))
#define SLMFAST_VOTES_INLINE SLMFAST_VOTES __attribute__((always_inline)) inline

constexpr std::size_t kStep = 16;  // votes counted at once
constexpr std::size_t kStepsRun = kByteRun / kStep * kStep;  // votes in whole steps that a byte counter holds

SLMFAST_VOTES_INLINE __m512i all_lanes(std::uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }

// How many of eight votes have each bit set, one byte a bit. The permutation brings byte j of all votes to lane j, an
// 8 x 8 matrix of bits whose columns are to be counted; the affine map by the unit matrix turns it by a quarter.
SLMFAST_VOTES_INLINE __m512i ones_of_eight(__m512i votes) {
    const __m512i by_byte = _mm512_set_epi8(  //
        63, 55, 47, 39, 31, 23, 15, 7, 62, 54, 46, 38, 30, 22, 14, 6, 61, 53, 45, 37, 29, 21, 13, 5, 60, 52, 44, 36, 28,
        20, 12, 4, 59, 51, 43, 35, 27, 19, 11, 3, 58, 50, 42, 34, 26, 18, 10, 2, 57, 49, 41, 33, 25, 17, 9, 1, 56, 48,
        40, 32, 24, 16, 8, 0);
    const __m512i unit = all_lanes(0x8040201008040201u);
    const __m512i columns = _mm512_gf2p8affine_epi64_epi8(unit, _mm512_permutexvar_epi8(by_byte, votes), 0);
    return _mm512_popcnt_epi8(columns);
}

struct Step {  // kStep votes in any order
    __m512i first;
    __m512i second;
};

SLMFAST_VOTES_INLINE __mmask8 low_lanes(std::size_t count) { return static_cast<__mmask8>((1u << count) - 1); }

class StoredVotes {
public:
    explicit StoredVotes(const std::uint64_t* votes) : votes_(votes) {}

    SLMFAST_VOTES_INLINE Step step(std::size_t at) const {
        return {_mm512_loadu_si512(votes_ + at), _mm512_loadu_si512(votes_ + at + 8)};
    }

    // The last `count` votes, under kStep of them; the others are 0 and so change no count.
    SLMFAST_VOTES_INLINE Step last(std::size_t at, std::size_t count) const {
        const std::size_t first = std::min<std::size_t>(count, 8);
        return {_mm512_maskz_loadu_epi64(low_lanes(first), votes_ + at),
                _mm512_maskz_loadu_epi64(low_lanes(count - first), votes_ + at + 8)};
    }

private:
    const std::uint64_t* votes_;
};

static_assert(kReadBeyond >= kStep + 4);  // what TrigramVotes reads where no window is left

class TrigramVotes {
public:
    explicit TrigramVotes(const char32_t* code_points) : c_(code_points) {}

    // A lane of 64 bits holds two neighbours, of which even windows begin with the lower one and odd with the upper.
    SLMFAST_VOTES_INLINE Step step(std::size_t at) const {
        const __m512i here = _mm512_loadu_si512(c_ + at);
        const __m512i next = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c_ + at + kStep)));
        return {hashes(here, _mm512_alignr_epi32(next, here, 2)),
                hashes(_mm512_alignr_epi32(next, here, 1), _mm512_alignr_epi32(next, here, 3))};
    }

    SLMFAST_VOTES_INLINE Step last(std::size_t at, std::size_t count) const {
        const Step votes = step(at);
        return {_mm512_maskz_mov_epi64(low_lanes((count + 1) / 2), votes.first),
                _mm512_maskz_mov_epi64(low_lanes(count / 2), votes.second)};
    }

private:
    // Of one window a lane: its first two code points, and in the lower half the third; what is above that falls out.
    SLMFAST_VOTES_INLINE static __m512i hashes(__m512i pairs, __m512i thirds) {
        constexpr int kChoose = 0xCA;  // the first's bits say whether the second's or the third's is taken
        const __m512i packed = _mm512_ternarylogic_epi64(all_lanes((1u << 21) - 1), pairs,  //
                                                         _mm512_srli_epi64(pairs, 32 - 21), kChoose);
        __m512i z = _mm512_or_si512(packed, _mm512_slli_epi64(thirds, 42));
        z = _mm512_add_epi64(z, all_lanes(0x9e3779b97f4a7c15u));  // from here on: mix of simhash.hpp
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), all_lanes(0xbf58476d1ce4e5b9u));
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), all_lanes(0x94d049bb133111ebu));
        return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    }

    const char32_t* c_;
};

// Of `count` votes, at most kByteRun, how many have each bit set.
template <class Votes>
SLMFAST_VOTES_INLINE __m512i count_avx512(const Votes& votes, std::size_t begin, std::size_t count) {
    __m512i counts = _mm512_setzero_si512();
    std::size_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        const Step step = votes.step(begin + i);
        counts = _mm512_add_epi8(counts, _mm512_add_epi8(ones_of_eight(step.first), ones_of_eight(step.second)));
    }
    const Step last = votes.last(begin + i, count - i);
    return _mm512_add_epi8(counts, _mm512_add_epi8(ones_of_eight(last.first), ones_of_eight(last.second)));
}

template <class Votes>
SLMFAST_VOTES_INLINE std::uint64_t majority_of(const Votes& votes, std::size_t count) {
    if (count <= kByteRun) {
        const __m512i counts = count_avx512(votes, 0, count);
        const __m512i half = _mm512_set1_epi8(static_cast<char>(count / 2));
        return verdict(_mm512_cmpgt_epu8_mask(counts, half), _mm512_cmpeq_epu8_mask(counts, half), count);
    }
    std::uint64_t ones[64] = {};
    for (std::size_t begin = 0; begin < count; begin += kStepsRun) {
        alignas(64) unsigned char bytes[64];
        _mm512_store_si512(bytes, count_avx512(votes, begin, std::min(count - begin, kStepsRun)));
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += bytes[bit];
    }
    return verdict(ones, count);
}

SLMFAST_VOTES std::uint64_t majority_avx512(const std::uint64_t* votes, std::size_t count) {
    return majority_of(StoredVotes(votes), count);
}

#endif

}  // namespace

std::uint64_t majority(const std::uint64_t* votes, std::size_t count, Isa isa) {
    if (count == 1) return votes[0];
#if defined(__x86_64__)
    if (isa == Isa::avx512) return majority_avx512(votes, count);
    if (isa == Isa::avx2) return majority_avx2(votes, count);
#endif
    (void)isa;
    return majority_scalar(votes, count);
}

#if defined(__x86_64__)
SLMFAST_VOTES std::uint64_t trigram_majority_avx512(const char32_t* c, std::size_t count) {
    return majority_of(TrigramVotes(c), count);
}
#endif

}  // namespace slmfast
