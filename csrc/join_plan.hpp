// Into how many blocks a join cuts the bits: the cost formula.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.hpp"
#include "partition.hpp"

namespace slmfast {

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

// The cheapest m for uniform values of `width` bits.
Choice choose(const Work& work, const Costs& costs, int width, int k);

// The cheapest plan over the bits that vary.
Plan make_plan(const Work& work, const Costs& costs, std::uint64_t varying, int k);

// Cuts the set bits of `bits` into m blocks of nearly equal width, from the lowest up.
std::vector<Block> cut(std::uint64_t bits, int m);

// Bits by which the first, parallel partition cuts n fingerprints.
int top_bits(double n, int width);

}  // namespace slmfast
