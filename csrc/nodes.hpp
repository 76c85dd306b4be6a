// What the parts of the clustering share: its input, and the rows that take part in a join.
#pragma once

#include <cstdint>
#include <vector>

#include "clusters.hpp"

namespace slmfast {

using Row = std::uint32_t;
using Node = std::uint32_t;  // a position in the list of nodes, which is in row order

struct Input {
    NormalisedTexts texts;
    const std::uint64_t* fingerprints;
    const RowState* states;
    ClusterOptions options;
};

inline bool has_fingerprint(RowState state) { return state == RowState::few || state == RowState::full; }

// The nodes that take part in a join: first rows of equal texts, in row order.
struct Nodes {
    std::vector<Row> rows;
    std::vector<std::uint64_t> fingerprints;

    // Of the first n rows those for which `wanted` holds.
    template <class Wanted>
    Nodes(const Input& in, std::int64_t n, Wanted&& wanted) {
        std::size_t count = 0;
        for (std::int64_t row = 0; row < n; ++row) count += wanted(row);
        rows.reserve(count);
        fingerprints.reserve(count);
        for (std::int64_t row = 0; row < n; ++row) {
            if (!wanted(row)) continue;
            rows.push_back(static_cast<Row>(row));
            fingerprints.push_back(in.fingerprints[row]);
        }
    }
};

}  // namespace slmfast
