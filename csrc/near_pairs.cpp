// All pairs of rows, sorted.
#include <algorithm>

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
    constexpr int kBucketBits = 12;
    int shift = 32;
    while ((n >> (shift - 32)) >= std::size_t{1} << kBucketBits) ++shift;
    std::vector<std::size_t> next((std::size_t{1} << kBucketBits) + 1, 0);
    for (const auto& part : parts)
        for (const std::uint64_t pair : part) ++next[(pair >> shift) + 1];
    for (std::size_t bucket = 1; bucket < next.size(); ++bucket) next[bucket] += next[bucket - 1];
    std::vector<std::uint64_t> all(next.back());
    for (auto& part : parts) {
        for (const std::uint64_t pair : part) all[next[pair >> shift]++] = pair;
        std::vector<std::uint64_t>().swap(part);
    }
    const auto place = [&](std::size_t at) { return all.begin() + static_cast<std::ptrdiff_t>(at); };
    parallel_for(next.size() - 1, threads, 1, [&](std::size_t bucket, std::size_t, unsigned) {
        std::sort(place(bucket == 0 ? 0 : next[bucket - 1]), place(next[bucket]));
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
