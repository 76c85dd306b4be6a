// A loop shared among threads. Which thread takes which piece is left to chance, so callers must not let it matter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace slmfast {

// Calls body(begin, end, thread) for pieces of at most `grain` of [0, n); thread < threads.
// The first exception stops the handing out of pieces and is thrown again here.
template <class Body>
void parallel_for(std::size_t n, unsigned threads, std::size_t grain, Body&& body) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_guard;
    auto work = [&](unsigned thread) {
        try {
            for (;;) {
                const std::size_t begin = next.fetch_add(grain);
                if (begin >= n) return;
                body(begin, std::min(n, begin + grain), thread);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_guard);
            if (!failure) failure = std::current_exception();
            next.store(n);
        }
    };
    const std::size_t pieces = (n + grain - 1) / grain;
    const unsigned helpers = static_cast<unsigned>(std::min<std::size_t>(threads, pieces));
    std::vector<std::thread> pool;
    try {
        pool.reserve(helpers);
        for (unsigned thread = 1; thread < helpers; ++thread) pool.emplace_back(work, thread);
    } catch (...) {
        // The system has no more threads or memory to give: the helpers there are, and this thread, do all the work.
    }
    work(0);
    for (std::thread& helper : pool) helper.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace slmfast
