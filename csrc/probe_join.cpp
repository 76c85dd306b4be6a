#include "probe_join.hpp"

#include <algorithm>
#include <atomic>
#include <numeric>
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

constexpr std::size_t kWindow = 16;  // members compared at once; nearly all parts of a table are smaller

// Whether one of kWindow members lies within distance k.
using AnyInWindow = bool (*)(std::uint64_t value, const std::uint64_t* members, int k);
using Probe = void (*)(const View& table, const std::uint64_t* values, std::size_t n, int k,
                       std::vector<std::uint64_t>& hits);

bool any_in_window_scalar(std::uint64_t value, const std::uint64_t* members, int k) {
    return first_between_scalar(&value, 1, members, kWindow, k, 0).near != 0;
}

// Inlined into one function an instruction set, and `any` and `which` into it. The first window is compared whatever the
// size of its part, since a loop would often end where the processor does not expect it; members of the next parts are
// no matter there, because a pair has to agree on the block.
__attribute__((always_inline)) inline void probe_with(AnyInWindow any, Which which, const View& table,
                                                      const std::uint64_t* values, std::size_t n, int k,
                                                      std::vector<std::uint64_t>& hits) {
    std::uint32_t found[kWindow];
    for (std::size_t i = 0; i < n; ++i) {
        const std::size_t key = table.block.key(0, table.bits)(values[i]);
        const std::size_t end = table.begins[key + 1];
        std::size_t from = table.begins[key];
        do {
            if (any(values[i], table.fp + from, k) && from < end) {
                const std::size_t count = which(values[i], table.fp + from, std::min(kWindow, end - from), k, found);
                for (std::size_t hit = 0; hit < count; ++hit)
                    hits.push_back(std::uint64_t{i} << 32 | (from + found[hit]));
            }
            from += kWindow;
        } while (from < end);
    }
}

void probe_scalar(const View& table, const std::uint64_t* values, std::size_t n, int k,
                  std::vector<std::uint64_t>& hits) {
    probe_with(any_in_window_scalar, which_scalar, table, values, n, k, hits);
}

#if defined(__x86_64__)

SLMFAST_AVX2 bool any_in_window_avx2(std::uint64_t value, const std::uint64_t* members, int k) {
    const __m256i here = broadcast_avx2(value);
    const __m256i one = _mm256_min_epu16(distance_avx2(here, load_avx2(members)),
                                         distance_avx2(here, load_avx2(members + 4)));
    const __m256i two = _mm256_min_epu16(distance_avx2(here, load_avx2(members + 8)),
                                         distance_avx2(here, load_avx2(members + 12)));
    const __m256i near = _mm256_cmpgt_epi64(_mm256_set1_epi64x(k + 1), _mm256_min_epu16(one, two));
    return _mm256_movemask_pd(_mm256_castsi256_pd(near)) != 0;
}

SLMFAST_AVX2 void probe_avx2(const View& table, const std::uint64_t* values, std::size_t n, int k,
                             std::vector<std::uint64_t>& hits) {
    probe_with(any_in_window_avx2, which_avx2, table, values, n, k, hits);
}

SLMFAST_AVX512 bool any_in_window_avx512(std::uint64_t value, const std::uint64_t* members, int k) {
    const __m512i one = distance_avx512(value, _mm512_loadu_si512(members));
    const __m512i two = distance_avx512(value, _mm512_loadu_si512(members + 8));
    return _mm512_cmple_epu64_mask(_mm512_min_epu64(one, two), _mm512_set1_epi64(k)) != 0;
}

SLMFAST_AVX512 void probe_avx512(const View& table, const std::uint64_t* values, std::size_t n, int k,
                                 std::vector<std::uint64_t>& hits) {
    probe_with(any_in_window_avx512, which_avx512, table, values, n, k, hits);
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

// The few, grouped by the first key bits of one block, so that those which a value may be near to lie side by side.
class ProbeTable {
public:
    ProbeTable(const std::uint64_t* few, std::size_t n, const Block& block) : block_(block), fp_(n + kWindow), id_(n) {
        while (bits_ < std::min(block.width(), kMostBits) && (n >> bits_) > 4) ++bits_;
        begins_.assign((std::size_t{1} << bits_) + 1, 0);
        for (std::size_t i = 0; i < n; ++i) ++begins_[block_.key(0, bits_)(few[i]) + 1];
        for (std::size_t part = 1; part < begins_.size(); ++part) {
            meetings_ += static_cast<double>(begins_[part]) * begins_[part] / static_cast<double>(n);
            begins_[part] += begins_[part - 1];
        }
        std::vector<std::uint32_t> next(begins_.begin(), begins_.end() - 1);
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint32_t place = next[block_.key(0, bits_)(few[i])]++;
            fp_[place] = few[i];
            id_[place] = static_cast<std::uint32_t>(i);
        }
    }

    // How many members a value meets on average, if its like is drawn as the members are.
    double meetings() const { return meetings_; }

    // Appends (i << 32 | place) for each values[i] within distance k of the member at a place that it looked up.
    void probe(const Group& values, int k, Isa isa, std::vector<std::uint64_t>& hits) const {
        probe_on(isa)({block_, bits_, begins_.data(), fp_.data()}, values.fp, values.size, k, hits);
    }

    std::uint64_t fingerprint(std::size_t place) const { return fp_[place]; }
    std::uint32_t id(std::size_t place) const { return id_[place]; }

    // The values of one piece of the many, in the order of this table's parts, so that lookups stay in the cache.
    Group in_order(const std::uint64_t* many, std::size_t begin, std::size_t end, const Group& to) const {
        const int bits = std::min(bits_, kSliceBits);
        std::vector<std::uint32_t> next((std::size_t{1} << bits) + 1, 0);
        for (std::size_t i = begin; i < end; ++i) ++next[block_.key(0, bits)(many[i]) + 1];
        std::partial_sum(next.begin(), next.end(), next.begin());
        for (std::size_t i = begin; i < end; ++i) {
            const std::uint32_t place = next[block_.key(0, bits)(many[i])]++;
            to.fp[place] = many[i];
            to.id[place] = static_cast<std::uint32_t>(i);
        }
        return to.part(0, end - begin);
    }

private:
    static constexpr int kMostBits = 24;
    static constexpr int kSliceBits = 9;

    Block block_;
    int bits_ = 1;
    double meetings_ = 0.0;
    std::vector<std::uint32_t> begins_;
    std::vector<std::uint64_t> fp_;
    std::vector<std::uint32_t> id_;
};

// One thread's room for a piece of the many and for what it finds.
struct Piece {
    static constexpr std::size_t kSize = std::size_t{1} << 18;
    static constexpr std::size_t kRun = 4096;  // values after which what was found is handed on

    Buffer<std::uint64_t> fp{kSize};
    Buffer<std::uint32_t> id{kSize};
    std::vector<std::uint64_t> hits;

    Group group() const { return {fp.get(), id.get(), kSize}; }
};

}  // namespace

std::optional<bool> probe_join(const std::uint64_t* few, std::size_t n_few, const std::uint64_t* many,
                               std::size_t n_many, int k, unsigned threads, Isa isa, PairSink& sink) {
    const Costs costs = costs_on(isa);
    const Work work = work_of(n_few, n_many, true);
    const std::vector<Block> blocks = cut(Spread::even(), k + 1);  // a pair within distance k agrees on one of them
    std::vector<ProbeTable> tables;
    double cost = 0.0;
    for (const Block& block : blocks) {
        tables.emplace_back(few, n_few, block);
        cost += static_cast<double>(n_many) * (kLookUp + tables.back().meetings() * costs.compare);
        if (cost > choose(work, costs, Spread::even(), k).nanoseconds) return std::nullopt;
    }
    // Found at its first equal block, and not again.
    const auto first_equal = [&](std::uint64_t difference) {
        std::size_t block = 0;
        while (block < blocks.size() && (difference & blocks[block].mask()) != 0) ++block;
        return block;
    };
    std::atomic<bool> stopped{false};
    std::vector<Piece> pieces(threads);
    parallel_for(n_many, threads, Piece::kSize, [&](std::size_t begin, std::size_t end, unsigned thread) {
        Piece& piece = pieces[thread];
        for (std::size_t block = 0; block < blocks.size(); ++block) {
            const ProbeTable& table = tables[block];
            const Group all = table.in_order(many, begin, end, piece.group());
            for (std::size_t from = 0; from < all.size; from += Piece::kRun) {
                const Group values = all.part(from, std::min(all.size, from + Piece::kRun));
                piece.hits.clear();
                table.probe(values, k, isa, piece.hits);
                for (const std::uint64_t hit : piece.hits) {
                    if (stopped.load(std::memory_order_relaxed)) return;
                    const std::size_t i = hit >> 32;
                    const std::size_t place = hit & 0xFFFFFFFFu;
                    if (first_equal(values.fp[i] ^ table.fingerprint(place)) != block) continue;
                    if (!sink.take(thread, table.id(place), values.id[i])) stopped.store(true);
                }
            }
        }
    });
    return !stopped.load();
}

}  // namespace slmfast
