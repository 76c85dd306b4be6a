#include "simhash.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>

#include "majority.hpp"
#include "parallel.hpp"

namespace slmfast {
namespace {

// The one word of a gram of three code points.
inline std::uint64_t trigram(const char32_t* c) {
    return std::uint64_t{c[0]} | std::uint64_t{c[1]} << 21 | std::uint64_t{c[2]} << 42;
}

// Plain loops, so that the compiler makes vectors of them.
__attribute__((always_inline)) inline void trigram_hashes_of(const char32_t* c, std::size_t count,
                                                             std::uint64_t* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = mix(trigram(c + i));
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq,prefer-vector-width=512"))) void trigram_hashes_avx512(
    const char32_t* c, std::size_t count, std::uint64_t* out) {
    trigram_hashes_of(c, count, out);
}

__attribute__((target("avx2"))) void trigram_hashes_avx2(const char32_t* c, std::size_t count, std::uint64_t* out) {
    trigram_hashes_of(c, count, out);
}
#endif

void trigram_hashes(const char32_t* c, std::size_t count, Isa isa, std::uint64_t* out) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return trigram_hashes_avx512(c, count, out);
    if (isa == Isa::avx2) return trigram_hashes_avx2(c, count, out);
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

// Whether value(0) to value(count - 1) are fewer than kEnoughFeatures distinct values. The first ones nearly always are
// distinct already, which is found without a branch.
template <class Value>
bool few_distinct(std::size_t count, Value&& value) {
    if (count >= kEnoughFeatures) {
        bool differ = true;
        for (int i = 1; i < kEnoughFeatures; ++i)
            for (int j = 0; j < i; ++j) differ &= value(i) != value(j);
        if (differ) return false;
    }
    std::uint64_t seen[kEnoughFeatures];
    int distinct = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t one = value(i);
        if (std::find(seen, seen + distinct, one) != seen + distinct) continue;
        seen[distinct++] = one;
        if (distinct == kEnoughFeatures) return false;
    }
    return true;
}

struct Fingerprint {
    std::uint64_t bits;
    bool few;  // under kEnoughFeatures distinct grams
};

// The fingerprint of a text that is not empty. `grams` is scratch, which only ever grows, since what it grows by is
// cleared.
Fingerprint fingerprint(const CodePoints& text, int ngram, Isa isa, std::vector<std::uint64_t>& grams) {
    const std::size_t count = gram_count(text, ngram);
#if defined(__x86_64__)
    if (isa == Isa::avx512 && ngram == 3 && text.size() > 3) {
        const char32_t* c = text.data();  // grams of three code points differ where their hashes do
        return {trigram_majority_avx512(c, count), few_distinct(count, [c](std::size_t i) { return trigram(c + i); })};
    }
#endif
    if (count > grams.size()) grams.resize(count);
    hash_grams(text, ngram, isa, grams.data());
    return {majority(grams.data(), count, isa), few_distinct(count, [&](std::size_t i) { return grams[i]; })};
}

}  // namespace

void gram_hashes(const CodePoints& text, int ngram, Isa isa, std::vector<std::uint64_t>& out) {
    out.resize(gram_count(text, ngram));
    hash_grams(text, ngram, isa, out.data());
}

void fingerprints(const TextColumn& texts, bool normalised, int ngram, unsigned threads, Isa isa,
                  std::uint64_t* out, RowState* states) {
    constexpr std::size_t kGrain = 512;
    std::atomic<std::int64_t> first_bad{std::numeric_limits<std::int64_t>::max()};
    parallel_for(static_cast<std::size_t>(texts.size()), threads, kGrain,
                 [&](std::size_t begin, std::size_t end, unsigned) {
        CodePoints text;
        std::vector<std::uint64_t> grams;
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
            const Fingerprint found = fingerprint(text, ngram, isa, grams);
            out[row] = found.bits;
            states[row] = found.few ? RowState::few : RowState::full;
        });
    });
    if (first_bad.load() < texts.size())
        throw BadText("row " + std::to_string(first_bad.load()) +
                      " is not valid UTF-8: decode it with errors=\"replace\" or drop it first");
}

}  // namespace slmfast
