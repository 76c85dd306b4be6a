#include "equal_texts.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "grouping.hpp"

namespace slmfast {
namespace {

// Finds the first row of equal normalised text among rows of one fingerprint.
class EqualTexts {
public:
    explicit EqualTexts(const Input& in) : in_(in) {}

    // Writes first[row] for the rows [begin, end), which ascend.
    void group(const Row* begin, const Row* end, std::int64_t* first) {
        keyed_.clear();
        for (const Row* at = begin + 1; at != end; ++at) {
            if (same_bytes(*begin, *at)) {
                first[*at] = *begin;
            } else {
                keyed_.push_back({key(*at), *at});
            }
        }
        if (keyed_.empty()) return;
        keyed_.push_back({key(*begin), *begin});
        std::sort(keyed_.begin(), keyed_.end());
        for (std::size_t from = 0; from < keyed_.size();) {
            std::size_t to = from;
            while (to < keyed_.size() && keyed_[to].first == keyed_[from].first) ++to;
            settle(from, to, first);
            from = to;
        }
    }

private:
    // Rows of one key are equal but for a collision of hashes: each goes to the first that it truly equals.
    void settle(std::size_t from, std::size_t to, std::int64_t* first) {
        std::vector<Row> distinct;
        for (std::size_t i = from; i < to; ++i) {
            const Row row = keyed_[i].second;
            const auto equal =
                std::find_if(distinct.begin(), distinct.end(), [&](Row other) { return same(other, row); });
            first[row] = equal == distinct.end() ? row : *equal;
            if (first[row] == row) distinct.push_back(row);
        }
    }

    // With plain SimHash, equal fingerprints are enough for rows with enough grams.
    bool by_fingerprint(Row row) const { return !in_.options.verified && in_.states[row] == RowState::full; }

    bool same_bytes(Row a, Row b) const {
        if (by_fingerprint(a) && by_fingerprint(b)) return true;
        return !in_.texts.is_replaced(a) && !in_.texts.is_replaced(b) && (*in_.texts.raw)[a] == (*in_.texts.raw)[b];
    }

    bool same(Row a, Row b) {
        if (by_fingerprint(a) || by_fingerprint(b)) return by_fingerprint(a) && by_fingerprint(b);
        in_.texts.read(a, one_);
        in_.texts.read(b, two_);
        return one_ == two_;
    }

    std::uint64_t key(Row row) {
        if (by_fingerprint(row)) return 0;
        in_.texts.read(row, one_);
        std::uint64_t hash = one_.size();
        for (const char32_t c : one_) hash = mix(hash ^ c);
        return hash;
    }

    const Input& in_;
    CodePoints one_;
    CodePoints two_;
    std::vector<std::pair<std::uint64_t, Row>> keyed_;
};

}  // namespace

void find_equal_texts(const Input& in, std::int64_t n, std::int64_t* first) {
    for_each_equal(in.fingerprints, static_cast<std::size_t>(n), in.options.threads,
                   [&](Row row) { return has_fingerprint(in.states[row]); },
                   [&](const Row* begin, const Row* end) { EqualTexts(in).group(begin, end, first); });
}

}  // namespace slmfast
