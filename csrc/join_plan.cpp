#include "join_plan.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "hamming_join.hpp"
#include "simhash.hpp"

namespace slmfast {
namespace {

// The first, parallel partition aims at buckets that stay in a core's cache.
constexpr std::size_t kBucket = kSmallJoins ? 64 : 24'576;
constexpr int kTopBits = 12;             // ... and makes at most 2^12
constexpr int kMostBlocks = 24;          // more blocks never paid under the cost model
constexpr double kPass = kSmallJoins ? 0.0 : 2e4;  // nanoseconds to hand a first partition to the threads

// Expected nanoseconds of a join of values that `width` even bits tell apart, with m blocks.
// There are C(k + t, t) ways to choose the first t equal blocks; each leaves a share of 2^(-t width / m) of the others.
double expected_cost(const Work& work, const Costs& costs, double width, int k, int m) {
    const int block = m == 0 ? 0 : static_cast<int>(width) / m;
    double ways = 1.0;
    double group = work.others;
    double cost = m > k ? kPass * (k + 1) : 0.0;
    for (int depth = 1; depth <= m - k && group > static_cast<double>(costs.leaf); ++depth) {
        ways *= static_cast<double>(k + depth) / depth;
        const bool cut_twice = depth == 1 && block - top_bits(work.others, block) > (m > k + 1 ? kSpareBits : 0);
        const bool far = group > 2.0 * static_cast<double>(kBucket);  // not in a core's own cache
        cost += ways * work.moved * ((far ? costs.top : costs.move) + (cut_twice ? costs.move : 0.0));
        const double narrowed = work.others * std::exp2(-depth * width / m);
        group = std::max(narrowed, 0.75 * static_cast<double>(costs.target));
    }
    return cost + ways * work.moved * (costs.visit + group / 2 * costs.compare);
}

}  // namespace

Costs costs_on(Isa isa) {
    if (kSmallJoins) return {2.0, 20, 6};
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

Spread Spread::even() {
    Spread spread{{}, 64.0};
    std::fill(spread.bits, spread.bits + 64, 1.0);
    return spread;
}

Spread spread_of(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b, std::size_t n_b, std::uint64_t mask,
                 std::size_t sample) {
    std::uint32_t ones[64] = {};
    std::size_t count = 0;
    for (const auto& [values, n] : {std::pair{a, n_a}, std::pair{b, n_b}}) {
        const std::size_t some = std::min(n, sample);
        for (std::size_t i = 0; i < some; ++i) {
            // Scattered, because a fixed stride is blind to what recurs at that stride.
            const std::uint64_t value = values[some == n ? i : mix(i) % n];
            for (unsigned bit = 0; bit < 64; ++bit) ones[bit] += static_cast<std::uint32_t>(value >> bit & 1);
        }
        count += some;
    }
    Spread spread{{}, 0.0};
    for (unsigned bit = 0; bit < 64; ++bit) {
        if ((mask >> bit & 1) == 0) continue;
        const double share = static_cast<double>(ones[bit]) / static_cast<double>(count);
        spread.bits[bit] = -std::log2(share * share + (1.0 - share) * (1.0 - share));
        spread.total += spread.bits[bit];
    }
    return spread;
}

std::vector<Block> cut(const Spread& spread, int m) {
    std::vector<std::uint64_t> masks(static_cast<std::size_t>(m), 0);
    double before = 0.0;
    for (unsigned bit = 0; bit < 64; ++bit) {
        const double middle = before + spread.bits[bit] / 2;
        const auto block = static_cast<std::size_t>(middle / spread.total * m);
        if (spread.bits[bit] > 0.0) masks[std::min(block, masks.size() - 1)] |= std::uint64_t{1} << bit;
        before += spread.bits[bit];
    }
    masks.erase(std::remove(masks.begin(), masks.end(), 0), masks.end());
    return {masks.begin(), masks.end()};
}

Choice choose(const Work& work, const Costs& costs, const Spread& spread, int k) {
    Choice best{0, expected_cost(work, costs, spread.total, k, k)};
    for (int m = k + 1; m <= std::min(static_cast<int>(spread.total), kMostBlocks); ++m) {
        const double cost = expected_cost(work, costs, spread.total, k, m);
        if (cost < best.nanoseconds) best = {m, cost};
    }
    return best;
}

Plan make_plan(const Work& work, const Costs& costs, const Spread& spread, int k) {
    const int m = choose(work, costs, spread, k).blocks;
    if (m == 0) return {};
    std::vector<Block> blocks = cut(spread, m);
    const std::size_t all = blocks.size();
    if (all <= static_cast<std::size_t>(k)) return {};
    return {std::move(blocks), all - static_cast<std::size_t>(k)};
}

JoinPlan join_plan(std::size_t n, int k, Isa isa) {
    const Choice best = choose(work_of(n, 0, false), costs_on(isa), Spread::even(), k);
    return {best.blocks, best.blocks == 0 ? 0 : best.blocks - k, best.nanoseconds * 1e-9};
}

}  // namespace slmfast
