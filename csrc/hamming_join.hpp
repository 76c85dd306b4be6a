// All pairs of 64-bit fingerprints within Hamming distance k: exact, each pair once, streamed to a sink.
//
// The bits are cut into m blocks. Two fingerprints that differ in at most k bits agree on at least r = m - k whole
// blocks, so the join looks only inside groups that agree on r blocks ("multiple sorting": Tabei, Uno, Sugiyama and
// Tsuda, 2010). A pair may agree on more than r blocks; it is reported only in the group of its first r, so once.
// m follows from n and k by the expected cost. A group is left early, for brute force, once it is small. A group that
// stays large although its r blocks are used up (skewed data, equal fingerprints) is joined again on the bits in which
// its members still differ, with m chosen anew; where none is left, all its pairs are within reach, or belong elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "partition.hpp"

namespace slmfast {

constexpr int kMaxDistance = 8;

// Takes the pairs of a join, from several threads at once, in no particular order.
struct PairSink {
    virtual ~PairSink() = default;
    // a and b are positions in the joined arrays. Returns false to stop the join.
    virtual bool take(unsigned thread, std::uint32_t a, std::uint32_t b) = 0;
};

// Every pair a < b of one array. False if the sink stopped it. n < 2^32. Extra memory: 12 bytes a fingerprint, and 3 MiB
// a thread, or up to 12 where most rows crowd into few groups.
bool self_join(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa, PairSink& sink);

// Every pair of a position in `left` and a position in `right`. A side that is much larger than the other is only read.
bool cross_join(const std::uint64_t* left, std::size_t n_left, const std::uint64_t* right, std::size_t n_right, int k,
                unsigned threads, Isa isa, PairSink& sink);

// Pairs of rows i < j as (i << 32 | j).
struct Pairs {
    Buffer<std::uint64_t> data;
    std::size_t size;
};

// Every pair of rows within distance k, sorted.
Pairs near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa);

// What the cost formula expects of a self-join of n uniform fingerprints.
struct JoinPlan {
    int blocks;    // m; 0 where brute force is cheaper
    int required;  // r
    double core_seconds;
};
JoinPlan join_plan(std::size_t n, int k, Isa isa);

}  // namespace slmfast
