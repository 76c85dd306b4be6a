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

}  // namespace

std::vector<std::uint64_t> near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads,
                                      Isa isa) {
    AllPairs pairs(threads);
    self_join(fingerprints, n, k, threads, isa, pairs);
    parallel_for(threads, threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        std::sort(pairs.parts[part].begin(), pairs.parts[part].end());
    });
    std::vector<std::uint64_t> all = std::move(pairs.parts[0]);
    for (std::size_t part = 1; part < pairs.parts.size(); ++part) {
        std::vector<std::uint64_t> more = std::move(pairs.parts[part]);
        const auto middle = static_cast<std::ptrdiff_t>(all.size());
        all.insert(all.end(), more.begin(), more.end());
        std::vector<std::uint64_t>().swap(more);
        std::inplace_merge(all.begin(), all.begin() + middle, all.end());
    }
    return all;
}

}  // namespace slmfast
