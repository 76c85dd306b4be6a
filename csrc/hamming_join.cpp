#include "hamming_join.hpp"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "join_plan.hpp"
#include "near_scan.hpp"
#include "near_tags.hpp"
#include "parallel.hpp"
#include "partition.hpp"
#include "probe_join.hpp"
#include "shared_work.hpp"

namespace slmfast {
namespace {

constexpr int kFanBits = 10;               // later partitions, in cache
constexpr std::size_t kScratch = kSmallJoins ? 2'048 : 262'144;  // most fingerprints in a thread's scratch
constexpr std::size_t kPlain = kSmallJoins ? 1 : 8;  // leaves in a group that is not worth a new plan
constexpr std::size_t kSample = 256;       // fingerprints whose bits are counted before a group is planned anew
constexpr std::size_t kLargeSample = 4096;  // ... and before the first plan
constexpr std::size_t kWorthGiving = kSmallJoins ? 8 : 1'024;  // fingerprints of a group that is given to a waiting thread
constexpr std::size_t kRowsWorthGiving = kSmallJoins ? 2 : 256;  // ... and rows of one that is compared by brute force
constexpr std::size_t kFew = 8;            // so few against many are compared faster than the many are partitioned

// Scratch for partitions of groups that fit in a core's cache: taken and given back like a stack.
class Scratch {
public:
    explicit Scratch(std::size_t size) : size_(std::min(kScratch, size)), fp_(size_), id_(size_) {}

    bool holds(std::size_t size) const { return size <= size_ - used_; }

    Group take(std::size_t size) {
        used_ += size;
        return {fp_.get() + used_ - size, id_.get() + used_ - size, size};
    }

    std::size_t mark() const { return used_; }
    void release(std::size_t mark) { used_ = mark; }

private:
    std::size_t size_;
    Buffer<std::uint64_t> fp_;
    Buffer<std::uint32_t> id_;
    std::size_t used_ = 0;
};

// A copy of a group.
struct CopiedGroup {
    explicit CopiedGroup(const Group& group) : fp(group.size), id(group.size), all{fp.get(), id.get(), group.size} {
        std::copy(group.fp, group.fp + group.size, fp.get());
        std::copy(group.id, group.id + group.size, id.get());
    }

    Buffer<std::uint64_t> fp;
    Buffer<std::uint32_t> id;
    Group all;
};

// One thread's walk through the groups. With `cross`, pairs join left and right; else right is empty and left is
// joined with itself.
class Walk {
public:
    // Without `shared` it does all of its work itself.
    Walk(unsigned thread, std::size_t n, int k, bool cross, Isa isa, PairSink& sink, std::atomic<bool>& stopped,
         SharedWork<Walk>* shared)
        : shared_(shared), thread_(thread), k_(k), cross_(cross), ordered_(!cross), isa_(isa), costs_(costs_on(isa)),
          scan_(near_scan(isa)), tag_scan_(tag_scan(isa)), sink_(sink), stopped_(stopped), scratch_(4 * n) {}

    // Joins one top-level bucket: `consumed` key bits of plan.blocks[block] are equal in it.
    void bucket(const Group& left, const Group& right, const Plan& plan, std::size_t block, int consumed) {
        differ_.clear();
        for (std::size_t skipped = 0; skipped < block; ++skipped) differ_.push_back(plan.blocks[skipped].mask());
        after_split(left, right, plan, {block, 0, block, 0}, consumed);
    }

    // Compares left[begin, end) with all later ones (or with all of right).
    void brute(const Group& left, const Group& right, std::uint64_t equal, std::size_t begin, std::size_t end) {
        constexpr std::size_t kRows = 64;
        for (std::size_t from = begin; from < end && !stopped_.load(std::memory_order_relaxed); from += kRows) {
            const std::size_t middle = from + (end - from) / 2;
            const Group later = left.part(middle, cross_ ? end : left.size);
            const bool much = end - from >= 2 * kRowsWorthGiving && (!cross_ || right.size >= kRowsWorthGiving);
            if (much && can_give(later, right)) {
                give(later, right, [equal, rows = end - middle](Walk& walk, const Group& mine, const Group& others) {
                    walk.brute(mine, others, equal, 0, rows);
                });
                end = middle;
            }
            const Group rows = left.part(from, std::min(end, from + kRows));
            if (cross_) {
                compare_between(rows, right, equal);
            } else {
                compare_within(rows, equal);
                compare_between(rows, left.part(from + rows.size, left.size), equal);
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
        if (!cross_) return left.size <= costs_.leaf;
        return left.size * right.size <= costs_.leaf * costs_.leaf || std::min(left.size, right.size) <= kFew;
    }

    // Whether a pair is to be found here and nowhere else: equal on the chosen blocks, different on each skipped one.
    bool belongs(std::uint64_t difference, std::uint64_t equal) const {
        if ((difference & equal) != 0) return false;
        for (const std::uint64_t block : differ_)
            if ((difference & block) == 0) return false;
        return true;
    }

    // A group that is small and not cut any further.
    void leaf(const Group& left, const Group& right, std::uint64_t equal) {
        const bool by_tags = !cross_ && tag_scan_.near != nullptr && left.size <= kMostTags && wasted_ <= 4 * looks_;
        return by_tags ? compare_tags(left, equal) : brute(left, right, equal, 0, left.size);
    }

    // The pairs of one small group, by tags of bits that are not known to be equal.
    void compare_tags(const Group& rows, std::uint64_t equal) {
        alignas(64) std::uint32_t tags[kMostTags];
        tag_scan_.cut(rows.fp, rows.size, ~equal, tags);
        for (std::size_t from = 0; from < rows.size; from += kTagRows) {
            const Rows some{from, tag_scan_.near(tags, rows.size, from, k_)};
            ++looks_;
            some.each_near([&](std::size_t i) {
                const std::size_t count = tag_scan_.which(tags, rows.fp, rows.size, i, k_, hits_);
                wasted_ += count == 0;
                report_hits(rows, i, rows, count, equal);
            });
        }
    }

    void compare_within(const Group& rows, std::uint64_t equal) {
        const auto next = [&](std::size_t at) { return scan_.first_within(rows.fp, rows.size, k_, at); };
        for (Rows some = next(0); some.at < rows.size; some = next(some.at + scan_.batch))
            some.each_near([&](std::size_t i) { find_hits(rows, i, rows.part(i + 1, rows.size), equal); });
    }

    void compare_between(const Group& rows, const Group& others, std::uint64_t equal) {
        if (others.size == 0) return;
        const auto next = [&](std::size_t at) {
            return scan_.first_between(rows.fp, rows.size, others.fp, others.size, k_, at);
        };
        for (Rows some = next(0); some.at < rows.size; some = next(some.at + scan_.batch))
            some.each_near([&](std::size_t i) { find_hits(rows, i, others, equal); });
    }

    void find_hits(const Group& rows, std::size_t i, const Group& others, std::uint64_t equal) {
        for (std::size_t from = 0; from < others.size; from += kScanBlock) {
            const std::size_t length = std::min(kScanBlock, others.size - from);
            if (stopped_.load(std::memory_order_relaxed)) return;
            const std::size_t count = scan_.which(rows.fp[i], others.fp + from, length, k_, hits_);
            report_hits(rows, i, others.part(from, from + length), count, equal);
        }
    }

    // Reports the first `count` of hits_, which are near row i, where they belong here.
    void report_hits(const Group& rows, std::size_t i, const Group& others, std::size_t count, std::uint64_t equal) {
        for (std::size_t hit = 0; hit < count; ++hit) {
            const std::size_t j = hits_[hit];
            if (belongs(rows.fp[i] ^ others.fp[j], equal)) report(rows.id[i], others.id[j]);
        }
    }

    void report(std::uint32_t a, std::uint32_t b) {
        if (ordered_ && a > b) std::swap(a, b);
        if (!sink_.take(thread_, a, b)) stopped_.store(true, std::memory_order_relaxed);
    }

    void descend(const Group& left, const Group& right, const Plan& plan, const State& state) {
        if (nothing_to_join(left, right) || stopped_.load(std::memory_order_relaxed)) return;
        if (small(left, right)) return leaf(left, right, state.equal);
        if (state.used == plan.required) {
            const bool plain = std::max(left.size, right.size) <= kPlain * costs_.leaf;
            return plain ? brute(left, right, state.equal, 0, left.size) : join_again(left, right, state.equal);
        }
        const std::size_t depth = differ_.size();
        for (std::size_t block = state.next; state.skipped + block - state.next <= static_cast<std::size_t>(k_);
             ++block) {
            split(left, right, plan, {block, state.used, state.skipped + block - state.next, state.equal}, 0);
            differ_.push_back(plan.blocks[block].mask());
        }
        differ_.resize(depth);
    }

    // Parts a group by the block state.next, of whose key `consumed` bits are already equal, or has another thread do so.
    void split(const Group& left, const Group& right, const Plan& plan, const State& state, int consumed) {
        if (std::max(left.size, right.size) < kWorthGiving || !can_give(left, right))
            return split_here(left, right, plan, state, consumed);
        give(left, right, [plan, state, consumed](Walk& walk, const Group& mine, const Group& others) {
            walk.split_here(mine, others, plan, state, consumed);  // itself: given on and on, it would never be done
        });
    }

    void split_here(const Group& left, const Group& right, const Plan& plan, const State& state, int consumed) {
        const std::size_t size = std::max(left.size, right.size);
        const Block& block = plan.blocks[state.next];
        const int most = std::min(kFanBits, block.width() - consumed);
        int bits = 1;
        while (bits < most && (size >> bits) > costs_.target) ++bits;
        const std::size_t mark = scratch_.mark();
        std::uint32_t left_begins[(std::size_t{1} << kFanBits) + 1];
        std::uint32_t right_begins[(std::size_t{1} << kFanBits) + 1];
        const Group some = parted(left, block, consumed, bits, left_begins);
        const Group others = cross_ ? parted(right, block, consumed, bits, right_begins) : Group{};
        for (std::size_t part = 0; part < std::size_t{1} << bits; ++part) {
            after_split(some.part(left_begins[part], left_begins[part + 1]),
                        cross_ ? others.part(right_begins[part], right_begins[part + 1]) : Group{}, plan, state,
                        consumed + bits);
        }
        scratch_.release(mark);
    }

    // A walk of this thread for pairs between two groups of n fingerprints in all.
    Walk crossing(std::size_t n) const { return {thread_, n, k_, true, isa_, sink_, stopped_, shared_}; }

    // Goes where another walk stands.
    Walk& stand(bool ordered, const std::vector<std::uint64_t>& differ) {
        ordered_ = ordered;
        differ_ = differ;
        return *this;
    }

    // Whether a thread waits for work, and a copy of these rows is small.
    bool can_give(const Group& left, const Group& right) const {
        return shared_ != nullptr && left.size + right.size <= kScratch && shared_->wanted();
    }

    // Has another thread call run(walk, rows, others) with copies of them, for pairs that belong where this walk stands.
    template <class Run>
    void give(const Group& left, const Group& right, Run run) {
        const auto rows = std::make_shared<const CopiedGroup>(left);
        const auto others = std::make_shared<const CopiedGroup>(right);
        shared_->give([rows, others, cross = cross_, ordered = ordered_, differ = differ_, run = std::move(run)](Walk& walk) {
            if (cross == walk.cross_) return run(walk.stand(ordered, differ), rows->all, others->all);
            Walk between = walk.crossing(rows->all.size + others->all.size);
            run(between.stand(ordered, differ), rows->all, others->all);
        });
    }

    // The group cut into 2^bits parts: in scratch where it fits, else where it is.
    Group parted(const Group& group, const Block& block, int consumed, int bits, std::uint32_t* begins) {
        std::uint32_t next[std::size_t{1} << kFanBits];
        count_parts(group, block, consumed, bits, begins);
        std::copy(begins, begins + (std::size_t{1} << bits), next);
        if (!scratch_.holds(group.size)) {
            swap_parts(group, block, consumed, bits, begins, next);
            return group;
        }
        const Group to = scratch_.take(group.size);
        scatter_parts(group, block, consumed, bits, next, to);
        return to;
    }

    void after_split(const Group& left, const Group& right, const Plan& plan, const State& state, int consumed) {
        if (nothing_to_join(left, right)) return;
        const Block& block = plan.blocks[state.next];
        const bool last = state.used + 1 == plan.required;
        const int enough = last ? block.width() : block.width() - kSpareBits;
        if (!small(left, right) && consumed < enough) return split(left, right, plan, state, consumed);
        descend(left, right, plan, {state.next + 1, state.used + 1, state.skipped, state.equal | block.mask()});
    }

    // A group that is still large although it agrees on all required blocks: cut the bits that still vary. A plan never
    // takes up bits that are held equal, so there are at most 64 blocks on the way down.
    void join_again(const Group& left, const Group& right, std::uint64_t equal) {
        if (nothing_to_join(left, right)) return;
        if (small(left, right)) return leaf(left, right, equal);
        if (!cross_ && leave_crowd(left, equal)) return;
        const Spread spread = spread_of(left.fp, left.size, right.fp, right.size, ~equal, kSample);
        const Plan plan = make_plan(work_of(left.size, right.size, cross_), costs_, spread, k_);
        if (plan.required == 0) return brute(left, right, equal, 0, left.size);
        descend(left, right, plan, {0, 0, 0, equal});
    }

    // If most of a group agree on a skipped block, the pairs among these belong elsewhere: only those with the rest, and
    // among the rest, are left to join. Says whether it was so. Without it a family that shares whole blocks would be
    // searched through once for every way to choose them.
    bool leave_crowd(const Group& group, std::uint64_t equal) {
        for (const std::uint64_t block : differ_) {
            const std::uint64_t value = most_frequent(group, block);
            std::size_t rest = 0;
            for (std::size_t i = 0; i < group.size; ++i) rest += (group.fp[i] & block) != value;
            if (2 * rest >= group.size) continue;
            std::size_t front = 0;
            for (std::size_t i = 0; front < rest; ++i) {
                if ((group.fp[i] & block) == value) continue;
                std::swap(group.fp[i], group.fp[front]);
                std::swap(group.id[i], group.id[front++]);
            }
            const Group others = group.part(0, rest);
            const Group crowd = group.part(rest, group.size);
            crossing(group.size).stand(ordered_, differ_).join_again(others, crowd, equal);
            join_again(others, {}, equal);
            return true;
        }
        return false;
    }

    // The value of a block that more than half of a group share, if there is one (Boyer and Moore's majority vote).
    static std::uint64_t most_frequent(const Group& group, std::uint64_t block) {
        std::uint64_t value = 0;
        std::size_t votes = 0;
        for (std::size_t i = 0; i < group.size; ++i) {
            const std::uint64_t other = group.fp[i] & block;
            if (votes == 0) value = other;
            votes += other == value ? 1 : static_cast<std::size_t>(-1);
        }
        return value;
    }

    SharedWork<Walk>* const shared_;
    const unsigned thread_;
    const int k_;
    const bool cross_;
    bool ordered_;  // whether a pair is told with the smaller position first
    const Isa isa_;
    const Costs costs_;
    const NearScan scan_;
    const TagScan tag_scan_;
    std::size_t looks_ = 1024;  // batches of rows whose tags were compared, and some on trust
    std::size_t wasted_ = 0;  // rows of near tags without a near fingerprint: where these are many, tags tell too little
    PairSink& sink_;
    std::atomic<bool>& stopped_;
    Scratch scratch_;
    std::vector<std::uint64_t> differ_;  // the skipped blocks: a pair that is equal on one belongs to another group
    std::uint32_t hits_[kScanBlock];
};

bool join(const std::uint64_t* left, std::size_t n_left, const std::uint64_t* right, std::size_t n_right, bool cross,
          int k, unsigned threads, Isa isa, PairSink& sink) {
    if (n_left == 0 || (cross && n_right == 0)) return true;
    std::atomic<bool> stopped{false};
    SharedWork<Walk> shared;
    std::vector<Walk> walks;
    walks.reserve(threads);
    for (unsigned thread = 0; thread < threads; ++thread)
        walks.emplace_back(thread, n_left + n_right, k, cross, isa, sink, stopped, &shared);
    Side a(left, n_left);
    Side b(right, n_right);
    const Work work = work_of(n_left, n_right, cross);
    const Spread spread = spread_of(left, n_left, right, n_right, ~std::uint64_t{0}, kLargeSample);
    const Plan plan = make_plan(work, costs_on(isa), spread, k);
    if (plan.required == 0) {
        const Group some = a.all();
        const Group others = b.all();
        parallel_for(n_left, threads, 64, [&](std::size_t begin, std::size_t end, unsigned thread) {
            walks[thread].brute(some, others, 0, begin, end);
        });
        return !stopped.load();
    }
    for (std::size_t block = 0; block <= static_cast<std::size_t>(k) && !stopped.load(); ++block) {
        const int bits = top_bits(work.others, plan.blocks[block].width());
        a.scatter(plan.blocks[block], bits, threads);
        if (cross) b.scatter(plan.blocks[block], bits, threads);
        std::vector<std::size_t> order(std::size_t{1} << bits);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::sort(order.begin(), order.end(),  // the largest first, so that no thread is left with it at the end
                  [&](std::size_t x, std::size_t y) { return a.part(x).size > a.part(y).size; });
        std::atomic<std::size_t> next{0};
        parallel_for(threads, threads, 1, [&](std::size_t, std::size_t, unsigned thread) {
            try {
                shared.run(walks[thread], [&] {
                    for (std::size_t i = next++; i < order.size(); i = next++) {
                        const Group others = cross ? b.part(order[i]) : Group{};
                        walks[thread].bucket(a.part(order[i]), others, plan, block, bits);
                    }
                });
            } catch (...) {
                stopped.store(true);  // the other threads need not go on
                throw;
            }
        });
    }
    return !stopped.load();
}

// The cross join of so few that each of the many is compared with all of them.
bool brute_join(const std::uint64_t* few, std::size_t n_few, const std::uint64_t* many, std::size_t n_many, int k,
                unsigned threads, Isa isa, PairSink& sink) {
    const NearScan scan = near_scan(isa);
    std::atomic<bool> stopped{false};
    parallel_for(n_many, threads, kScanBlock, [&](std::size_t begin, std::size_t end, unsigned thread) {
        const auto next = [&](std::size_t at) {
            return scan.first_between(few, n_few, many + begin, end - begin, k, at);
        };
        std::uint32_t hits[kScanBlock];
        for (Rows some = next(0); some.at < n_few; some = next(some.at + scan.batch)) {
            some.each_near([&](std::size_t i) {
                const std::size_t count = scan.which(few[i], many + begin, end - begin, k, hits);
                for (std::size_t hit = 0; hit < count && !stopped.load(std::memory_order_relaxed); ++hit)
                    if (!sink.take(thread, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(begin) + hits[hit]))
                        stopped.store(true);
            });
        }
    });
    return !stopped.load();
}

// Hands on the pairs of a join of parts of two arrays, in whichever order they were joined.
struct Moved : PairSink {
    Moved(PairSink& s, bool swap, std::size_t a, std::size_t b) : sink(s), swapped(swap), from_a(a), from_b(b) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        if (swapped) std::swap(a, b);
        return sink.take(thread, a + static_cast<std::uint32_t>(from_a), b + static_cast<std::uint32_t>(from_b));
    }

    PairSink& sink;
    bool swapped;
    std::size_t from_a;
    std::size_t from_b;
};

}  // namespace

bool self_join(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa, PairSink& sink) {
    return join(fingerprints, n, nullptr, 0, false, k, threads, isa, sink);
}

bool cross_join(const std::uint64_t* left, std::size_t n_left, const std::uint64_t* right, std::size_t n_right, int k,
                unsigned threads, Isa isa, PairSink& sink) {
    constexpr std::size_t kManyTimes = 4;
    constexpr std::size_t kLeastSlice = std::size_t{1} << 22;
    if (n_left == 0 || n_right == 0) return true;
    const bool swapped = n_left > n_right;  // the sink knows the left side's positions first
    const auto [few, n_few] = swapped ? std::pair{right, n_right} : std::pair{left, n_left};
    const auto [many, n_many] = swapped ? std::pair{left, n_left} : std::pair{right, n_right};
    if (n_many / kManyTimes >= n_few) {
        Moved moved(sink, swapped, 0, 0);
        if (static_cast<double>(n_few) * costs_on(isa).compare < kLookUp * (k + 1))
            return brute_join(few, n_few, many, n_many, k, threads, isa, moved);
        const std::optional<bool> probed = probe_join(few, n_few, many, n_many, k, threads, isa, moved);
        if (probed) return *probed;
    }
    // The larger side goes by slices, so that the copies stay small beside it.
    const std::size_t slice = std::max(kLeastSlice, kManyTimes * n_few);
    for (std::size_t from = 0; from < n_many; from += slice) {
        Moved moved(sink, swapped, swapped ? from : 0, swapped ? 0 : from);
        if (!join(few, n_few, many + from, std::min(slice, n_many - from), true, k, threads, isa, moved)) return false;
    }
    return true;
}

}  // namespace slmfast
