// What no call from Python reaches: pairs of rows past 2^31, threads that leave by an exception, sinks that throw or stop.
// tests/test_native_join.py builds it with csrc's sources and runs it; it ends with 1 at the first thing that is wrong.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "near_pairs.cpp"
#include "shared_work.hpp"

namespace slmfast {
namespace {

void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

std::uint64_t draw(std::uint64_t& state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 32 | state << 32;
}

// `total` pairs of n rows, whose first rows are drawn from the last `firsts` rows, on three threads.
void sort_pairs(std::uint64_t n, std::size_t total, std::uint64_t firsts) {
    std::uint64_t state = n + total;
    AllPairs pairs(3);
    std::vector<std::uint64_t> expected;
    for (std::size_t i = 0; i < total; ++i) {
        const auto a = static_cast<std::uint32_t>(n - 1 - draw(state) % firsts);
        const auto b = static_cast<std::uint32_t>(draw(state) % n);
        pairs.take(draw(state) % 8 == 0 ? 2 : 0, a, b);
        expected.push_back(std::uint64_t{a} << 32 | b);
    }
    std::sort(expected.begin(), expected.end());
    const Pairs found = sorted(pairs.parts, n, 3);
    expect(found.size == total && std::equal(expected.begin(), expected.end(), found.data.get()), "sorted pairs");
}

struct Counter {
    std::atomic<int>& done;
    SharedWork<Counter>& shared;

    // A task that gives two smaller ones, and throws where it is told to.
    void work(int depth, int bad) {
        if (done++ == bad) throw std::runtime_error("a task");
        for (int child = 0; depth > 0 && child < 2; ++child)
            shared.give([depth, bad](Counter& counter) { counter.work(depth - 1, bad); });
    }
};

// Whether an exception came. `bad`: at which task a thread throws; -1: none.
bool give_tasks(unsigned threads, int bad) {
    SharedWork<Counter> shared;
    std::atomic<int> done{0};
    for (int round = 1; round <= 3; ++round) {
        std::atomic<bool> first{true};
        try {
            parallel_for(threads, threads, 1, [&](std::size_t, std::size_t, unsigned) {
                Counter counter{done, shared};
                shared.run(counter, [&] {
                    if (first.exchange(false)) counter.work(7, bad);
                });
            });
        } catch (const std::runtime_error&) {
            return true;
        }
        expect(done == 255 * round, "every task is done, and once");
        expect(!shared.wanted(), "no thread waits when all are done");
    }
    return false;
}

// Throws or stops at one pair. Pairs cost time, so that every thread has begun by then, and going on is seen in their number.
struct Ending : PairSink {
    explicit Ending(bool t) : throws(t) {}

    bool take(unsigned, std::uint32_t, std::uint32_t) override {
        const int now = taken++;
        if (now == kLast && throws) throw std::runtime_error("a sink");
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        return throws || now < kLast;
    }

    static constexpr int kLast = 1000;
    const bool throws;
    std::atomic<int> taken{0};
};

void end_early(unsigned threads) {
    std::vector<std::uint64_t> values;  // four families of 8 free bits, the last to be cut: more than 500,000 pairs in either join
    std::uint64_t state = threads;
    const std::uint64_t tops[] = {draw(state) >> 8, draw(state) >> 8, draw(state) >> 8, draw(state) >> 8};
    for (std::size_t i = 0; i < 6000; ++i) values.push_back(tops[draw(state) % 4] | draw(state) << 56);
    for (const bool throws : {false, true}) {
        for (const bool cross : {false, true}) {
            Ending sink(throws);
            bool thrown = false;
            bool whole = false;
            try {
                whole = cross ? cross_join(values.data(), 2500, values.data() + 2500, 3500, 3, threads, best_isa(), sink)
                              : self_join(values.data(), values.size(), 3, threads, best_isa(), sink);
            } catch (const std::runtime_error&) {
                thrown = true;
            }
            expect(thrown == throws && !whole, "how a join ends that its sink ends");
            expect(sink.taken < 200'000, "a join that its sink ends goes on no longer");
        }
    }
}

}  // namespace
}  // namespace slmfast

int main() {
    for (const std::uint64_t n : {2ull, 3ull, 1000ull, (1ull << 20) + 1, (1ull << 31) - 1, 1ull << 31, (1ull << 32) - 2})
        for (const std::size_t total : {0, 1, 511, 600, 9'000, 200'000})
            for (const std::uint64_t firsts : {std::uint64_t{1}, std::min<std::uint64_t>(n, 700), n})
                slmfast::sort_pairs(n, total, firsts);
    for (const unsigned threads : {1, 2, 7, 64}) {
        slmfast::expect(!slmfast::give_tasks(threads, -1), "no exception of its own");
        for (const int bad : {0, 1, 100, 254}) slmfast::expect(slmfast::give_tasks(threads, bad), "a task's exception");
        slmfast::end_early(threads);
    }
}
