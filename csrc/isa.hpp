// Which instruction set the hot loops run on. Every path gives the same bytes; only the speed differs.
#pragma once

#include <string>

namespace slmfast {

enum class Isa { scalar, avx2, avx512 };

inline const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "scalar";
    }
}

// Asks the running CPU, so a wheel built on a newer machine stays safe on an older one.
inline bool isa_available(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::avx512:  // Ice Lake, Zen 4 and later have all of these
            return isa_available(Isa::avx2) && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                   __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
                   __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("gfni");
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
        default: return true;
    }
#else
    return isa == Isa::scalar;
#endif
}

inline Isa best_isa() {
    if (isa_available(Isa::avx512)) return Isa::avx512;
    if (isa_available(Isa::avx2)) return Isa::avx2;
    return Isa::scalar;
}

}  // namespace slmfast
