// The checksum of stored bytes: 64 bits, frozen in the version of the files that hold it (slmfast/index_format.py).
//
// The bytes are cut into blocks of 1 MiB. Within a block, little-endian 64-bit words go to eight lanes in turn; a lane
// takes a word by x = (lane ^ word) * odd constant, x ^= x >> 32, lane = x * odd constant, and the lanes are folded by
// h = mix(h ^ lane). Blocks are folded the same way, in order, and the length of all comes last.
//
// Each step is a bijection of what it takes in, so a change within one word always changes the checksum. A change of
// more words is missed with a chance of about 2^-64 unless it is made to fit the constants: a product passes on its
// highest bit alone, hence two of them with a shift between, lest two or three flipped bits cancel out whatever the
// rest. It tells damage, not forgery. Blocks are independent, so threads share them, and memory limits the speed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.hpp"
#include "simhash.hpp"

namespace slmfast {

// Of at most 1 MiB; the last word is filled up with zeros.
inline std::uint64_t checksum_block(const unsigned char* bytes, std::size_t size) {
    constexpr std::size_t kLanes = 8;
    std::uint64_t lanes[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lane);
    const auto take = [&](std::size_t lane, std::uint64_t word) {
        const std::uint64_t x = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15u;
        lanes[lane] = (x ^ x >> 32) * 0xbf58476d1ce4e5b9u;
    };
    const auto load = [](const unsigned char* from, std::size_t length) {
        std::uint64_t word = 0;
        std::memcpy(&word, from, length);
        return word;
    };
    std::size_t at = 0;
    for (; at + 8 * kLanes <= size; at += 8 * kLanes)
        for (std::size_t lane = 0; lane < kLanes; ++lane) take(lane, load(bytes + at + 8 * lane, 8));
    for (std::size_t lane = 0; at < size; ++lane, at += 8)
        take(lane, load(bytes + at, std::min<std::size_t>(8, size - at)));
    std::uint64_t folded = 0;
    for (const std::uint64_t lane : lanes) folded = mix(folded ^ lane);
    return folded;
}

inline std::uint64_t checksum(const unsigned char* bytes, std::size_t size, unsigned threads) {
    constexpr std::size_t kBlock = std::size_t{1} << 20;
    std::vector<std::uint64_t> blocks((size + kBlock - 1) / kBlock);
    parallel_for(blocks.size(), threads, 1, [&](std::size_t block, std::size_t, unsigned) {
        blocks[block] = checksum_block(bytes + block * kBlock, std::min(kBlock, size - block * kBlock));
    });
    std::uint64_t folded = 0;
    for (const std::uint64_t block : blocks) folded = mix(folded ^ block);
    return mix(folded ^ size);
}

}  // namespace slmfast
