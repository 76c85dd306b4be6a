#include "simhash.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>

#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
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

#define SLMFAST_AVX512BW __attribute__((target("avx512f,avx512bw")))

// At most kByteRun votes. The vote itself is the mask of one add into 64 byte counters.
SLMFAST_AVX512BW inline __m512i count_avx512(const std::uint64_t* votes, std::size_t count) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i counts = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; ++i) counts = _mm512_mask_add_epi8(counts, votes[i], counts, one);
    return counts;
}

SLMFAST_AVX512BW std::uint64_t majority_avx512(const std::uint64_t* votes, std::size_t count) {
    if (count <= kByteRun) {
        const __m512i counts = count_avx512(votes, count);
        const __m512i half = _mm512_set1_epi8(static_cast<char>(count / 2));
        return verdict(_mm512_cmpgt_epu8_mask(counts, half), _mm512_cmpeq_epu8_mask(counts, half), count);
    }
    std::uint64_t ones[64] = {};
    for (std::size_t begin = 0; begin < count; begin += kByteRun) {
        alignas(64) unsigned char bytes[64];
        _mm512_store_si512(bytes, count_avx512(votes + begin, std::min(count - begin, kByteRun)));
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += bytes[bit];
    }
    return verdict(ones, count);
}

#endif

// The common gram of three code points. Plain loops, so that the compiler makes vectors of them.
__attribute__((always_inline)) inline void trigram_hashes_of(const char32_t* c, std::size_t count,
                                                             std::uint64_t* out) {
    for (std::size_t i = 0; i < count; ++i)
        out[i] = mix(std::uint64_t{c[i]} | std::uint64_t{c[i + 1]} << 21 | std::uint64_t{c[i + 2]} << 42);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq,prefer-vector-width=512"))) void trigram_hashes_avx512(
    const char32_t* c, std::size_t count, std::uint64_t* out) {
    trigram_hashes_of(c, count, out);
}
#endif

void trigram_hashes(const char32_t* c, std::size_t count, Isa isa, std::uint64_t* out) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return trigram_hashes_avx512(c, count, out);
#endif
    (void)isa;
    trigram_hashes_of(c, count, out);
}

std::size_t gram_count(const CodePoints& text, int ngram) {
    return text.empty() ? 0 : text.size() - std::min(static_cast<std::size_t>(ngram), text.size()) + 1;
}

void hash_grams(const CodePoints& text, int ngram, Isa isa, std::uint64_t* out) {
    const std::size_t width = std::min(static_cast<std::size_t>(ngram), text.size());
    const std::size_t count = gram_count(text, ngram);
    const char32_t* c = text.data();
    if (width == 3) return trigram_hashes(c, count, isa, out);
    for (std::size_t i = 0; i < count; ++i) {
        std::uint64_t hash = 0;
        for (std::size_t j = 0; j < width; j += 3) {
            std::uint64_t word = 0;
            for (std::size_t part = j; part < std::min(width, j + 3); ++part)
                word |= std::uint64_t{c[i + part]} << (21 * (part - j));
            hash = mix(hash ^ word);
        }
        out[i] = hash;
    }
}

}  // namespace

void gram_hashes(const CodePoints& text, int ngram, Isa isa, std::vector<std::uint64_t>& out) {
    out.resize(gram_count(text, ngram));
    hash_grams(text, ngram, isa, out.data());
}

std::uint64_t majority(const std::uint64_t* votes, std::size_t count, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return majority_avx512(votes, count);
    if (isa == Isa::avx2) return majority_avx2(votes, count);
#endif
    (void)isa;
    return majority_scalar(votes, count);
}

bool few_distinct(const std::uint64_t* values, std::size_t count) {
    std::uint64_t seen[kEnoughFeatures];
    int distinct = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (std::find(seen, seen + distinct, values[i]) != seen + distinct) continue;
        seen[distinct++] = values[i];
        if (distinct == kEnoughFeatures) return false;
    }
    return true;
}

void fingerprints(const TextColumn& texts, bool normalised, int ngram, unsigned threads, Isa isa,
                  std::uint64_t* out, RowState* states) {
    constexpr std::size_t kGrain = 512;
    std::atomic<std::int64_t> first_bad{std::numeric_limits<std::int64_t>::max()};
    parallel_for(static_cast<std::size_t>(texts.size()), threads, kGrain,
                 [&](std::size_t begin, std::size_t end, unsigned) {
        CodePoints text;
        std::vector<std::uint64_t> grams;  // only ever grows, since what it grows by is cleared
        const auto first = static_cast<std::int64_t>(begin);
        texts.for_each(first, static_cast<std::int64_t>(end), [&](std::int64_t row, bool null, std::string_view bytes) {
            out[row] = 0;
            states[row] = RowState::null;
            if (null) return;
            const Decoded decoded = normalised ? decode(bytes, text, isa) : normalise(bytes, text, isa);
            if (decoded == Decoded::invalid) {
                std::int64_t known = first_bad.load();
                while (row < known && !first_bad.compare_exchange_weak(known, row)) {}
                return;
            }
            states[row] = decoded == Decoded::foreign ? RowState::foreign : RowState::empty;
            if (decoded == Decoded::foreign || text.empty()) return;
            const std::size_t votes = gram_count(text, ngram);
            if (votes > grams.size()) grams.resize(votes);
            hash_grams(text, ngram, isa, grams.data());
            out[row] = majority(grams.data(), votes, isa);
            states[row] = few_distinct(grams.data(), votes) ? RowState::few : RowState::full;
        });
    });
    if (first_bad.load() < texts.size())
        throw BadText("row " + std::to_string(first_bad.load()) +
                      " is not valid UTF-8: decode it with errors=\"replace\" or drop it first");
}

}  // namespace slmfast
