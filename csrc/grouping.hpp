// Rows of equal fingerprint.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "parallel.hpp"
#include "partition.hpp"

namespace slmfast {

// Calls visit(first, last), from several threads at once, with the rows (ascending) of each fingerprint that two or more
// of the n rows share. Only rows of which has(row) holds take part. n < 2^32. Extra memory: 12 bytes a row.
template <class Has, class Visit>
void for_each_equal(const std::uint64_t* fingerprints, std::size_t n, unsigned threads, Has&& has, Visit&& visit) {
    constexpr std::size_t kBucket = 1024;
    constexpr int kMostBits = 12;
    int bits = 1;
    while (bits < kMostBits && (n >> bits) > kBucket) ++bits;
    Side side(fingerprints, n);
    side.scatter(Block(~std::uint64_t{0}), bits, threads);
    parallel_for(std::size_t{1} << bits, threads, 1, [&](std::size_t bucket, std::size_t, unsigned) {
        const Group group = side.part(bucket);
        std::vector<std::pair<std::uint64_t, std::uint32_t>> keyed;
        keyed.reserve(group.size);
        for (std::size_t i = 0; i < group.size; ++i)
            if (has(group.id[i])) keyed.emplace_back(group.fp[i], group.id[i]);
        std::sort(keyed.begin(), keyed.end());
        std::vector<std::uint32_t> rows;
        for (std::size_t i = 0; i < keyed.size();) {
            rows.clear();
            const std::uint64_t fingerprint = keyed[i].first;
            for (; i < keyed.size() && keyed[i].first == fingerprint; ++i) rows.push_back(keyed[i].second);
            if (rows.size() > 1) visit(rows.data(), rows.data() + rows.size());
        }
    });
}

}  // namespace slmfast
