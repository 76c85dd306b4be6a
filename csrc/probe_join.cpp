#include "probe_join.hpp"

#include <algorithm>
#include <utility>

#include "near_scan.hpp"

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
    std::uint32_t found[kScanBlock];
    for (std::size_t i = 0; i < n; ++i) {
        const std::size_t key = table.block.key(values[i], 0, table.bits);
        const std::size_t end = table.begins[key + 1];
        for (std::size_t from = table.begins[key]; from < end; from += kScanBlock) {
            const std::size_t count = which(values[i], table.fp + from, std::min(kScanBlock, end - from), k, found);
            for (std::size_t hit = 0; hit < count; ++hit) hits.push_back(std::uint64_t{i} << 32 | (from + found[hit]));
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

}  // namespace

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

}  // namespace slmfast
