// Rows grouped by fingerprint: equal ones side by side, each group in row order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "parallel.hpp"

namespace slmfast {

// Orders `rows` (ascending on entry) so that rows of equal fingerprint are neighbours, ascending. The order of the
// groups follows a hash, the same on any number of threads. Buckets of the hash are mostly sorted in cache.
inline std::vector<std::uint32_t> group_rows(const std::uint64_t* fingerprints, const std::vector<std::uint32_t>& rows,
                                             unsigned threads) {
    constexpr int kBits = 12;
    constexpr std::size_t kBuckets = std::size_t{1} << kBits;
    const auto bucket_of = [&](std::uint32_t row) { return fingerprints[row] * 0x9e3779b97f4a7c15u >> (64 - kBits); };
    const std::size_t slices = threads;
    const std::size_t step = (rows.size() + slices - 1) / slices;
    std::vector<std::size_t> places(slices * kBuckets, 0);
    const auto slice = [&](std::size_t s, auto&& visit) {
        const std::size_t end = std::min(rows.size(), (s + 1) * step);
        for (std::size_t i = std::min(rows.size(), s * step); i < end; ++i)
            visit(rows[i], places[s * kBuckets + bucket_of(rows[i])]);
    };
    parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
        slice(s, [](std::uint32_t, std::size_t& count) { ++count; });
    });
    std::vector<std::size_t> begins(kBuckets + 1, 0);
    std::size_t total = 0;
    for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
        begins[bucket] = total;
        for (std::size_t s = 0; s < slices; ++s) total += std::exchange(places[s * kBuckets + bucket], total);
    }
    begins[kBuckets] = total;
    std::vector<std::uint32_t> grouped(rows.size());
    parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
        slice(s, [&](std::uint32_t row, std::size_t& place) { grouped[place++] = row; });
    });
    parallel_for(kBuckets, threads, 16, [&](std::size_t from, std::size_t to, unsigned) {
        std::vector<std::pair<std::uint64_t, std::uint32_t>> keyed;
        for (std::size_t bucket = from; bucket < to; ++bucket) {
            keyed.clear();
            for (std::size_t i = begins[bucket]; i < begins[bucket + 1]; ++i)
                keyed.emplace_back(fingerprints[grouped[i]], grouped[i]);
            std::sort(keyed.begin(), keyed.end());
            for (std::size_t i = 0; i < keyed.size(); ++i) grouped[begins[bucket] + i] = keyed[i].second;
        }
    });
    return grouped;
}

// Where the group that holds place `i` ends. Binary, because a group may hold all rows.
inline std::size_t group_end(const std::uint64_t* fingerprints, const std::vector<std::uint32_t>& grouped,
                             std::size_t i) {
    const std::uint64_t fingerprint = fingerprints[grouped[i]];
    std::size_t width = 1;  // doubled first, because most groups hold one row
    while (i + width < grouped.size() && fingerprints[grouped[i + width]] == fingerprint) width *= 2;
    const auto from = grouped.begin() + static_cast<std::ptrdiff_t>(i + width / 2);
    const auto to = grouped.begin() + static_cast<std::ptrdiff_t>(std::min(grouped.size(), i + width));
    return static_cast<std::size_t>(
        std::partition_point(from, to, [&](std::uint32_t row) { return fingerprints[row] == fingerprint; }) -
        grouped.begin());
}

}  // namespace slmfast
