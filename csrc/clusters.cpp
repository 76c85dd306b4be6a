#include "clusters.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>

#include "equal_texts.hpp"
#include "hamming_join.hpp"
#include "jaccard.hpp"
#include "nodes.hpp"
#include "parallel.hpp"
#include "stored_rows.hpp"

namespace slmfast {
namespace {

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

void NormalisedTexts::read(std::int64_t row, CodePoints& out, Isa isa) const {
    if (rows == nullptr) {
        decode((*raw)[row], out, isa);
        return;
    }
    const auto place = std::lower_bound(rows->begin(), rows->end(), row);
    if (place != rows->end() && *place == row) {
        decode((*replaced)[place - rows->begin()], out, isa);
    } else {
        normalise((*raw)[row], out, isa);
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
        claim_by_stored(in, stored, asking, duplicate_of);
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
