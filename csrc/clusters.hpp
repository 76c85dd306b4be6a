// From near pairs to who is kept and who stands for whom.
//
// Rows are in order of priority. Rows of equal normalised text are one node, kept or dropped as its first row is.
//   representative  a node goes when an earlier kept node lies within k and verifies; the earliest such stands for it.
//                   Chains do not merge.
//   components      nodes joined by any chain of verified pairs merge; the earliest stands for all.
// A pair verifies when the sets of its normalised grams have a Jaccard similarity of at least `verify`.
// Nulls and empty texts are kept and match nothing; texts with few grams match only an equal normalised text.
//
// Rows kept earlier may be stored elsewhere (DedupIndex): they come before all rows of the column, and each claims a
// row of it just as an earlier kept row of the column would. So deduplicating in parts keeps what the whole keeps.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.hpp"
#include "simhash.hpp"
#include "text_column.hpp"

namespace slmfast {

// The texts of a column, of which some rows were normalised elsewhere because their state was `foreign`.
struct NormalisedTexts {
    const TextColumn* raw = nullptr;                 // with rows absent: a column normalised as a whole
    const TextColumn* replaced = nullptr;            // normalised texts ...
    const std::vector<std::int64_t>* rows = nullptr;  // ... of these rows, ascending

    // The normalised code points of a row, which must not be null.
    void read(std::int64_t row, CodePoints& out, Isa isa = Isa::scalar) const;
    bool is_replaced(std::int64_t row) const;
};

struct ClusterOptions {
    int k = 3;
    bool components = false;
    bool verified = true;  // false: plain SimHash, `verify` is not looked at
    double verify = 0.8;
    int ngram = 3;
    unsigned threads = 1;
    Isa isa = Isa::scalar;
    std::size_t pair_budget = 0;  // most pairs held at once, at least 1; 0: twice the rows, but a million at least
};

// Kept rows of an earlier call, with normalised texts and states `few` or `full`; fewer than 2^32.
struct StoredSpan {
    NormalisedTexts texts;
    const std::uint64_t* fingerprints = nullptr;
    const RowState* states = nullptr;
    std::size_t size = 0;
};

// Fills duplicate_of (a row itself where kept) and the Hamming distance to it, for n < 2^32 rows.
// No state may be `foreign`. The places of stored rows count through the spans in order; a row for which place p
// stands gets -1 - p. Nothing is allocated or copied in proportion to the stored rows. Spans need `representative`.
void cluster(const NormalisedTexts& texts, const std::uint64_t* fingerprints, const RowState* states, std::int64_t n,
             const std::vector<StoredSpan>& stored, const ClusterOptions& options, std::int64_t* duplicate_of,
             std::uint8_t* distance);

}  // namespace slmfast
