// Whether any of a few ids occurs among very many, in one pass over the many.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel.hpp"
#include "simhash.hpp"

namespace slmfast {

// The position in `few` (ascending) of the first that occurs in `many` (in any order), or -1. A bitmap of hashes, small
// enough for a core's cache where the few are few, turns nearly all of the many away; a binary search decides the rest.
inline std::int64_t common_id(const std::int64_t* few, std::size_t n_few, const std::int64_t* many, std::size_t n_many,
                              unsigned threads) {
    if (n_few == 0) return -1;
    int bits = 6;
    while (bits < 34 && (std::size_t{1} << bits) < 8 * n_few) ++bits;
    std::vector<std::uint64_t> seen(std::size_t{1} << (bits - 6));
    const auto place = [&](std::int64_t id) { return mix(static_cast<std::uint64_t>(id)) >> (64 - bits); };
    for (std::size_t i = 0; i < n_few; ++i) seen[place(few[i]) / 64] |= std::uint64_t{1} << place(few[i]) % 64;
    std::atomic<std::size_t> first{n_few};
    parallel_for(n_many, threads, std::size_t{1} << 16, [&](std::size_t begin, std::size_t end, unsigned) {
        for (std::size_t i = begin; i < end; ++i) {
            const std::uint64_t bit = place(many[i]);
            if ((seen[bit / 64] >> bit % 64 & 1) == 0) continue;
            const auto found = static_cast<std::size_t>(std::lower_bound(few, few + n_few, many[i]) - few);
            if (found == n_few || few[found] != many[i]) continue;
            std::size_t known = first.load(std::memory_order_relaxed);
            while (found < known && !first.compare_exchange_weak(known, found)) {}
        }
    });
    return first.load() == n_few ? -1 : static_cast<std::int64_t>(first.load());
}

}  // namespace slmfast
