// Into how many blocks a join cuts the bits: the cost formula.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.hpp"
#include "partition.hpp"

namespace slmfast {

// The sanitizers' build makes every size small, so that a few hundred rows take every way through the join.
#ifdef SLMFAST_SMALL_JOINS
constexpr bool kSmallJoins = true;
#else
constexpr bool kSmallJoins = false;
#endif

constexpr int kSpareBits = 2;  // so few bits of a block may be left uncut where another block follows

// How the bits are cut: pairs agree on at least blocks.size() - k of these.
struct Plan {
    std::vector<Block> blocks;
    std::size_t required = 0;  // blocks that a group holds equal; 0: brute force is cheaper
};

// What the plan weighs, in nanoseconds of one core; measured, and only their ratios matter.
struct Costs {
    double compare;                // compare one pair
    std::size_t leaf;              // groups up to this size go to brute force
    std::size_t target;            // the size that a split aims at
    double top = 4.0;              // partition one fingerprint of a group that memory or a shared cache holds
    double move = 2.2;             // ... of one in a core's own cache
    double visit = 0.6;            // take up one fingerprint in a leaf
};

Costs costs_on(Isa isa);

// How much each bit tells fingerprints apart, as minus the binary logarithm of the chance that two agree on it: 1 where
// zeros and ones are even, 0 where all are the same. Bits in which a crowd of near-duplicates hardly varies count little.
struct Spread {
    double bits[64];
    double total;

    static Spread even();  // of uniform fingerprints
};

// Of two arrays together, from a sample of each; either may be empty. Only the bits of `mask` count.
Spread spread_of(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b, std::size_t n_b, std::uint64_t mask,
                 std::size_t sample);

// The size of a join: each of `moved` fingerprints is compared with the members of its group, `others` at first.
struct Work {
    double moved;
    double others;
};

Work work_of(std::size_t n_left, std::size_t n_right, bool cross);

struct Choice {
    int blocks = 0;  // 0: brute force is cheaper
    double nanoseconds = 0.0;
};

// The cheapest m for values that differ as `spread` says.
Choice choose(const Work& work, const Costs& costs, const Spread& spread, int k);

Plan make_plan(const Work& work, const Costs& costs, const Spread& spread, int k);

// Cuts the bits that vary into m blocks of nearly equal spread, from the lowest up. m <= spread.total.
std::vector<Block> cut(const Spread& spread, int m);

// Bits by which the first, parallel partition cuts n fingerprints.
int top_bits(double n, int width);

}  // namespace slmfast
