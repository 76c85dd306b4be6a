#include "hamming_join.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel.hpp"
#include "popcount_scan.hpp"

namespace slmfast {
namespace {

constexpr std::size_t kLeaf = 128;    // groups up to this size go to brute force
constexpr int kTopBits = 11;          // the first, parallel partition: buckets that then fit in a core's cache
constexpr int kInnerBits = 8;         // later partitions, in place and in cache
constexpr int kSlackBits = 2;         // hash bits spent beyond a block's width before it counts as used up
constexpr int kMostHashBits = 56;     // of 64, so that a further kInnerBits are there to be had
constexpr std::size_t kFew = 8;       // so few against many are compared faster than the many are partitioned
constexpr int kMostBlocks = 24;       // more blocks never paid under the cost model

// Fingerprints and where they stood in the caller's array. A group is permuted in place, never copied.
struct Group {
    std::uint64_t* fp = nullptr;
    std::uint32_t* id = nullptr;
    std::size_t size = 0;

    Group part(std::size_t begin, std::size_t end) const { return {fp + begin, id + begin, end - begin}; }
};

// How the bits are cut: pairs agree on at least blocks.size() - k of these masks.
struct Plan {
    std::vector<std::uint64_t> blocks;
    std::size_t required = 0;  // blocks that a group holds equal; 0: brute force is cheaper
};

// Cuts the set bits of `bits` into m masks of nearly equal width, from the lowest up.
std::vector<std::uint64_t> cut(std::uint64_t bits, int m) {
    std::vector<std::uint64_t> blocks(static_cast<std::size_t>(m), 0);
    const int total = __builtin_popcountll(bits);
    for (int place = 0; bits != 0; bits &= bits - 1, ++place)
        blocks[static_cast<std::size_t>(place * m / total)] |= bits & (0 - bits);
    return blocks;
}

// The size of a join: `pairs` that brute force would compare, `moved` fingerprints in one partition of all.
struct Work {
    double pairs;
    double moved;
    double largest;  // the larger of its sides
};

// Expected nanoseconds of a join of uniform values of `width` bits with m blocks.
// Depth t has C(k + t, t) ways to choose its blocks; each leaves a share of 2^(-t width / m) of the pairs.
double expected_cost(const Work& work, int width, int k, int m) {
    constexpr double kMove = 4.0;     // partition one fingerprint
    constexpr double kCompare = 0.4;  // compare one pair
    double ways = 1.0;
    double share = 1.0;
    double cost = 0.0;
    for (int depth = 1; depth <= m - k && work.largest * share > static_cast<double>(kLeaf); ++depth) {
        ways *= static_cast<double>(k + depth) / depth;
        cost += ways * work.moved * kMove;
        share = std::exp2(-static_cast<double>(depth * width) / m);
    }
    return cost + ways * work.pairs * share * kCompare;
}

Plan choose_plan(std::size_t n_left, std::size_t n_right, bool cross, std::uint64_t varying, int k) {
    const auto a = static_cast<double>(n_left);
    const auto b = static_cast<double>(n_right);
    const Work work = cross ? Work{a * b, a + b, std::max(a, b)} : Work{a * a / 2, a, a};
    const int width = __builtin_popcountll(varying);
    double best = expected_cost(work, width, k, k);  // no block: brute force
    int blocks = 0;
    for (int m = k + 1; m <= std::min(width, kMostBlocks); ++m) {
        const double cost = expected_cost(work, width, k, m);
        if (cost < best) {
            best = cost;
            blocks = m;
        }
    }
    if (blocks == 0) return {};
    return {cut(varying, blocks), static_cast<std::size_t>(blocks - k)};
}

std::size_t hash_of(std::uint64_t value, int consumed, int bits) {
    value ^= value >> 32;
    return static_cast<std::size_t>(value * 0x9e3779b97f4a7c15u << consumed >> (64 - bits));
}

// Groups by `bits` hash bits of the masked value, in place; fills begins[0 .. 2^bits].
void partition(const Group& group, std::uint64_t mask, int consumed, int bits, std::uint32_t* begins) {
    const std::size_t buckets = std::size_t{1} << bits;
    std::uint32_t next[std::size_t{1} << kInnerBits];
    std::fill(begins, begins + buckets + 1, 0u);
    for (std::size_t i = 0; i < group.size; ++i) ++begins[hash_of(group.fp[i] & mask, consumed, bits) + 1];
    for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
        next[bucket] = begins[bucket];
        begins[bucket + 1] += begins[bucket];
    }
    for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
        while (next[bucket] < begins[bucket + 1]) {
            const std::uint32_t here = next[bucket];
            const std::size_t home = hash_of(group.fp[here] & mask, consumed, bits);
            const std::uint32_t there = next[home]++;
            if (home == bucket) continue;
            std::swap(group.fp[here], group.fp[there]);
            std::swap(group.id[here], group.id[there]);
        }
    }
}

// One thread's walk through the groups. With `cross`, pairs join left and right; else right is empty and left is
// joined with itself.
class Walk {
public:
    Walk(unsigned thread, int k, bool cross, Isa isa, PairSink& sink, std::atomic<bool>& stopped)
        : thread_(thread), k_(k), cross_(cross), scan_(scan_for(isa)), sink_(sink), stopped_(stopped) {}

    // Joins one top-level bucket: `consumed` hash bits of plan.blocks[block] are equal in it.
    void bucket(const Group& left, const Group& right, const Plan& plan, std::size_t block, int consumed) {
        differ_.assign(plan.blocks.begin(), plan.blocks.begin() + static_cast<std::ptrdiff_t>(block));
        after_split(left, right, plan, {block, 0, block, 0}, consumed);
    }

    // Compares left[begin, end) with all later ones (or with all of right).
    void brute(const Group& left, const Group& right, std::uint64_t equal, std::size_t begin, std::size_t end) {
        const Group& other = cross_ ? right : left;
        for (std::size_t i = begin; i < end && !stopped_.load(std::memory_order_relaxed); ++i) {
            for (std::size_t from = cross_ ? 0 : i + 1; from < other.size; from += kScanBlock) {
                const std::size_t length = std::min(kScanBlock, other.size - from);
                const std::size_t count = scan_(left.fp[i], other.fp + from, length, k_, hits_);
                for (std::size_t hit = 0; hit < count; ++hit) {
                    const std::size_t j = from + hits_[hit];
                    if (belongs(left.fp[i] ^ other.fp[j], equal)) report(left.id[i], other.id[j]);
                }
            }
        }
    }

private:
    // Where in a plan a walk stands: blocks before `next` are decided, `used` of them equal, `skipped` not.
    struct State {
        std::size_t next;
        std::size_t used;
        std::size_t skipped;
        std::uint64_t equal;
    };

    bool nothing_to_join(const Group& left, const Group& right) const {
        return cross_ ? left.size == 0 || right.size == 0 : left.size < 2;
    }

    bool small(const Group& left, const Group& right) const {
        if (!cross_) return left.size <= kLeaf;
        return left.size * right.size <= kLeaf * kLeaf || std::min(left.size, right.size) <= kFew;
    }

    // Whether a pair is to be found here and nowhere else: equal on the chosen blocks, different on each skipped one.
    bool belongs(std::uint64_t difference, std::uint64_t equal) const {
        return (difference & equal) == 0 && std::all_of(differ_.begin(), differ_.end(), [&](std::uint64_t block) {
                   return (difference & block) != 0;
               });
    }

    void report(std::uint32_t a, std::uint32_t b) {
        if (!cross_ && a > b) std::swap(a, b);
        if (!sink_.take(thread_, a, b)) stopped_.store(true, std::memory_order_relaxed);
    }

    void descend(const Group& left, const Group& right, const Plan& plan, const State& state) {
        if (nothing_to_join(left, right) || stopped_.load(std::memory_order_relaxed)) return;
        if (small(left, right)) return brute(left, right, state.equal, 0, left.size);
        if (state.used == plan.required) return join_again(left, right, state.equal);
        const std::size_t depth = differ_.size();
        for (std::size_t block = state.next; state.skipped + block - state.next <= static_cast<std::size_t>(k_);
             ++block) {
            split(left, right, plan, {block, state.used, state.skipped + block - state.next, state.equal}, 0);
            differ_.push_back(plan.blocks[block]);
        }
        differ_.resize(depth);
    }

    // Parts a group by the block state.next, of whose hash `consumed` bits are already equal.
    void split(const Group& left, const Group& right, const Plan& plan, const State& state, int consumed) {
        const std::size_t size = std::max(left.size, right.size);
        int bits = 1;
        while (bits < kInnerBits && (size >> bits) > kLeaf / 4) ++bits;
        const std::uint64_t mask = plan.blocks[state.next];
        std::uint32_t left_begins[(std::size_t{1} << kInnerBits) + 1];
        std::uint32_t right_begins[(std::size_t{1} << kInnerBits) + 1];
        partition(left, mask, consumed, bits, left_begins);
        if (cross_) partition(right, mask, consumed, bits, right_begins);
        for (std::size_t part = 0; part < std::size_t{1} << bits; ++part) {
            const Group some = left.part(left_begins[part], left_begins[part + 1]);
            const Group others = cross_ ? right.part(right_begins[part], right_begins[part + 1]) : Group{};
            after_split(some, others, plan, state, consumed + bits);
        }
    }

    void after_split(const Group& left, const Group& right, const Plan& plan, const State& state, int consumed) {
        if (nothing_to_join(left, right)) return;
        const std::uint64_t mask = plan.blocks[state.next];
        const int enough = std::min(__builtin_popcountll(mask) + kSlackBits, kMostHashBits);
        if (!small(left, right) && consumed < enough)
            return split(left, right, plan, state, consumed);
        descend(left, right, plan, {state.next + 1, state.used + 1, state.skipped, state.equal | mask});
    }

    // A group that is still large although it agrees on all required blocks: cut the bits that still vary.
    void join_again(const Group& left, const Group& right, std::uint64_t equal) {
        std::uint64_t all = ~std::uint64_t{0};
        std::uint64_t any = 0;
        for (const Group& group : {left, right}) {
            for (std::size_t i = 0; i < group.size; ++i) {
                all &= group.fp[i];
                any |= group.fp[i];
            }
        }
        const std::uint64_t varying = (all ^ any) & ~equal;
        for (const std::uint64_t block : differ_)
            if ((block & varying) == 0) return;  // a skipped block that cannot differ: these pairs belong elsewhere
        const Plan plan = choose_plan(left.size, right.size, cross_, varying, k_);
        if (plan.required == 0) return brute(left, right, equal, 0, left.size);
        descend(left, right, plan, {0, 0, 0, equal});
    }

    const unsigned thread_;
    const int k_;
    const bool cross_;
    const Scan scan_;
    PairSink& sink_;
    std::atomic<bool>& stopped_;
    std::vector<std::uint64_t> differ_;  // the skipped blocks: a pair that is equal on one belongs to another group
    std::uint32_t hits_[kScanBlock];
};

// A copy of the caller's fingerprints, grouped by the hash of one block after another.
class Side {
public:
    Side(const std::uint64_t* source, std::size_t n)
        : source_(source), n_(n), fp_(new std::uint64_t[n]), id_(new std::uint32_t[n]) {}

    Group all() {
        std::copy(source_, source_ + n_, fp_.get());
        std::iota(id_.get(), id_.get() + n_, 0u);
        return {fp_.get(), id_.get(), n_};
    }

    Group part(std::size_t bucket) const {
        const std::size_t begin = begins_[bucket];
        return {fp_.get() + begin, id_.get() + begin, begins_[bucket + 1] - begin};
    }

    // Each slice of the source counts, then scatters to places reserved for it: no two threads write one place.
    void scatter(std::uint64_t mask, int bits, unsigned threads) {
        const std::size_t buckets = std::size_t{1} << bits;
        const std::size_t slices = threads;
        const std::size_t step = (n_ + slices - 1) / slices;
        std::vector<std::size_t> places(slices * buckets, 0);
        const auto slice = [&](std::size_t s, auto&& visit) {
            for (std::size_t i = std::min(n_, s * step); i < std::min(n_, (s + 1) * step); ++i)
                visit(i, places[s * buckets + hash_of(source_[i] & mask, 0, bits)]);
        };
        parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
            slice(s, [](std::size_t, std::size_t& count) { ++count; });
        });
        begins_.assign(buckets + 1, 0);
        std::size_t total = 0;
        for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
            begins_[bucket] = total;
            for (std::size_t s = 0; s < slices; ++s) total += std::exchange(places[s * buckets + bucket], total);
        }
        begins_[buckets] = total;
        parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
            slice(s, [&](std::size_t i, std::size_t& place) {
                fp_[place] = source_[i];
                id_[place] = static_cast<std::uint32_t>(i);
                ++place;
            });
        });
    }

private:
    const std::uint64_t* source_;
    std::size_t n_;
    std::unique_ptr<std::uint64_t[]> fp_;
    std::unique_ptr<std::uint32_t[]> id_;
    std::vector<std::size_t> begins_;
};

std::uint64_t varying_bits(const std::uint64_t* a, std::size_t n_a, const std::uint64_t* b, std::size_t n_b) {
    std::uint64_t all = ~std::uint64_t{0};
    std::uint64_t any = 0;
    for (const auto& [values, n] : {std::pair{a, n_a}, std::pair{b, n_b}}) {
        for (std::size_t i = 0; i < n; ++i) {
            all &= values[i];
            any |= values[i];
        }
    }
    return all ^ any;
}

bool join(const std::uint64_t* left, std::size_t n_left, const std::uint64_t* right, std::size_t n_right, bool cross,
          int k, unsigned threads, Isa isa, PairSink& sink) {
    if (n_left == 0 || (cross && n_right == 0)) return true;
    std::atomic<bool> stopped{false};
    std::vector<Walk> walks;
    walks.reserve(threads);
    for (unsigned thread = 0; thread < threads; ++thread) walks.emplace_back(thread, k, cross, isa, sink, stopped);
    Side a(left, n_left);
    Side b(right, n_right);
    const std::size_t n = std::max(n_left, n_right);
    const Plan plan = choose_plan(n_left, n_right, cross, varying_bits(left, n_left, right, n_right), k);
    if (plan.required == 0) {
        const Group some = a.all();
        const Group others = b.all();
        parallel_for(n_left, threads, 64, [&](std::size_t begin, std::size_t end, unsigned thread) {
            walks[thread].brute(some, others, 0, begin, end);
        });
        return !stopped.load();
    }
    int bits = 1;
    while (bits < kTopBits && (n >> bits) > kLeaf) ++bits;
    std::vector<std::size_t> order(std::size_t{1} << bits);
    for (std::size_t block = 0; block <= static_cast<std::size_t>(k) && !stopped.load(); ++block) {
        a.scatter(plan.blocks[block], bits, threads);
        if (cross) b.scatter(plan.blocks[block], bits, threads);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::sort(order.begin(), order.end(),  // the largest first, so that no thread is left with it at the end
                  [&](std::size_t x, std::size_t y) { return a.part(x).size > a.part(y).size; });
        parallel_for(order.size(), threads, 1, [&](std::size_t i, std::size_t, unsigned thread) {
            const Group others = cross ? b.part(order[i]) : Group{};
            walks[thread].bucket(a.part(order[i]), others, plan, block, bits);
        });
    }
    return !stopped.load();
}

}  // namespace

bool self_join(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa, PairSink& sink) {
    return join(fingerprints, n, nullptr, 0, false, k, threads, isa, sink);
}

bool cross_join(const std::uint64_t* left, std::size_t n_left, const std::uint64_t* right, std::size_t n_right, int k,
                unsigned threads, Isa isa, PairSink& sink) {
    return join(left, n_left, right, n_right, true, k, threads, isa, sink);
}

}  // namespace slmfast
