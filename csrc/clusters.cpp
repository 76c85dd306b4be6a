#include "clusters.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>

#include "grouping.hpp"
#include "hamming_join.hpp"
#include "jaccard.hpp"
#include "parallel.hpp"

namespace slmfast {
namespace {

using Row = std::uint32_t;
using Node = std::uint32_t;  // a position in the list of nodes, which is in row order

struct Input {
    NormalisedTexts texts;
    const std::uint64_t* fingerprints;
    const RowState* states;
    ClusterOptions options;
};

// --- Equal texts ------------------------------------------------------------------------------------------------

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

bool has_fingerprint(RowState state) { return state == RowState::few || state == RowState::full; }

// first[row] = the first row of equal text, where there is one before; rows stand for themselves on entry.
void find_equal_texts(const Input& in, std::int64_t n, std::int64_t* first) {
    for_each_equal(in.fingerprints, static_cast<std::size_t>(n), in.options.threads,
                   [&](Row row) { return has_fingerprint(in.states[row]); },
                   [&](const Row* begin, const Row* end) { EqualTexts(in).group(begin, end, first); });
}

// --- Nodes ------------------------------------------------------------------------------------------------------

// The nodes that take part in a join: first rows of equal texts, in row order.
struct Nodes {
    std::vector<Row> rows;
    std::vector<std::uint64_t> fingerprints;

    // Of the first n rows those for which `wanted` holds.
    template <class Wanted>
    Nodes(const Input& in, std::int64_t n, Wanted&& wanted) {
        std::size_t count = 0;
        for (std::int64_t row = 0; row < n; ++row) count += wanted(row);
        rows.reserve(count);
        fingerprints.reserve(count);
        for (std::int64_t row = 0; row < n; ++row) {
            if (!wanted(row)) continue;
            rows.push_back(static_cast<Row>(row));
            fingerprints.push_back(in.fingerprints[row]);
        }
    }
};

// Verifies pairs of nodes, with one Jaccard a thread.
class Verifier {
public:
    Verifier(const Input& in, const Nodes& nodes) : in_(in), nodes_(nodes) {
        for (unsigned thread = 0; thread < in.options.threads; ++thread)
            jaccards_.emplace_back(in.options.ngram, in.options.isa);
    }

    bool operator()(unsigned thread, Node a, Node b) {
        if (!in_.options.verified) return true;
        return jaccards_[thread](in_.texts, nodes_.rows[a], in_.texts, nodes_.rows[b]) >= in_.options.verify;
    }

private:
    const Input& in_;
    const Nodes& nodes_;
    std::vector<Jaccard> jaccards_;
};

std::vector<std::uint64_t> gather(const Nodes& nodes, const std::vector<Node>& some) {
    std::vector<std::uint64_t> fingerprints;
    fingerprints.reserve(some.size());
    for (const Node node : some) fingerprints.push_back(nodes.fingerprints[node]);
    return fingerprints;
}

// --- Stored rows ------------------------------------------------------------------------------------------------

using Place = std::int64_t;  // of a stored row, counted through the spans

// The stored rows as one sequence, though each span lies where it is.
class Stored {
public:
    explicit Stored(const std::vector<StoredSpan>& spans) : spans_(spans) {
        for (const StoredSpan& span : spans) {
            begins_.push_back(size_);
            size_ += static_cast<Place>(span.size);
        }
    }

    struct At {
        const StoredSpan& span;
        std::int64_t row;
    };

    At operator[](Place place) const {
        const auto after = std::upper_bound(begins_.begin(), begins_.end(), place);
        const auto span = static_cast<std::size_t>(after - begins_.begin()) - 1;
        return {spans_[span], place - begins_[span]};
    }

    std::uint64_t fingerprint(Place place) const {
        const auto [span, row] = (*this)[place];
        return span.fingerprints[row];
    }

    // Calls visit(first place, fingerprints, count) for all rows in order; small spans are gathered, large ones are
    // given as they lie.
    template <class Visit>
    void for_each_batch(Visit&& visit) const {
        constexpr std::size_t kLarge = std::size_t{1} << 16;
        std::vector<std::uint64_t> gathered;
        const auto flush = [&](Place end) {
            if (!gathered.empty()) visit(end - static_cast<Place>(gathered.size()), gathered.data(), gathered.size());
            gathered.clear();
        };
        for (std::size_t i = 0; i < spans_.size(); ++i) {
            const StoredSpan& span = spans_[i];
            if (span.size >= kLarge || gathered.size() + span.size > kLarge) flush(begins_[i]);
            if (span.size >= kLarge) {
                visit(begins_[i], span.fingerprints, span.size);
            } else {
                gathered.insert(gathered.end(), span.fingerprints, span.fingerprints + span.size);
            }
        }
        flush(size_);
    }

private:
    const std::vector<StoredSpan>& spans_;
    std::vector<Place> begins_;  // the first place of each span; of several that share one, only the last has rows
    Place size_ = 0;
};

// Finds the earliest stored row that claims each of the asking rows, which are firsts of their texts.
class StoredClaims : public PairSink {
public:
    StoredClaims(const Input& in, const Stored& stored, const Nodes& asking)
        : in_(in), stored_(stored), asking_(asking), best_(asking.rows.size()) {
        for (auto& best : best_) best.store(kNone, std::memory_order_relaxed);
        for (unsigned thread = 0; thread < in.options.threads; ++thread)
            scratch_.emplace_back(in.options.ngram, in.options.isa);
    }

    // Writes -1 - place to duplicate_of of every row that is claimed.
    void run(std::int64_t* duplicate_of) {
        stored_.for_each_batch([&](Place first, const std::uint64_t* fingerprints, std::size_t count) {
            first_ = first;
            cross_join(fingerprints, count, asking_.fingerprints.data(), asking_.rows.size(), in_.options.k,
                       in_.options.threads, in_.options.isa, *this);
        });
        for (std::size_t i = 0; i < best_.size(); ++i) {
            const Place place = best_[i].load(std::memory_order_relaxed);
            if (place != kNone) duplicate_of[asking_.rows[i]] = -1 - place;
        }
    }

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        const Place candidate = first_ + a;
        Place known = best_[b].load(std::memory_order_relaxed);
        if (candidate >= known || !claims(scratch_[thread], candidate, asking_.rows[b])) return true;
        while (candidate < known && !best_[b].compare_exchange_weak(known, candidate)) {}
        return true;
    }

private:
    static constexpr Place kNone = std::numeric_limits<Place>::max();

    struct Scratch {
        Scratch(int ngram, Isa isa) : jaccard(ngram, isa) {}
        Jaccard jaccard;
        CodePoints one;
        CodePoints two;
    };

    // For rows within k: texts with few grams must be equal, the others similar.
    bool claims(Scratch& scratch, Place place, Row row) const {
        const auto [span, at] = stored_[place];
        if (span.states[at] != in_.states[row]) return false;
        if (in_.states[row] == RowState::full)
            return !in_.options.verified || scratch.jaccard(span.texts, at, in_.texts, row) >= in_.options.verify;
        if (span.fingerprints[at] != in_.fingerprints[row]) return false;
        span.texts.read(at, scratch.one);
        in_.texts.read(row, scratch.two);
        return scratch.one == scratch.two;
    }

    const Input& in_;
    const Stored& stored_;
    const Nodes& asking_;
    Place first_ = 0;  // of the batch being joined
    std::vector<std::atomic<Place>> best_;
    std::vector<Scratch> scratch_;
};

// --- Representatives --------------------------------------------------------------------------------------------

// Collects pairs as (later << 32 | earlier) up to a budget, beyond which it stops the join.
class BoundedPairs : public PairSink {
public:
    BoundedPairs(unsigned threads, std::size_t budget) : parts_(threads), budget_(budget) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        if (taken_.fetch_add(1, std::memory_order_relaxed) >= budget_) return false;
        parts_[thread].push_back(std::uint64_t{b} << 32 | a);
        return true;
    }

    std::vector<std::uint64_t> sorted() {
        std::vector<std::uint64_t> all;
        for (auto& part : parts_) {
            all.insert(all.end(), part.begin(), part.end());
            std::vector<std::uint64_t>().swap(part);
        }
        std::sort(all.begin(), all.end());
        return all;
    }

private:
    std::vector<std::vector<std::uint64_t>> parts_;
    std::atomic<std::size_t> taken_{0};
    const std::size_t budget_;
};

// The greedy choice. Pairs of a dense set are quadratic in number, so they are never all held: a set with too many is
// halved, the earlier half is settled first, and what it keeps clears the later half by a join that stores nothing.
class Representatives {
public:
    Representatives(const Input& in, const Nodes& nodes)
        : in_(in), nodes_(nodes), verify_(in, nodes), stand_in_(nodes.rows.size()),
          budget_(in.options.pair_budget > 0 ? in.options.pair_budget
                                             : std::max<std::size_t>(kLeastBudget, 2 * nodes.rows.size())) {
        std::iota(stand_in_.begin(), stand_in_.end(), Node{0});
    }

    const std::vector<Node>& run() {
        std::vector<Node> all(stand_in_);
        settle(std::move(all));
        return stand_in_;
    }

private:
    static constexpr std::size_t kLeastBudget = std::size_t{1} << 20;

    // Settles nodes that no earlier kept node outside the set claims; returns those kept. Both ascend.
    std::vector<Node> settle(std::vector<Node> set) {
        BoundedPairs pairs(in_.options.threads, budget_);
        bool whole;
        {
            std::vector<std::uint64_t> some;
            if (set.size() < nodes_.rows.size()) some = gather(nodes_, set);
            const std::vector<std::uint64_t>& fingerprints = some.empty() ? nodes_.fingerprints : some;
            whole = self_join(fingerprints.data(), set.size(), in_.options.k, in_.options.threads, in_.options.isa,
                              pairs);
        }
        if (whole) return settle_by_pairs(set, pairs.sorted());
        const auto middle = set.begin() + static_cast<std::ptrdiff_t>(set.size() / 2);
        std::vector<Node> later(middle, set.end());
        set.erase(middle, set.end());
        std::vector<Node> kept = settle(std::move(set));
        const std::vector<Node> rest = settle(clear(kept, later));
        kept.insert(kept.end(), rest.begin(), rest.end());
        return kept;
    }

    // The pairs (later << 32 | earlier), as positions in the set, are sorted, and so settled in order. They are taken
    // in chunks of whole groups of one `later`: what comes before a chunk is settled, so all its groups look there at
    // once; only those that find nothing there go on, one after another, with candidates from the chunk itself.
    std::vector<Node> settle_by_pairs(const std::vector<Node>& set, const std::vector<std::uint64_t>& pairs) {
        constexpr std::size_t kChunk = std::size_t{1} << 15;
        std::vector<std::size_t> groups;   // where each begins, and the last ends
        std::vector<std::size_t> reached;  // how far each has come
        for (std::size_t begin = 0; begin < pairs.size(); begin = groups.back()) {
            groups.clear();
            for (std::size_t i = begin; i < pairs.size(); ++i) {
                if (i > begin && pairs[i] >> 32 == pairs[i - 1] >> 32) continue;
                groups.push_back(i);
                if (i - begin >= kChunk) break;
            }
            if (groups.back() - begin < kChunk) groups.push_back(pairs.size());
            reached.assign(groups.begin(), groups.end() - 1);
            const std::uint64_t settled = pairs[begin] >> 32;
            const auto look_back = [&](std::size_t from, std::size_t to, unsigned thread) {
                for (std::size_t group = from; group < to; ++group)
                    reached[group] = claim(thread, set, pairs, groups[group], groups[group + 1], settled);
            };
            parallel_for(reached.size(), in_.options.threads, 16, look_back);
            for (std::size_t group = 0; group < reached.size(); ++group)
                claim(0, set, pairs, reached[group], groups[group + 1], set.size());
        }
        std::vector<Node> kept;
        for (const Node node : set)
            if (stand_in_[node] == node) kept.push_back(node);
        return kept;
    }

    // Looks for the first kept node that claims the `later` of the pairs [from, to), among those before `limit`.
    // Returns where it stopped, or `to` if it found one.
    std::size_t claim(unsigned thread, const std::vector<Node>& set, const std::vector<std::uint64_t>& pairs,
                      std::size_t from, std::size_t to, std::uint64_t limit) {
        for (; from < to && (pairs[from] & 0xFFFFFFFFu) < limit; ++from) {
            const Node later = set[pairs[from] >> 32];
            const Node earlier = set[pairs[from] & 0xFFFFFFFFu];
            if (stand_in_[earlier] != earlier || !verify_(thread, later, earlier)) continue;
            stand_in_[later] = earlier;
            return to;
        }
        return from;
    }

    // Gives each later node the earliest kept node that claims it; returns the nodes left over.
    std::vector<Node> clear(const std::vector<Node>& kept, const std::vector<Node>& later) {
        struct Claim : PairSink {
            Representatives& self;
            const std::vector<Node>& kept;
            const std::vector<Node>& later;
            std::vector<std::atomic<Node>> best;
            Claim(Representatives& s, const std::vector<Node>& k, const std::vector<Node>& l)
                : self(s), kept(k), later(l), best(l.size()) {
                for (std::size_t i = 0; i < l.size(); ++i) best[i].store(l[i], std::memory_order_relaxed);
            }
            bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
                const Node candidate = kept[a];
                Node known = best[b].load(std::memory_order_relaxed);
                if (candidate >= known || !self.verify_(thread, candidate, later[b])) return true;
                while (candidate < known && !best[b].compare_exchange_weak(known, candidate)) {}
                return true;
            }
        } claim(*this, kept, later);
        const std::vector<std::uint64_t> a = gather(nodes_, kept);
        const std::vector<std::uint64_t> b = gather(nodes_, later);
        cross_join(a.data(), a.size(), b.data(), b.size(), in_.options.k, in_.options.threads, in_.options.isa, claim);
        std::vector<Node> left;
        for (std::size_t i = 0; i < later.size(); ++i) {
            stand_in_[later[i]] = claim.best[i].load(std::memory_order_relaxed);
            if (stand_in_[later[i]] == later[i]) left.push_back(later[i]);
        }
        return left;
    }

    const Input& in_;
    const Nodes& nodes_;
    Verifier verify_;
    std::vector<Node> stand_in_;
    const std::size_t budget_;
};

// --- Components -------------------------------------------------------------------------------------------------

// Union-find in which the earliest node of a set is its root. Pairs stream in; none is held.
class Components : public PairSink {
public:
    Components(const Input& in, const Nodes& nodes)
        : in_(in), nodes_(nodes), verify_(in, nodes), root_(nodes.rows.size()) {
        for (Node node = 0; node < root_.size(); ++node) root_[node].store(node, std::memory_order_relaxed);
    }

    std::vector<Node> run() {
        self_join(nodes_.fingerprints.data(), nodes_.rows.size(), in_.options.k, in_.options.threads, in_.options.isa,
                  *this);
        std::vector<Node> roots(root_.size());
        for (Node node = 0; node < root_.size(); ++node) roots[node] = find(node);
        return roots;
    }

    // Nearly all pairs of a dense set are connected already: that is seen without the lock, because what is connected
    // stays so. If another thread has not finished connecting them, the pair is verified in vain.
    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        if (find(a) == find(b) || !verify_(thread, a, b)) return true;
        const std::lock_guard<std::mutex> lock(guard_);
        const Node x = find(a);
        const Node y = find(b);
        root_[std::max(x, y)].store(std::min(x, y), std::memory_order_relaxed);
        return true;
    }

private:
    // Halves the path as it goes. Only roots are ever connected, and a node that is none never becomes one again, so
    // any ancestor may be written there at any time.
    Node find(Node node) {
        for (;;) {
            const Node parent = root_[node].load(std::memory_order_relaxed);
            if (parent == node) return node;
            const Node above = root_[parent].load(std::memory_order_relaxed);
            if (above == parent) return parent;
            root_[node].store(above, std::memory_order_relaxed);
            node = above;
        }
    }

    const Input& in_;
    const Nodes& nodes_;
    Verifier verify_;
    std::vector<std::atomic<Node>> root_;
    std::mutex guard_;  // of the roots
};

}  // namespace

bool NormalisedTexts::is_replaced(std::int64_t row) const {
    return rows != nullptr && std::binary_search(rows->begin(), rows->end(), row);
}

void NormalisedTexts::read(std::int64_t row, CodePoints& out) const {
    if (rows == nullptr) {
        decode((*raw)[row], out);
        return;
    }
    const auto place = std::lower_bound(rows->begin(), rows->end(), row);
    if (place != rows->end() && *place == row) {
        decode((*replaced)[place - rows->begin()], out);
    } else {
        normalise((*raw)[row], out);
    }
}

void cluster(const NormalisedTexts& texts, const std::uint64_t* fingerprints, const RowState* states, std::int64_t n,
             const std::vector<StoredSpan>& spans, const ClusterOptions& options, std::int64_t* duplicate_of,
             std::uint8_t* distance) {
    const Input in{texts, fingerprints, states, options};
    const Stored stored(spans);
    std::iota(duplicate_of, duplicate_of + n, std::int64_t{0});
    find_equal_texts(in, n, duplicate_of);
    if (!spans.empty()) {
        const Nodes asking(in, n, [&](std::int64_t row) {
            return has_fingerprint(states[row]) && duplicate_of[row] == row;
        });
        StoredClaims(in, stored, asking).run(duplicate_of);
    }
    const Nodes nodes(in, n, [&](std::int64_t row) {
        return states[row] == RowState::full && duplicate_of[row] == row;
    });
    const std::vector<Node> stand_in =
        options.components ? Components(in, nodes).run() : Representatives(in, nodes).run();
    for (std::size_t node = 0; node < nodes.rows.size(); ++node)
        duplicate_of[nodes.rows[node]] = nodes.rows[stand_in[node]];

    // A text's first row comes before its other rows, so its own stand-in is already known.
    for (std::int64_t row = 0; row < n; ++row) {
        if (duplicate_of[row] >= 0) duplicate_of[row] = duplicate_of[duplicate_of[row]];
        const std::int64_t other = duplicate_of[row];
        const std::uint64_t theirs = other >= 0 ? fingerprints[other] : stored.fingerprint(-1 - other);
        distance[row] = static_cast<std::uint8_t>(__builtin_popcountll(fingerprints[row] ^ theirs));
    }
}

}  // namespace slmfast
