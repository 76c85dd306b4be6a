// All pairs of rows, sorted.
#include <algorithm>
#include <utility>

#include "hamming_join.hpp"
#include "parallel.hpp"

namespace slmfast {
namespace {

struct AllPairs : PairSink {
    explicit AllPairs(unsigned threads) : parts(threads) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        parts[thread].push_back(std::uint64_t{a} << 32 | b);
        return true;
    }

    std::vector<std::vector<std::uint64_t>> parts;
};

// The parts of all threads in one, sorted: by the first row's highest bits into buckets, and each bucket by itself.
std::vector<std::uint64_t> sorted(std::vector<std::vector<std::uint64_t>>& parts, std::size_t n, unsigned threads) {
    constexpr std::size_t kBuckets = 4096;
    int shift = 32;
    while ((n >> (shift - 32)) >= kBuckets) ++shift;
    std::vector<std::vector<std::size_t>> places(parts.size());  // of each part in each bucket
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        std::vector<std::size_t> counts(kBuckets, 0);
        for (const std::uint64_t pair : parts[part]) ++counts[pair >> shift];
        places[part] = std::move(counts);
    });
    std::vector<std::size_t> begins(kBuckets + 1);
    std::size_t total = 0;
    for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
        begins[bucket] = total;
        for (auto& place : places) total += std::exchange(place[bucket], total);
    }
    begins[kBuckets] = total;
    std::vector<std::uint64_t> all(total);
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        for (const std::uint64_t pair : parts[part]) all[places[part][pair >> shift]++] = pair;
        std::vector<std::uint64_t>().swap(parts[part]);
    });
    const auto place = [&](std::size_t bucket) { return all.begin() + static_cast<std::ptrdiff_t>(begins[bucket]); };
    parallel_for(kBuckets, threads, 16, [&](std::size_t from, std::size_t end, unsigned) {
        for (std::size_t bucket = from; bucket < end; ++bucket) std::sort(place(bucket), place(bucket + 1));
    });
    return all;
}

}  // namespace

std::vector<std::uint64_t> near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads,
                                      Isa isa) {
    AllPairs pairs(threads);
    self_join(fingerprints, n, k, threads, isa, pairs);
    return sorted(pairs.parts, n, threads);
}

}  // namespace slmfast
