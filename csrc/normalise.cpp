// From UTF-8 to normalised code points: step 1 of the format in simhash.hpp, as far as it needs no tables.
#include <cstddef>

#include "simhash.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace slmfast {
namespace {

constexpr char32_t kForeign = 0xFFFFFFFF;

bool between(char32_t c, char32_t first, char32_t last) { return c - first <= last - first; }

// The Latin-1 signs from U+00A0 to U+00BF: themselves, a compatibility character, or 0 for those left to Python.
constexpr char32_t kLatinSigns[32] = {
    0x20, 0xA1, 0xA2, 0xA3, 0xA4, 0xA5,  0xA6, 0xA7, 0,    0xA9, 'a', 0xAB, 0xAC, 0xAD, 0xAE, 0,
    0xB0, 0xB1, '2',  '3',  0,    0x3BC, 0xB6, 0xB7, 0,    '1',  'o', 0xBB, 0,    0,    0,    0xBF,
};

char32_t normal_latin(char32_t c) {  // U+0080 to U+00FF
    if (c < 0xA0) return c;
    if (c < 0xC0) return kLatinSigns[c - 0xA0] != 0 ? kLatinSigns[c - 0xA0] : kForeign;
    return c < 0xDF && c != 0xD7 ? c + 0x20 : c;
}

// Ranges in which every code point is its own normal form and never composes with a neighbour from any range here.
bool stable_symbol(char32_t c) {
    if (between(c, 0x2000, 0x20FF))
        return between(c, 0x200B, 0x2010) || between(c, 0x2012, 0x2016) || between(c, 0x2018, 0x2023) ||
               between(c, 0x2030, 0x2032) || c == 0x20AC || c == 0x203B;
    if (between(c, 0x2190, 0x222B) || between(c, 0x2231, 0x2328) || between(c, 0x2500, 0x2767)) return true;
    return c == 0xFE0F || between(c, 0x1F300, 0x1F64F) || between(c, 0x1F680, 0x1F6FF) || between(c, 0x1F900, 0x1F9FF);
}

bool stable_cjk(char32_t c) {
    return between(c, 0x4E00, 0x9FFF) || between(c, 0x3400, 0x4DBF) || between(c, 0x3001, 0x3029) ||
           between(c, 0x3041, 0x3096) || between(c, 0x30A1, 0x30FE) || between(c, 0xAC00, 0xD7A3) ||
           between(c, 0x20000, 0x2A6DF);
}

char32_t normal_letter(char32_t c) {  // Greek without the context-dependent capital sigma, and Cyrillic
    if (between(c, 0x391, 0x3A1) || between(c, 0x3A4, 0x3A9)) return c + 0x20;
    if (between(c, 0x3B1, 0x3C9)) return c;
    if (between(c, 0x410, 0x42F)) return c + 0x20;
    return between(c, 0x430, 0x44F) ? c : kForeign;
}

char32_t lower_ascii(char32_t c) { return between(c, 'A', 'Z') ? c + 0x20 : c; }

char32_t normal_form(char32_t c) {
    if (c < 0x80) return lower_ascii(c);
    if (stable_cjk(c)) return c;
    if (between(c, 0xFF01, 0xFF5E)) return lower_ascii(c - 0xFEE0);
    if (c < 0x100) return normal_latin(c);
    if (c == 0x3000 || between(c, 0x2000, 0x200A)) return 0x20;
    if (c == 0x2011) return 0x2010;
    if (c == 0xFFE5) return 0xA5;
    if (between(c, 0x2460, 0x2468)) return c - 0x2460 + '1';
    if (stable_symbol(c)) return c;
    return normal_letter(c);
}

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
    out.resize(text.size() + static_cast<std::size_t>(kRun));
    char32_t* to = out.data();
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
        if (!Normalise || between(c, 0x4E00, 0x9FFF)) {
            *to++ = c;
        } else if (between(c, 0x2024, 0x2026)) {  // one, two or three dots
            for (char32_t dots = 0x2024; dots <= c; ++dots) *to++ = '.';
        } else {
            *to = normal_form(c);
            foreign |= *to++ == kForeign;
        }
    }
    out.resize(static_cast<std::size_t>(to - out.data()));
    return foreign ? Decoded::foreign : Decoded::ok;
}

}  // namespace

Decoded normalise(std::string_view text, CodePoints& out) { return read<true>(text, out); }

Decoded decode(std::string_view text, CodePoints& out) { return read<false>(text, out); }

}  // namespace slmfast
