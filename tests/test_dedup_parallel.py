"""The shared loop of csrc/parallel.hpp when memory runs out at any of its allocations."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <new>

#include "parallel.hpp"

std::atomic<int> left{-1};  // how many allocations succeed before one fails; negative: all

void* operator new(std::size_t size) {
    if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
    int failed = 0;
    for (int allowed = 0; allowed < 40; ++allowed) {
        std::atomic<std::size_t> sum{0};
        left.store(allowed);
        slmfast::parallel_for(1000, 8, 10, [&](std::size_t begin, std::size_t end, unsigned) {
            for (std::size_t i = begin; i < end; ++i) sum += i;
        });
        failed += left.exchange(-1) < 0;
        if (sum != 499500) return 1;
    }
    std::printf("%d", failed);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_failed_allocation_costs_helpers_and_no_work(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{CSRC}", "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5, "memory did run out, at the pool and at every helper"
