// Pairs of rows from pairs of distinct fingerprints.
#include <algorithm>
#include <numeric>
#include <utility>

#include "grouping.hpp"
#include "hamming_join.hpp"
#include "parallel.hpp"

namespace slmfast {
namespace {

// Gathers pairs of distinct fingerprints, and gives back the pairs of rows that bear them.
struct RowPairs : PairSink {
    RowPairs(unsigned threads, const std::vector<std::uint32_t>& r, const std::vector<std::uint32_t>& b)
        : rows(r), begins(b), parts(threads) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        for (std::size_t x = begins[a]; x < begins[a + 1]; ++x)
            for (std::size_t y = begins[b]; y < begins[b + 1]; ++y) add(parts[thread], rows[x], rows[y]);
        return true;
    }

    void take_equal(unsigned thread, std::size_t group) {
        for (std::size_t x = begins[group]; x < begins[group + 1]; ++x)
            for (std::size_t y = x + 1; y < begins[group + 1]; ++y) add(parts[thread], rows[x], rows[y]);
    }

    static void add(std::vector<std::uint64_t>& to, std::uint32_t x, std::uint32_t y) {
        to.push_back(std::uint64_t{std::min(x, y)} << 32 | std::max(x, y));
    }

    const std::vector<std::uint32_t>& rows;   // by fingerprint
    const std::vector<std::uint32_t>& begins;  // where each fingerprint's rows begin
    std::vector<std::vector<std::uint64_t>> parts;
};

}  // namespace

std::vector<std::uint64_t> near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads,
                                      Isa isa) {
    std::vector<std::uint32_t> all_rows(n);
    std::iota(all_rows.begin(), all_rows.end(), 0u);
    const std::vector<std::uint32_t> rows = group_rows(fingerprints, all_rows, threads);
    std::vector<std::uint32_t>().swap(all_rows);
    std::vector<std::uint64_t> distinct;
    std::vector<std::uint32_t> begins;
    for (std::size_t i = 0; i < n; ++i) {
        if (i > 0 && fingerprints[rows[i]] == fingerprints[rows[i - 1]]) continue;
        distinct.push_back(fingerprints[rows[i]]);
        begins.push_back(static_cast<std::uint32_t>(i));
    }
    begins.push_back(static_cast<std::uint32_t>(n));
    RowPairs pairs(threads, rows, begins);
    parallel_for(distinct.size(), threads, 1024, [&](std::size_t begin, std::size_t end, unsigned thread) {
        for (std::size_t group = begin; group < end; ++group) pairs.take_equal(thread, group);
    });
    self_join(distinct.data(), distinct.size(), k, threads, isa, pairs);
    std::vector<std::uint64_t> all = std::move(pairs.parts[0]);
    for (std::size_t thread = 1; thread < pairs.parts.size(); ++thread) {
        all.insert(all.end(), pairs.parts[thread].begin(), pairs.parts[thread].end());
        std::vector<std::uint64_t>().swap(pairs.parts[thread]);
    }
    std::sort(all.begin(), all.end());
    return all;
}

}  // namespace slmfast
