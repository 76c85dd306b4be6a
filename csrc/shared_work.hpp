// Work that a busy thread gives to those that have run out of their own: where most rows fall into one group, the thread
// that has it would else work alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

namespace slmfast {

template <class Worker>
class SharedWork {
public:
    using Task = std::function<void(Worker&)>;

    // Whether a thread waits for work that is not there yet. A hint: it may be untrue by the time that it is read.
    bool wanted() const { return waiting_.load(std::memory_order_relaxed) > tasks_left_.load(std::memory_order_relaxed); }

    void give(Task task) {
        const std::lock_guard<std::mutex> lock(guard_);
        tasks_.push_back(std::move(task));
        tasks_left_.store(tasks_.size(), std::memory_order_relaxed);
        changed_.notify_one();
    }

    // Runs `own`, and then what others give, until no thread has any work left.
    template <class Own>
    void run(Worker& worker, Own&& own) {
        enter();
        try {
            own();
            for (Task task; take(task); task = nullptr) task(worker);  // its rows need not wait for the next one
        } catch (...) {
            leave();  // no other waits for what this thread will not give
            throw;
        }
    }

private:
    void enter() {
        const std::lock_guard<std::mutex> lock(guard_);
        ++busy_;
    }

    void leave() {
        const std::lock_guard<std::mutex> lock(guard_);
        if (--busy_ == 0) changed_.notify_all();
    }

    // A busy thread's next task; false, and the thread is busy no more, where none is left.
    bool take(Task& task) {
        std::unique_lock<std::mutex> lock(guard_);
        if (--busy_ == 0) changed_.notify_all();
        waiting_.fetch_add(1, std::memory_order_relaxed);
        changed_.wait(lock, [&] { return !tasks_.empty() || busy_ == 0; });
        waiting_.fetch_sub(1, std::memory_order_relaxed);
        if (tasks_.empty()) return false;
        ++busy_;
        task = std::move(tasks_.front());
        tasks_.pop_front();
        tasks_left_.store(tasks_.size(), std::memory_order_relaxed);
        return true;
    }

    std::mutex guard_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    std::size_t busy_ = 0;
    std::atomic<std::size_t> waiting_{0};
    std::atomic<std::size_t> tasks_left_{0};
};

}  // namespace slmfast
