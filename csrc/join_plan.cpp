#include "join_plan.hpp"

#include <algorithm>
#include <cmath>

#include "hamming_join.hpp"

namespace slmfast {
namespace {

constexpr std::size_t kBucket = 24'576;  // the first, parallel partition aims at buckets that stay in a core's cache
constexpr int kTopBits = 12;             // ... and makes at most 2^12
constexpr int kMostBlocks = 24;          // more blocks never paid under the cost model
constexpr double kPass = 2e4;            // nanoseconds to hand a first partition to the threads

// Expected nanoseconds of a join of uniform values of `width` bits with m blocks.
// There are C(k + t, t) ways to choose the first t equal blocks; each leaves a share of 2^(-t width / m) of the others.
double expected_cost(const Work& work, const Costs& costs, int width, int k, int m) {
    const int block = m == 0 ? 0 : width / m;
    double ways = 1.0;
    double group = work.others;
    double cost = m > k ? kPass * (k + 1) : 0.0;
    for (int depth = 1; depth <= m - k && group > static_cast<double>(costs.leaf); ++depth) {
        ways *= static_cast<double>(k + depth) / depth;
        const bool cut_twice = depth == 1 && block - top_bits(work.others, block) > (m > k + 1 ? kSpareBits : 0);
        const bool far = group > 2.0 * static_cast<double>(kBucket);  // not in a core's own cache
        cost += ways * work.moved * ((far ? costs.top : costs.move) + (cut_twice ? costs.move : 0.0));
        const double narrowed = work.others * std::exp2(-static_cast<double>(depth * width) / m);
        group = std::max(narrowed, 0.75 * static_cast<double>(costs.target));
    }
    return cost + ways * work.moved * (costs.visit + group / 2 * costs.compare);
}

}  // namespace

Costs costs_on(Isa isa) {
    switch (isa) {
        case Isa::avx512: return {0.05, 128, 64};
        case Isa::avx2: return {0.18, 64, 32};
        default: return {2.0, 24, 12};
    }
}

Work work_of(std::size_t n_left, std::size_t n_right, bool cross) {
    const auto a = static_cast<double>(n_left);
    const auto b = static_cast<double>(n_right);
    return cross ? Work{a + b, std::max(a, b)} : Work{a, a};
}

int top_bits(double n, int width) {
    int bits = 1;
    while (bits < std::min(kTopBits, width) && n > static_cast<double>(kBucket << bits)) ++bits;
    return bits;
}

std::vector<Block> cut(std::uint64_t bits, int m) {
    std::vector<std::uint64_t> masks(static_cast<std::size_t>(m), 0);
    const int total = __builtin_popcountll(bits);
    for (int place = 0; bits != 0; bits &= bits - 1, ++place)
        masks[static_cast<std::size_t>(place * m / total)] |= bits & (0 - bits);
    return {masks.begin(), masks.end()};
}

Choice choose(const Work& work, const Costs& costs, int width, int k) {
    Choice best{0, expected_cost(work, costs, width, k, k)};
    for (int m = k + 1; m <= std::min(width, kMostBlocks); ++m) {
        const double cost = expected_cost(work, costs, width, k, m);
        if (cost < best.nanoseconds) best = {m, cost};
    }
    return best;
}

Plan make_plan(const Work& work, const Costs& costs, std::uint64_t varying, int k) {
    const int blocks = choose(work, costs, __builtin_popcountll(varying), k).blocks;
    if (blocks == 0) return {};
    return {cut(varying, blocks), static_cast<std::size_t>(blocks - k)};
}

JoinPlan join_plan(std::size_t n, int k, Isa isa) {
    const Choice best = choose(work_of(n, 0, false), costs_on(isa), 64, k);
    return {best.blocks, best.blocks == 0 ? 0 : best.blocks - k, best.nanoseconds * 1e-9};
}

}  // namespace slmfast
