// From UTF-8 to normalised code points: step 1 of the format in simhash.hpp, as far as it needs no tables.
#include <cstddef>

#include "normal_form.hpp"
#include "read_avx512.hpp"
#include "simhash.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace slmfast {
namespace {

bool continues(unsigned char byte) { return (byte & 0xC0) == 0x80; }

// Reads one code point that is not ASCII and moves past it; kForeign where the bytes are not UTF-8.
char32_t next_code_point(const unsigned char*& at, const unsigned char* end) {
    const std::ptrdiff_t left = end - at;
    const char32_t first = *at;
    if (between(first, 0xE0, 0xEF) && left > 2 && continues(at[1]) && continues(at[2])) {
        const char32_t c = (first & 0x0F) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu);
        at += 3;
        return c < 0x800 || between(c, 0xD800, 0xDFFF) ? kForeign : c;
    }
    if (between(first, 0xC2, 0xDF) && left > 1 && continues(at[1])) {
        const char32_t c = (first & 0x1F) << 6 | (at[1] & 0x3Fu);
        at += 2;
        return c;
    }
    if (between(first, 0xF0, 0xF4) && left > 3 && continues(at[1]) && continues(at[2]) && continues(at[3])) {
        const char32_t c = (first & 0x07) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu);
        at += 4;
        return c < 0x10000 || c > 0x10FFFF ? kForeign : c;
    }
    return kForeign;
}

constexpr std::ptrdiff_t kRun = 16;  // bytes that ascii_run takes at once

// Reads the ASCII at the head of kRun bytes and says how many there are; writes kRun code points, the rest of no meaning.
template <bool Normalise>
std::ptrdiff_t ascii_run(const unsigned char* at, char32_t* to) {
#if defined(__SSE2__)
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const unsigned beyond = static_cast<unsigned>(_mm_movemask_epi8(bytes)) | 1u << kRun;
    if (Normalise) {
        const __m128i capital = _mm_and_si128(_mm_cmpgt_epi8(bytes, _mm_set1_epi8('A' - 1)),
                                              _mm_cmpgt_epi8(_mm_set1_epi8('Z' + 1), bytes));
        bytes = _mm_or_si128(bytes, _mm_and_si128(capital, _mm_set1_epi8(0x20)));
    }
    const __m128i zero = _mm_setzero_si128();
    const __m128i low = _mm_unpacklo_epi8(bytes, zero);
    const __m128i high = _mm_unpackhi_epi8(bytes, zero);
    auto* out = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(out, _mm_unpacklo_epi16(low, zero));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low, zero));
    _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high, zero));
    _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high, zero));
    return __builtin_ctz(beyond);
#else
    std::ptrdiff_t i = 0;
    for (; i < kRun && at[i] < 0x80; ++i) to[i] = Normalise ? lower_ascii(at[i]) : at[i];
    return i;
#endif
}

template <bool Normalise>
Decoded read(std::string_view text, CodePoints& out) {
    // No character has a longer normal form here than it has bytes.
    char32_t* to = out.room(text.size() + static_cast<std::size_t>(kRun));
    bool foreign = false;
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const unsigned char* const end = at + text.size();
    while (at < end) {
        if (*at < 0x80) {
            if (end - at >= kRun) {
                const std::ptrdiff_t run = ascii_run<Normalise>(at, to);
                at += run;
                to += run;
            } else {
                *to++ = Normalise ? lower_ascii(*at) : *at;
                ++at;
            }
            continue;
        }
        const char32_t c = next_code_point(at, end);
        if (c == kForeign) return Decoded::invalid;
        foreign |= write_normal_form(c, !Normalise || between(c, 0x4E00, 0x9FFF), to);
    }
    out.set_size(static_cast<std::size_t>(to - out.data()));
    return foreign ? Decoded::foreign : Decoded::ok;
}

}  // namespace

Decoded normalise(std::string_view text, CodePoints& out, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return read_avx512<true>(text, out);
#endif
    (void)isa;
    return read<true>(text, out);
}

Decoded decode(std::string_view text, CodePoints& out, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return read_avx512<false>(text, out);
#endif
    (void)isa;
    return read<false>(text, out);
}

}  // namespace slmfast
