// The cross join of a few fingerprints with very many: the few are put into tables, and the many look them up in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hamming_join.hpp"
#include "partition.hpp"

namespace slmfast {

// One of k + 1 blocks of the bits; a pair within distance k agrees on at least one of them. Fingerprints are grouped by
// the block's first key bits, so those that a value may be near to lie side by side.
class ProbeTable {
public:
    ProbeTable(const std::uint64_t* fingerprints, std::size_t n, const Block& block);

    // How many members a value meets on average, if its like is drawn as the members are.
    double meetings() const { return meetings_; }

    // Appends (i << 32 | j) for each values[i] within distance k of member j that agrees on this block.
    void probe(const std::uint64_t* values, std::size_t n, int k, Isa isa, std::vector<std::uint64_t>& hits) const;

private:
    Block block_;
    int bits_;
    double meetings_ = 0.0;
    std::vector<std::uint32_t> begins_;
    std::vector<std::uint64_t> fp_;
    std::vector<std::uint32_t> id_;
};

}  // namespace slmfast
