// A column of texts read in place from Arrow buffers: string, large_string and string_view, in any number of chunks.
// Layouts: https://arrow.apache.org/docs/format/Columnar.html
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace slmfast {

struct Bytes {
    const char* data = nullptr;
    std::int64_t size = 0;
};

enum class Layout { offsets32, offsets64, views };

// One Arrow array. `index` is the offsets buffer, or the views buffer of a string_view.
struct TextChunk {
    Layout layout = Layout::offsets32;
    std::int64_t length = 0;
    std::int64_t offset = 0;
    Bytes validity;  // absent: no nulls
    Bytes index;
    std::vector<Bytes> data;
};

class TextColumn {
public:
    // Checks every offset against its buffer, so that reading a row later cannot leave the buffers.
    // Throws std::invalid_argument naming the row.
    void append(TextChunk chunk) {
        check_shape(chunk);
        starts_.push_back(size_);
        chunks_.push_back(std::move(chunk));
        const TextChunk& added = chunks_.back();
        for (std::int64_t row = 0; row < added.length; ++row) check_row(added, row, size_ + row);
        size_ += added.length;
    }

    std::int64_t size() const { return size_; }

    bool is_null(std::int64_t row) const {
        const auto [chunk, place] = locate(row);
        return null_at(*chunk, place);
    }

    // The bytes of a row; of a null, none.
    std::string_view operator[](std::int64_t row) const {
        const auto [chunk, place] = locate(row);
        return null_at(*chunk, place) ? std::string_view{} : read(*chunk, place);
    }

    // Calls visit(row, whether it is null, its bytes) for the rows [begin, end) in order.
    template <class Visit>
    void for_each(std::int64_t begin, std::int64_t end, Visit&& visit) const {
        while (begin < end) {
            auto [chunk, place] = locate(begin);
            const std::int64_t stop = std::min(end, begin + chunk->length - place);
            for (; begin < stop; ++begin, ++place) {
                const bool null = null_at(*chunk, place);
                visit(begin, null, null ? std::string_view{} : read(*chunk, place));
            }
        }
    }

private:
    template <class T>
    static T load(const char* from, std::int64_t index) {
        T value;
        std::memcpy(&value, from + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
        return value;
    }

    static bool null_at(const TextChunk& chunk, std::int64_t row) {
        if (chunk.validity.data == nullptr) return false;
        const std::int64_t bit = chunk.offset + row;
        return ((static_cast<unsigned char>(chunk.validity.data[bit >> 3]) >> (bit & 7)) & 1) == 0;
    }

    static std::string_view read(const TextChunk& chunk, std::int64_t row) {
        const std::int64_t place = chunk.offset + row;
        if (chunk.layout == Layout::views) {
            const char* view = chunk.index.data + place * 16;
            const auto size = load<std::int32_t>(view, 0);
            if (size <= 12) return {view + 4, static_cast<std::size_t>(size)};
            const Bytes& buffer = chunk.data[static_cast<std::size_t>(load<std::int32_t>(view, 2))];
            return {buffer.data + load<std::int32_t>(view, 3), static_cast<std::size_t>(size)};
        }
        const auto [begin, end] = bounds(chunk, place);
        if (begin == end) return {};
        return {chunk.data[0].data + begin, static_cast<std::size_t>(end - begin)};
    }

    static std::pair<std::int64_t, std::int64_t> bounds(const TextChunk& chunk, std::int64_t place) {
        if (chunk.layout == Layout::offsets32)
            return {load<std::int32_t>(chunk.index.data, place), load<std::int32_t>(chunk.index.data, place + 1)};
        return {load<std::int64_t>(chunk.index.data, place), load<std::int64_t>(chunk.index.data, place + 1)};
    }

    static void check_shape(const TextChunk& chunk) {
        constexpr std::int64_t kMost = std::int64_t{1} << 40;  // keeps the products below far from overflow
        if (chunk.length < 0 || chunk.offset < 0 || chunk.length > kMost || chunk.offset > kMost)
            throw std::invalid_argument("an Arrow chunk has an impossible length or offset");
        const std::int64_t end = chunk.offset + chunk.length;
        if (chunk.validity.data != nullptr && chunk.validity.size < (end + 7) / 8)
            throw std::invalid_argument("an Arrow chunk's validity buffer is too short for its length");
        if (chunk.length == 0) return;
        const std::int64_t need = chunk.layout == Layout::views       ? end * 16
                                  : chunk.layout == Layout::offsets32 ? (end + 1) * 4
                                                                      : (end + 1) * 8;
        if (chunk.index.data == nullptr || chunk.index.size < need)
            throw std::invalid_argument("an Arrow chunk's offsets or views buffer is too short for its length");
        if (chunk.layout != Layout::views && chunk.data.size() != 1)
            throw std::invalid_argument("an Arrow string chunk needs exactly one data buffer");
    }

    static void check_row(const TextChunk& chunk, std::int64_t row, std::int64_t number) {
        const std::int64_t place = chunk.offset + row;
        bool good = true;
        if (chunk.layout != Layout::views) {
            const auto [begin, end] = bounds(chunk, place);
            good = 0 <= begin && begin <= end && end <= chunk.data[0].size;
        } else if (!null_at(chunk, row)) {
            const char* view = chunk.index.data + place * 16;
            const auto size = load<std::int32_t>(view, 0);
            good = size >= 0;
            if (size > 12) {
                const auto buffer = load<std::int32_t>(view, 2);
                const auto begin = load<std::int32_t>(view, 3);
                good = buffer >= 0 && static_cast<std::size_t>(buffer) < chunk.data.size() && begin >= 0 &&
                       std::int64_t{begin} + size <= chunk.data[static_cast<std::size_t>(buffer)].size;
            }
        }
        if (!good) throw std::invalid_argument("row " + std::to_string(number) + " points outside its Arrow buffers");
    }

    std::pair<const TextChunk*, std::int64_t> locate(std::int64_t row) const {
        if (chunks_.size() == 1) return {&chunks_[0], row};
        const auto after = std::upper_bound(starts_.begin(), starts_.end(), row);
        const auto chunk = static_cast<std::size_t>(after - starts_.begin()) - 1;
        return {&chunks_[chunk], row - starts_[chunk]};
    }

    std::vector<TextChunk> chunks_;
    std::vector<std::int64_t> starts_;  // the first row of each chunk
    std::int64_t size_ = 0;
};

}  // namespace slmfast
