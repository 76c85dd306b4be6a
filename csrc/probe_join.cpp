#include "probe_join.hpp"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "join_plan.hpp"
#include "near_scan.hpp"
#include "parallel.hpp"
#include "partition.hpp"

namespace slmfast {
namespace {

struct View {
    Block block;
    int bits;
    const std::uint32_t* begins;
    const std::uint64_t* fp;
};

using Probe = void (*)(const View& table, const std::uint64_t* values, std::size_t n, int k,
                       std::vector<std::uint64_t>& hits);

// Inlined into one function an instruction set, and `which` into it: most lookups compare less than a vector.
__attribute__((always_inline)) inline void probe_with(Which which, const View& table, const std::uint64_t* values,
                                                      std::size_t n, int k, std::vector<std::uint64_t>& hits) {
    constexpr std::size_t kAhead = 32;  // lookups begun before one is finished: a large table is not in the cache
    std::uint32_t found[kScanBlock];
    std::uint32_t begins[kAhead];
    std::uint32_t ends[kAhead];
    for (std::size_t base = 0; base < n; base += kAhead) {
        const std::size_t some = std::min(kAhead, n - base);
        for (std::size_t i = 0; i < some; ++i) {
            const std::size_t key = table.block.key(values[base + i], 0, table.bits);
            begins[i] = table.begins[key];
            ends[i] = table.begins[key + 1];
            __builtin_prefetch(table.fp + begins[i]);
            __builtin_prefetch(table.fp + ends[i]);
        }
        for (std::size_t i = 0; i < some; ++i) {
            for (std::size_t from = begins[i]; from < ends[i]; from += kScanBlock) {
                const std::size_t length = std::min<std::size_t>(kScanBlock, ends[i] - from);
                const std::size_t count = which(values[base + i], table.fp + from, length, k, found);
                for (std::size_t hit = 0; hit < count; ++hit)
                    hits.push_back(std::uint64_t{base + i} << 32 | (from + found[hit]));
            }
        }
    }
}

void probe_scalar(const View& table, const std::uint64_t* values, std::size_t n, int k,
                  std::vector<std::uint64_t>& hits) {
    probe_with(which_scalar, table, values, n, k, hits);
}

#if defined(__x86_64__)

__attribute__((target("avx2,popcnt"))) void probe_avx2(const View& table, const std::uint64_t* values, std::size_t n,
                                                       int k, std::vector<std::uint64_t>& hits) {
    probe_with(which_avx2, table, values, n, k, hits);
}

SLMFAST_AVX512 void probe_avx512(const View& table, const std::uint64_t* values, std::size_t n, int k,
                                 std::vector<std::uint64_t>& hits) {
    probe_with(which_avx512, table, values, n, k, hits);
}

#endif

Probe probe_on(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return probe_avx512;
    if (isa == Isa::avx2) return probe_avx2;
#endif
    (void)isa;
    return probe_scalar;
}

// One of k + 1 blocks of the bits; a pair within distance k agrees on at least one of them. Fingerprints are grouped by
// the block's first key bits, so those that a value may be near to lie side by side.
class ProbeTable {
public:
    ProbeTable(const std::uint64_t* fingerprints, std::size_t n, const Block& block);

    // How many members a value meets on average, if its like is drawn as the members are.
    double meetings() const { return meetings_; }

    // Appends (i << 32 | j) for each values[i] within distance k of member j that agrees on this block.
    void probe(const std::uint64_t* values, std::size_t n, int k, Isa isa, std::vector<std::uint64_t>& hits) const;

private:
    Block block_;
    int bits_;
    double meetings_ = 0.0;
    std::vector<std::uint32_t> begins_;
    std::vector<std::uint64_t> fp_;
    std::vector<std::uint32_t> id_;
};

ProbeTable::ProbeTable(const std::uint64_t* fingerprints, std::size_t n, const Block& block)
    : block_(block), bits_(1), fp_(n), id_(n) {
    while (bits_ < std::min(block.width(), 24) && (n >> bits_) > 4) ++bits_;
    begins_.assign((std::size_t{1} << bits_) + 1, 0);
    for (std::size_t i = 0; i < n; ++i) ++begins_[block_.key(fingerprints[i], 0, bits_) + 1];
    for (std::size_t part = 1; part < begins_.size(); ++part) {
        meetings_ += static_cast<double>(begins_[part]) * begins_[part] / static_cast<double>(n);
        begins_[part] += begins_[part - 1];
    }
    std::vector<std::uint32_t> next(begins_.begin(), begins_.end() - 1);
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t place = next[block_.key(fingerprints[i], 0, bits_)]++;
        fp_[place] = fingerprints[i];
        id_[place] = static_cast<std::uint32_t>(i);
    }
}

void ProbeTable::probe(const std::uint64_t* values, std::size_t n, int k, Isa isa,
                       std::vector<std::uint64_t>& hits) const {
    const std::size_t known = hits.size();
    probe_on(isa)({block_, bits_, begins_.data(), fp_.data()}, values, n, k, hits);
    std::size_t kept = known;
    for (std::size_t hit = known; hit < hits.size(); ++hit) {
        const std::size_t i = hits[hit] >> 32;
        const std::size_t place = hits[hit] & 0xFFFFFFFFu;
        if (((values[i] ^ fp_[place]) & block_.mask()) == 0) hits[kept++] = std::uint64_t{i} << 32 | id_[place];
    }
    hits.resize(kept);
}

}  // namespace

std::optional<bool> probe_join(const std::uint64_t* few, std::size_t n_few, const std::uint64_t* many,
                               std::size_t n_many, int k, unsigned threads, Isa isa, PairSink& sink) {
    constexpr double kLookUp = 4.0;  // nanoseconds
    constexpr std::size_t kGrain = 16'384;
    const Costs costs = costs_on(isa);
    const Work work = work_of(n_few, n_many, true);
    const std::vector<Block> blocks = cut(~std::uint64_t{0}, k + 1);
    std::vector<ProbeTable> tables;
    double cost = 0.0;
    for (const Block& block : blocks) {
        tables.emplace_back(few, n_few, block);
        cost += static_cast<double>(n_many) * (kLookUp + tables.back().meetings() * costs.compare);
        if (cost > choose(work, costs, 64, k).nanoseconds) return std::nullopt;
    }
    std::atomic<bool> stopped{false};
    std::vector<std::vector<std::uint64_t>> hits(threads);
    for (std::size_t block = 0; block < blocks.size(); ++block) {
        parallel_for(n_many, threads, kGrain, [&](std::size_t begin, std::size_t end, unsigned thread) {
            if (stopped.load(std::memory_order_relaxed)) return;
            hits[thread].clear();
            tables[block].probe(many + begin, end - begin, k, isa, hits[thread]);
            for (const std::uint64_t hit : hits[thread]) {
                const std::size_t i = begin + (hit >> 32);
                const auto j = static_cast<std::uint32_t>(hit);
                const std::uint64_t difference = many[i] ^ few[j];
                const bool earlier = std::any_of(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(block),
                                                 [&](const Block& other) { return (difference & other.mask()) == 0; });
                if (earlier) continue;  // found in that block's table
                if (!sink.take(thread, j, static_cast<std::uint32_t>(i))) stopped.store(true);
            }
        });
    }
    return !stopped.load();
}

}  // namespace slmfast
