// All pairs of rows, sorted.
#include <algorithm>
#include <utility>

#include "hamming_join.hpp"
#include "parallel.hpp"
#include "partition.hpp"

namespace slmfast {
namespace {

// The pairs of one thread, in chunks that never move: large ones lie on huge pages, so that millions of pairs cost few
// page faults.
class PairChunks {
public:
    void add(std::uint64_t pair) {
        if (left_ == 0) grow();
        *next_++ = pair;
        --left_;
    }

    template <class Visit>
    void each(Visit&& visit) const {
        for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
            const std::size_t filled = capacity(chunk) - (chunk + 1 == chunks_.size() ? left_ : 0);
            for (std::size_t at = 0; at < filled; ++at) visit(chunks_[chunk].get()[at]);
        }
    }

    void clear() { *this = PairChunks(); }

private:
    static std::size_t capacity(std::size_t chunk) { return std::size_t{1} << std::min<std::size_t>(10 + chunk, 20); }

    void grow() {
        left_ = capacity(chunks_.size());
        chunks_.emplace_back(left_);
        next_ = chunks_.back().get();
    }

    std::vector<Buffer<std::uint64_t>> chunks_;
    std::uint64_t* next_ = nullptr;
    std::size_t left_ = 0;
};

struct AllPairs : PairSink {
    explicit AllPairs(unsigned threads) : parts(threads) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        parts[thread].add(std::uint64_t{a} << 32 | b);
        return true;
    }

    std::vector<PairChunks> parts;
};

// The parts of all threads in one, sorted: by the first row's highest bits into buckets, and each bucket by itself.
Pairs sorted(std::vector<PairChunks>& parts, std::size_t n, unsigned threads) {
    constexpr std::size_t kBuckets = 4096;
    int shift = 32;
    while ((n >> (shift - 32)) >= kBuckets) ++shift;
    std::vector<std::vector<std::size_t>> places(parts.size());  // of each part in each bucket
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        std::vector<std::size_t> counts(kBuckets, 0);
        parts[part].each([&](std::uint64_t pair) { ++counts[pair >> shift]; });
        places[part] = std::move(counts);
    });
    std::vector<std::size_t> begins(kBuckets + 1);
    std::size_t total = 0;
    for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
        begins[bucket] = total;
        for (auto& place : places) total += std::exchange(place[bucket], total);
    }
    begins[kBuckets] = total;
    Pairs all{Buffer<std::uint64_t>(total), total};
    std::uint64_t* to = all.data.get();
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        parts[part].each([&, next = places[part].data()](std::uint64_t pair) { to[next[pair >> shift]++] = pair; });
        parts[part].clear();
    });
    parallel_for(kBuckets, threads, 16, [&](std::size_t from, std::size_t end, unsigned) {
        for (std::size_t bucket = from; bucket < end; ++bucket) std::sort(to + begins[bucket], to + begins[bucket + 1]);
    });
    return all;
}

}  // namespace

Pairs near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa) {
    AllPairs pairs(threads);
    self_join(fingerprints, n, k, threads, isa, pairs);
    return sorted(pairs.parts, n, threads);
}

}  // namespace slmfast
