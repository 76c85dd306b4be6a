// The cross join of a few fingerprints with very many: the few are put into tables, and the many look them up in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "hamming_join.hpp"

namespace slmfast {

constexpr double kLookUp = 5.0;  // nanoseconds of one value in one table, without its comparisons

// Every pair of a position in `few` and one in `many`, which the sink knows in this order. False if the sink stopped it;
// nothing, and nothing done, where the few crowd into some keys, so that looking them up would cost more than a join that
// cuts both sides.
std::optional<bool> probe_join(const std::uint64_t* few, std::size_t n_few, const std::uint64_t* many,
                               std::size_t n_many, int k, unsigned threads, Isa isa, PairSink& sink);

}  // namespace slmfast
