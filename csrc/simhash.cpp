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

constexpr char32_t kForeign = 0xFFFFFFFF;

bool between(char32_t c, char32_t first, char32_t last) { return c - first <= last - first; }

// The Latin-1 signs from U+00A0 to U+00BF: themselves, a compatibility character, or 0 for those left to Python.
constexpr char32_t kLatinSigns[32] = {
    0x20, 0xA1, 0xA2, 0xA3, 0xA4, 0xA5,  0xA6, 0xA7, 0,    0xA9, 'a', 0xAB, 0xAC, 0xAD, 0xAE, 0,
    0xB0, 0xB1, '2',  '3',  0,    0x3BC, 0xB6, 0xB7, 0,    '1',  'o', 0xBB, 0,    0,    0,    0xBF,
};

char32_t normal_latin(char32_t c) {  // U+0080 to U+00FF
    if (c < 0xA0) return c;
    if (c < 0xC0) return kLatinSigns[c - 0xA0] != 0 ? kLatinSigns[c - 0xA0] : kForeign;
    return c < 0xDF && c != 0xD7 ? c + 0x20 : c;
}

// Ranges in which every code point is its own normal form and never composes with a neighbour from any range here.
bool stable_symbol(char32_t c) {
    if (between(c, 0x2000, 0x20FF))
        return between(c, 0x200B, 0x2010) || between(c, 0x2012, 0x2016) || between(c, 0x2018, 0x2023) ||
               between(c, 0x2030, 0x2032) || c == 0x20AC || c == 0x203B;
    if (between(c, 0x2190, 0x222B) || between(c, 0x2231, 0x2328) || between(c, 0x2500, 0x2767)) return true;
    return c == 0xFE0F || between(c, 0x1F300, 0x1F64F) || between(c, 0x1F680, 0x1F6FF) || between(c, 0x1F900, 0x1F9FF);
}

bool stable_cjk(char32_t c) {
    return between(c, 0x4E00, 0x9FFF) || between(c, 0x3400, 0x4DBF) || between(c, 0x3001, 0x3029) ||
           between(c, 0x3041, 0x3096) || between(c, 0x30A1, 0x30FE) || between(c, 0xAC00, 0xD7A3) ||
           between(c, 0x20000, 0x2A6DF);
}

char32_t normal_letter(char32_t c) {  // Greek without the context-dependent capital sigma, and Cyrillic
    if (between(c, 0x391, 0x3A1) || between(c, 0x3A4, 0x3A9)) return c + 0x20;
    if (between(c, 0x3B1, 0x3C9)) return c;
    if (between(c, 0x410, 0x42F)) return c + 0x20;
    return between(c, 0x430, 0x44F) ? c : kForeign;
}

char32_t lower_ascii(char32_t c) { return between(c, 'A', 'Z') ? c + 0x20 : c; }

char32_t normal_form(char32_t c) {
    if (c < 0x80) return lower_ascii(c);
    if (stable_cjk(c)) return c;
    if (between(c, 0xFF01, 0xFF5E)) return lower_ascii(c - 0xFEE0);
    if (c < 0x100) return normal_latin(c);
    if (c == 0x3000 || between(c, 0x2000, 0x200A)) return 0x20;
    if (c == 0x2011) return 0x2010;
    if (c == 0xFFE5) return 0xA5;
    if (between(c, 0x2460, 0x2468)) return c - 0x2460 + '1';
    if (stable_symbol(c)) return c;
    return normal_letter(c);
}

// Reads one code point that is not ASCII and moves past it; kForeign where the bytes are not UTF-8.
char32_t next_code_point(const unsigned char*& at, const unsigned char* end) {
    const auto follows = [&](int i) { return at + i < end && (at[i] & 0xC0) == 0x80; };
    const char32_t first = *at;
    if (between(first, 0xC2, 0xDF) && follows(1)) {
        const char32_t c = (first & 0x1F) << 6 | (at[1] & 0x3Fu);
        at += 2;
        return c;
    }
    if (between(first, 0xE0, 0xEF) && follows(1) && follows(2)) {
        const char32_t c = (first & 0x0F) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu);
        at += 3;
        return c < 0x800 || between(c, 0xD800, 0xDFFF) ? kForeign : c;
    }
    if (between(first, 0xF0, 0xF4) && follows(1) && follows(2) && follows(3)) {
        const char32_t c = (first & 0x07) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu);
        at += 4;
        return c < 0x10000 || c > 0x10FFFF ? kForeign : c;
    }
    return kForeign;
}

template <bool Normalise>
Decoded read(std::string_view text, CodePoints& out) {
    out.resize(text.size());  // no character has a longer normal form here than it has bytes
    char32_t* to = out.data();
    bool foreign = false;
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const unsigned char* const end = at + text.size();
    while (at < end) {
        if (*at < 0x80) {
            *to++ = Normalise ? lower_ascii(*at) : *at;
            ++at;
            continue;
        }
        const char32_t c = next_code_point(at, end);
        if (c == kForeign) return Decoded::invalid;
        if (!Normalise) {
            *to++ = c;
        } else if (between(c, 0x2024, 0x2026)) {  // one, two or three dots
            for (char32_t dots = 0x2024; dots <= c; ++dots) *to++ = '.';
        } else {
            *to = normal_form(c);
            foreign |= *to++ == kForeign;
        }
    }
    out.resize(static_cast<std::size_t>(to - out.data()));
    return foreign ? Decoded::foreign : Decoded::ok;
}

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

// 64 byte counters in two registers: each byte of the vote is spread over eight lanes, and each lane tests one bit.
__attribute__((target("avx2"))) std::uint64_t majority_avx2(const std::uint64_t* votes, std::size_t count) {
    const __m256i spread_low = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                                2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i spread_high = _mm256_add_epi8(spread_low, _mm256_set1_epi8(4));
    const __m256i lane_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    std::uint64_t ones[64] = {};
    for (std::size_t begin = 0; begin < count; begin += kByteRun) {
        const std::size_t end = std::min(count, begin + kByteRun);
        __m256i low = _mm256_setzero_si256();
        __m256i high = low;
        for (std::size_t i = begin; i < end; ++i) {
            const __m256i vote = _mm256_set1_epi64x(static_cast<long long>(votes[i]));
            const __m256i a = _mm256_and_si256(_mm256_shuffle_epi8(vote, spread_low), lane_bit);
            const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(vote, spread_high), lane_bit);
            low = _mm256_sub_epi8(low, _mm256_cmpeq_epi8(a, lane_bit));
            high = _mm256_sub_epi8(high, _mm256_cmpeq_epi8(b, lane_bit));
        }
        alignas(32) unsigned char counts[64];
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts + 32), high);
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += counts[bit];
    }
    return verdict(ones, count);
}

// The vote itself is the mask of one add into 64 byte counters.
__attribute__((target("avx512f,avx512bw"))) std::uint64_t majority_avx512(const std::uint64_t* votes,
                                                                          std::size_t count) {
    const __m512i one = _mm512_set1_epi8(1);
    std::uint64_t ones[64] = {};
    for (std::size_t begin = 0; begin < count; begin += kByteRun) {
        const std::size_t end = std::min(count, begin + kByteRun);
        __m512i counters = _mm512_setzero_si512();
        for (std::size_t i = begin; i < end; ++i) counters = _mm512_mask_add_epi8(counters, votes[i], counters, one);
        alignas(64) unsigned char counts[64];
        _mm512_store_si512(counts, counters);
        for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += counts[bit];
    }
    return verdict(ones, count);
}

#endif

struct Scratch {
    CodePoints text;
    std::vector<std::uint64_t> grams;
};

}  // namespace

Decoded normalise(std::string_view text, CodePoints& out) { return read<true>(text, out); }

Decoded decode(std::string_view text, CodePoints& out) { return read<false>(text, out); }

void gram_hashes(const CodePoints& text, int ngram, std::vector<std::uint64_t>& out) {
    const std::size_t length = text.size();
    const std::size_t width = std::min(static_cast<std::size_t>(ngram), length);
    out.resize(length == 0 ? 0 : length - width + 1);
    const char32_t* c = text.data();
    if (width == 3) {
        for (std::size_t i = 0; i < out.size(); ++i)
            out[i] = mix(std::uint64_t{c[i]} | std::uint64_t{c[i + 1]} << 21 | std::uint64_t{c[i + 2]} << 42);
        return;
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
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
    std::vector<Scratch> scratch(threads);
    parallel_for(static_cast<std::size_t>(texts.size()), threads, kGrain,
                 [&](std::size_t begin, std::size_t end, unsigned thread) {
        auto& [text, grams] = scratch[thread];
        for (std::size_t i = begin; i < end; ++i) {
            const auto row = static_cast<std::int64_t>(i);
            out[i] = 0;
            states[i] = RowState::null;
            if (texts.is_null(row)) continue;
            const std::string_view bytes = texts[row];
            const Decoded decoded = normalised ? decode(bytes, text) : normalise(bytes, text);
            if (decoded == Decoded::invalid) {
                std::int64_t known = first_bad.load();
                while (row < known && !first_bad.compare_exchange_weak(known, row)) {}
                continue;
            }
            states[i] = decoded == Decoded::foreign ? RowState::foreign : RowState::empty;
            if (decoded == Decoded::foreign || text.empty()) continue;
            gram_hashes(text, ngram, grams);
            out[i] = majority(grams.data(), grams.size(), isa);
            states[i] = few_distinct(grams.data(), grams.size()) ? RowState::few : RowState::full;
        }
    });
    if (first_bad.load() < texts.size())
        throw BadText("row " + std::to_string(first_bad.load()) +
                      " is not valid UTF-8: decode it with errors=\"replace\" or drop it first");
}

}  // namespace slmfast
