// The loops of the kernels, for one instruction set. native.cpp includes this file once for each and says with LEVEL in
// which namespace, and with LANES how many float32 a register of it holds: 4 (any processor), 8 (AVX2 with FMA), or 16
// (AVX-512 with VBMI). No include guard, for that reason. Nothing in here may call a function template of the standard
// library: the linker would keep one copy of it, perhaps one that only some processors can run.

namespace LEVEL {

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

using EveryLane = std::make_integer_sequence<int, LANES>;

INLINE Floats load(const float* from) {
    Floats values;
    __builtin_memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store(float* to, Floats values) { __builtin_memcpy(to, &values, sizeof values); }

INLINE Floats repeated(float value) { return value - Floats{}; }

// Lane i of the result is lane i ^ distance.
template <int distance, int... lane>
INLINE Floats swapped(Floats values, std::integer_sequence<int, lane...>) {
#ifdef __clang__
    return __builtin_shufflevector(values, values, (lane ^ distance)...);
#else
    return __builtin_shuffle(values, Ints{(lane ^ distance)...});
#endif
}

// The sign bits of the lanes that a butterfly over this distance subtracts.
template <int distance, int... lane>
INLINE Ints second_of_pairs(std::integer_sequence<int, lane...>) {
    return Ints{(lane & distance ? INT32_MIN : 0)...};
}

// left · right + summand, in one rounding where the processor has an instruction for it, else in two.
INLINE Floats multiply_add(Floats left, Floats right, Floats summand) {
#if LANES == 16
    return _mm512_fmadd_ps(left, right, summand);
#elif LANES == 8
    return _mm256_fmadd_ps(left, right, summand);
#elif defined(__aarch64__)
    return vfmaq_f32(summand, left, right);
#else
    return left * right + summand;
#endif
}

// norm/√size of float16 norms; up to LANES − 1 more are written. Without the processor's own conversion, which not all
// have, and through no float32 that is subnormal, so that a mode in which these count as 0 does no harm.
INLINE void scale_some_norms(const uint16_t* norms, float* scales, ptrdiff_t count, ptrdiff_t group_size) {
    using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
    for (ptrdiff_t first = 0; first < count; first += LANES) {
        Halves halves = {};
        if (count - first >= LANES) {
            __builtin_memcpy(&halves, norms + first, sizeof halves);
        } else {
            for (ptrdiff_t lane = 0; lane < count - first; ++lane) {
                halves[lane] = norms[first + lane];
            }
        }
        const Ints words = __builtin_convertvector(halves, Ints), magnitude = words & 0x7FFF;
        const Ints normal = (magnitude << 13) + (112 << 23), special = normal | 0x7F800000;
        const Ints subnormal = Ints(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
        const Ints value = magnitude < 0x400 ? subnormal : magnitude < 0x7C00 ? normal : special;
        store(scales + first, Floats(value | (words & 0x8000) << 16) / root(group_size));
    }
}

void scale_norms(const uint16_t* norms, float* scales, ptrdiff_t count, ptrdiff_t group_size) {
    scale_some_norms(norms, scales, count, group_size);
}

// ---------------------------------------------------------------------------------------------------------------------
// Levels: codes of `bits` bits, `width` bits apart, to float32. An object holds what is the same for all codes; called
// with the addresses of codes in several rows, it looks up `step` of each.

#if LANES == 4

// One by one.
template <int width, int bits>
struct Levels {
    static constexpr int step = 16;
    const float* centroids;

    explicit INLINE Levels(const Codebook& book) : centroids(book.centroids) {}

    INLINE Floats four(uint64_t word) const {
        constexpr uint64_t mask = (1 << bits) - 1;
        return Floats{centroids[word & mask], centroids[word >> width & mask], centroids[word >> 2 * width & mask],
                      centroids[word >> 3 * width & mask]};
    }

    template <int rows>
    INLINE void operator()(const uint8_t* const (&codes)[rows], Floats (&levels)[rows][step / LANES]) const {
        for (int row = 0; row < rows; ++row) {
            for (int octet = 0; octet < step / 8; ++octet) {
                const uint64_t word = load_word<width>(codes[row] + octet * width);
                levels[row][2 * octet] = four(word);
                levels[row][2 * octet + 1] = four(word >> 4 * width);
            }
        }
    }
};

#elif LANES == 8

// The 32 codes of a block, in the bytes of a register, are in the order in which `unpack`, which works within each half
// of the register, ends with neighbours beside each other: byte 16·half + 4·d + e is code 8·d + 4·half + e.
constexpr int code_of_byte(int byte) { return 8 * (byte % 16 / 4) + 4 * (byte / 16) + byte % 4; }

// How 16 codes of `width` bits, half a block, are moved into 16-bit words, each with its highest bit in the second byte
// of a word. So none begins at the lowest bit of its word, and all shifts are one multiplication.
template <int width>
struct Cut {
    // Of the block's 4·width bytes, each half reads 16, none before or after them.
    static constexpr int start(int half) { return half * (4 * width - 16); }
    alignas(32) uint8_t bytes[2][32] = {};
    alignas(32) uint16_t factors[2][16] = {};

    constexpr Cut() {
        for (int half = 0; half < 2; ++half) {
            for (int word = 0; word < 16; ++word) {
                const int code = code_of_byte(16 * (word / 8) + 8 * half + word % 8);
                const int first_bit = code * width - 8 * start(half), last_byte = (first_bit + width - 1) / 8;
                bytes[half][2 * word] = last_byte > 0 ? last_byte - 1 : 0;
                bytes[half][2 * word + 1] = last_byte;
                factors[half][word] = 1 << (16 - (first_bit - 8 * (last_byte - 1)));
            }
        }
    }
};

template <int width>
constexpr Cut<width> cut{};

INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// 16 bytes, twice.
INLINE __m256i load_twice(const void* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// Does nothing to a value, but makes the compiler compute it here. Left alone, GCC puts off the sums of a long chain
// until their terms are more than there are registers.
INLINE void keep_order(__m256i& value) { __asm__("" : "+x"(value)); }

template <int width>
INLINE __m256i codes_in_bytes(const uint8_t* codes) {
    if constexpr (width == 8) {
        return _mm256_permutevar8x32_epi32(load_bytes(codes), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    } else if constexpr (width == 4) {
        const __m256i order = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1,  //
                                               2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
        const __m256i words = _mm256_shuffle_epi8(load_twice(codes), order);
        return _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
    } else {
        __m256i words[2];
        for (int half = 0; half < 2; ++half) {
            const __m256i raw = load_twice(codes + Cut<width>::start(half));
            words[half] = _mm256_shuffle_epi8(raw, load_bytes(cut<width>.bytes[half]));
            words[half] = _mm256_mulhi_epu16(words[half], load_bytes(cut<width>.factors[half]));
            words[half] = _mm256_and_si256(words[half], _mm256_set1_epi16((1 << width) - 1));
        }
        return _mm256_packus_epi16(words[0], words[1]);
    }
}

// Up to 3 bits, levels are found by `vpermps`, which looks only at the lowest three bits of an index, so that codes
// need not be cut out, only shifted. More bits are found byte by byte with `vpshufb`, in tables of 16: see
// `Codebook`. Rows are looked up together, since each table is then loaded once for all.
template <int width, int bits>
struct Levels {
    static constexpr int step = 32, tables = bits <= 4 ? 1 : 1 << (bits - 5);
    const Codebook& book;

    explicit INLINE Levels(const Codebook& book) : book(book) {}

    template <int rows>
    INLINE void operator()(const uint8_t* const (&codes)[rows], Floats (&levels)[rows][4]) const {
        if constexpr (bits <= 3) {
            for (int row = 0; row < rows; ++row) {
                for (int octet = 0; octet < 4; ++octet) {
                    levels[row][octet] = _mm256_permutevar8x32_ps(load(book.centroids), indices(codes[row], octet));
                }
            }
        } else {
            by_bytes<rows>(codes, levels);
        }
    }

    // The lowest bits of each 32-bit word are a code.
    static INLINE __m256i indices(const uint8_t* codes, int octet) {
        if constexpr (width == 8) {
            return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * octet)));
        } else {
            // Of the block's 4·width bytes, the four from here on, or the last four.
            const int first_byte = octet * width < 4 * width - 4 ? octet * width : 4 * width - 4;
            const __m256i word = _mm256_set1_epi32(load_word<4>(codes + first_byte));
            Ints first_bits{0, 1, 2, 3, 4, 5, 6, 7};
            first_bits = first_bits * width + 8 * (octet * width - first_byte);
            return _mm256_srlv_epi32(word, __m256i(first_bits));
        }
    }

    template <int rows>
    INLINE void by_bytes(const uint8_t* const (&codes)[rows], Floats (&levels)[rows][4]) const {
        // The upper half of the levels is the lower half backwards, with the other sign.
        constexpr bool folded = bits > 4;
        __m256i index[rows], planes[4][rows];
        for (int row = 0; row < rows; ++row) {
            index[row] = codes_in_bytes<width>(codes[row]);
            if constexpr (folded) {
                const __m256i last_lower = _mm256_set1_epi8(char((1 << (bits - 1)) - 1));
                const __m256i upper = bits == 8 ? _mm256_cmpgt_epi8(_mm256_setzero_si256(), index[row])  // signed
                                                : _mm256_cmpgt_epi8(index[row], last_lower);
                const __m256i all_bits = _mm256_and_si256(upper, _mm256_set1_epi8(char((1 << bits) - 1)));
                index[row] = _mm256_xor_si256(index[row], all_bits);
                planes[3][row] = _mm256_and_si256(upper, _mm256_set1_epi8(-128));
            }
        }
#pragma GCC unroll 8
        for (int table = 0; table < tables; ++table) {
#pragma GCC unroll 4
            for (int byte = 0; byte < 4; ++byte) {
                const __m256i entries = load_twice(book.differences[byte][table]);
                for (int row = 0; row < rows; ++row) {
                    const __m256i change = _mm256_shuffle_epi8(entries, index[row]);
                    const bool first = table == 0 && !(folded && byte == 3);
                    planes[byte][row] = first ? change : _mm256_xor_si256(planes[byte][row], change);
                    keep_order(planes[byte][row]);
                }
            }
            for (int row = 0; row < rows; ++row) {
                index[row] = _mm256_sub_epi8(index[row], _mm256_set1_epi8(16));
                keep_order(index[row]);
            }
        }
        for (int row = 0; row < rows; ++row) {
            const __m256i low01 = _mm256_unpacklo_epi8(planes[0][row], planes[1][row]);
            const __m256i high01 = _mm256_unpackhi_epi8(planes[0][row], planes[1][row]);
            const __m256i low23 = _mm256_unpacklo_epi8(planes[2][row], planes[3][row]);
            const __m256i high23 = _mm256_unpackhi_epi8(planes[2][row], planes[3][row]);
            levels[row][0] = Floats(_mm256_unpacklo_epi16(low01, low23));
            levels[row][1] = Floats(_mm256_unpackhi_epi16(low01, low23));
            levels[row][2] = Floats(_mm256_unpacklo_epi16(high01, high23));
            levels[row][3] = Floats(_mm256_unpackhi_epi16(high01, high23));
        }
    }
};

#else

// As for AVX2, byte 16·quarter + 4·d + e of a block of 64 is code 16·d + 4·quarter + e.
constexpr int code_of_byte(int byte) { return 16 * (byte % 16 / 4) + 4 * (byte / 16) + byte % 4; }

// How 64 codes of `width` bits are cut out of the first 32 of their bytes and the last 32, which overlap: `vpermb`
// moves the bytes with four codes into each 32 bits, and `vpmultishiftqb` any eight bits of 64 into each byte.
template <int width>
struct Cut {
    alignas(64) uint8_t bytes[64] = {};
    alignas(64) uint8_t shifts[64] = {};

    constexpr Cut() {
        for (int byte = 0; byte < 64; ++byte) {
            const int first_bit = code_of_byte(byte / 4 * 4) * width, from = first_bit / 8 + byte % 4;
            bytes[byte] = from < 32 ? from : from + 64 - 8 * width;
            shifts[byte] = 32 * (byte / 4 % 2) + first_bit % 8 + byte % 4 * width;
        }
    }
};

template <int width>
constexpr Cut<width> cut{};

// For 16 codes of up to 4 bits in the same 64: those that begin at a bit, one in the lowest bits of each 32.
template <int width, int first_bit>
struct Spread {
    alignas(64) uint8_t shifts[64] = {};

    constexpr Spread() {
        for (int code = 0; code < 16; ++code) {
            shifts[4 * code] = first_bit + code * width;
        }
    }
};

template <int width, int first_bit>
constexpr Spread<width, first_bit> spread{};

INLINE __m512i load_bytes(const void* from) { return _mm512_loadu_si512(from); }

// Up to 4 bits, levels are found as float32, else byte by byte; in either case in tables of a whole register or
// two, which look only at the lowest bits of an index, so that codes need not be masked.
template <int width, int bits>
struct Levels {
    static constexpr bool whole = bits <= 4;
    static constexpr int step = whole ? 32 : 64;
    const Codebook& book;

    explicit INLINE Levels(const Codebook& book) : book(book) {}

    template <int rows>
    INLINE void operator()(const uint8_t* const (&codes)[rows], Floats (&levels)[rows][step / LANES]) const {
        for (int row = 0; row < rows; ++row) {
            if constexpr (whole) {
                const Floats entries = load(book.centroids);
                levels[row][0] = _mm512_permutexvar_ps(indices<0>(codes[row]), entries);
                levels[row][1] = _mm512_permutexvar_ps(indices<1>(codes[row]), entries);
            } else {
                by_bytes(codes[row], levels[row]);
            }
        }
    }

    // Of the first or the second 16 of 32 codes.
    template <int half>
    static INLINE __m512i indices(const uint8_t* codes) {
        if constexpr (width == 8) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half)));
        } else {
            constexpr int start = half * (4 * width - 8);  // of the block's 4·width bytes, the first or the last eight
            const __m512i word = _mm512_set1_epi64(load_word<8>(codes + start));
            return _mm512_multishift_epi64_epi8(load_bytes(spread<width, 16 * half * width - 8 * start>.shifts), word);
        }
    }

    INLINE void by_bytes(const uint8_t* codes, Floats (&levels)[4]) const {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i last = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 8 * width - 32));
        __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(first), last, 1);
        index = _mm512_permutexvar_epi8(load_bytes(cut<width>.bytes), index);
        if constexpr (width < 8) {
            index = _mm512_multishift_epi64_epi8(load_bytes(cut<width>.shifts), index);
        }
        __m512i planes[4];
        if constexpr (bits <= 6) {
            for (int byte = 0; byte < 4; ++byte) {
                planes[byte] = _mm512_permutexvar_epi8(index, load_bytes(book.planes[byte]));
            }
        } else {  // the upper half of the levels is the lower half backwards, with the other sign
            const __mmask64 upper = _mm512_test_epi8_mask(index, _mm512_set1_epi8(char(1 << (bits - 1))));
            index = _mm512_mask_sub_epi8(index, upper, _mm512_set1_epi8(char((1 << bits) - 1)), index);
            for (int byte = 0; byte < 4; ++byte) {
                planes[byte] = bits == 7 ? _mm512_permutexvar_epi8(index, load_bytes(book.planes[byte]))
                                         : _mm512_permutex2var_epi8(load_bytes(book.planes[byte]), index,
                                                                    load_bytes(book.planes[byte] + 64));
            }
            planes[3] = _mm512_mask_add_epi8(planes[3], upper, planes[3], _mm512_set1_epi8(-128));
        }
        const __m512i low01 = _mm512_unpacklo_epi8(planes[0], planes[1]);
        const __m512i high01 = _mm512_unpackhi_epi8(planes[0], planes[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(planes[2], planes[3]);
        const __m512i high23 = _mm512_unpackhi_epi8(planes[2], planes[3]);
        levels[0] = Floats(_mm512_unpacklo_epi16(low01, low23));
        levels[1] = Floats(_mm512_unpackhi_epi16(low01, low23));
        levels[2] = Floats(_mm512_unpacklo_epi16(high01, high23));
        levels[3] = Floats(_mm512_unpackhi_epi16(high01, high23));
    }
};

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Groups: their rotation, their norms, their codes.

// The sum over `count` float32 of left · right, added as hlwq.grids.sum_by_halves does: the second half to the first
// until one is left. Here it is what is left in `parts` places, of which `part` is one.
template <int count, int parts>
INLINE Floats halves_added(const float* left, const float* right, int part) {
    if constexpr (parts * LANES == count) {
        return load(left + part * LANES) * load(right + part * LANES);
    } else {
        return halves_added<count, 2 * parts>(left, right, part) +
               halves_added<count, 2 * parts>(left, right, part + parts);
    }
}

template <int count>
INLINE float dot_by_halves(const float* left, const float* right) {
    Floats sum = halves_added<count, 1>(left, right, 0);
#if LANES == 16
    sum += swapped<8>(sum, EveryLane());
#endif
#if LANES >= 8
    sum += swapped<4>(sum, EveryLane());
#endif
    sum += swapped<2>(sum, EveryLane());
    sum += swapped<1>(sum, EveryLane());
    return sum[0];
}

INLINE float dot_by_halves(const float* left, const float* right, int count) {
    switch (count) {
#if LANES <= 8
    case 8:
        return dot_by_halves<8>(left, right);
    case 16:
        return dot_by_halves<16>(left, right);
    case 32:
        return dot_by_halves<32>(left, right);
#endif
    case 64:
        return dot_by_halves<64>(left, right);
    case 128:
        return dot_by_halves<128>(left, right);
    default:
        return dot_by_halves<256>(left, right);
    }
}

template <int distance>
INLINE void rotate_lanes(Floats& values) {
    const Ints signs = second_of_pairs<distance>(EveryLane());
    values = swapped<distance>(values, EveryLane()) + Floats(Ints(values) ^ signs);
}

// The Walsh–Hadamard transform of groups, as hlwq.hadamard computes it.
template <int size>
void rotate_groups_of(const float* source, float* target, ptrdiff_t groups) {
    constexpr int count = size / LANES;
    const float factor = root_reciprocal(size);
    for (ptrdiff_t group = 0; group < groups; ++group) {
        Floats parts[count];
#pragma GCC unroll 64
        for (int part = 0; part < count; ++part) {
            parts[part] = load(source + group * size + part * LANES);
            rotate_lanes<1>(parts[part]);
            rotate_lanes<2>(parts[part]);
#if LANES >= 8
            rotate_lanes<4>(parts[part]);
#endif
#if LANES == 16
            rotate_lanes<8>(parts[part]);
#endif
        }
#pragma GCC unroll 8
        for (int distance = 1; distance < count; distance *= 2) {
#pragma GCC unroll 64
            for (int part = 0; part < count; ++part) {
                if (!(part & distance)) {
                    const Floats first = parts[part], second = parts[part + distance];
                    parts[part] = first + second;
                    parts[part + distance] = first - second;
                }
            }
        }
#pragma GCC unroll 64
        for (int part = 0; part < count; ++part) {
            store(target + group * size + part * LANES, parts[part] * factor);
        }
    }
}

void rotate_groups(const float* source, float* target, ptrdiff_t groups, int size) {
    switch (size) {
#if LANES <= 8
    case 8:
        return rotate_groups_of<8>(source, target, groups);
    case 16:
        return rotate_groups_of<16>(source, target, groups);
    case 32:
        return rotate_groups_of<32>(source, target, groups);
#endif
    case 64:
        return rotate_groups_of<64>(source, target, groups);
    case 128:
        return rotate_groups_of<128>(source, target, groups);
    default:
        return rotate_groups_of<256>(source, target, groups);
    }
}

void measure_groups(const float* weights, float* norms, ptrdiff_t groups, int size) {
    for (ptrdiff_t group = 0; group < groups; ++group, weights += size) {
        norms[group] = __builtin_sqrtf(dot_by_halves(weights, weights, size));
    }
}

// Where values lie among the boundaries.
template <int bits>
struct Place {
    // How many of the positive boundaries lie below the sizes of the values, and the bits of these numbers, the highest
    // first, each as what a comparison gives: −1 or 0.
    Ints index, bit[bits - 1];
    // −1 for values that are not positive, else 0.
    Ints negative;
};

// Of a table of 2^depth float32, filled up to a multiple of sixteen, those at the indices.
template <int depth, int bits>
INLINE Floats look_up(const float* table, const Place<bits>& place) {
    [[maybe_unused]] constexpr int count = 1 << depth;
    if constexpr (depth == 0) {
        return repeated(table[0]);
    } else {
#if LANES == 4
        return Floats{table[place.index[0]], table[place.index[1]], table[place.index[2]], table[place.index[3]]};
#elif LANES == 8
        Floats parts[count <= 8 ? 1 : count / 8];
#pragma GCC unroll 16
        for (int part = 0; part < (count <= 8 ? 1 : count / 8); ++part) {
            parts[part] = _mm256_permutevar8x32_ps(load(table + 8 * part), __m256i(place.index));
        }
#pragma GCC unroll 4
        for (int bit = depth - 4; bit >= 0; --bit) {
#pragma GCC unroll 8
            for (int part = 0; part < 1 << bit; ++part) {
                parts[part] = _mm256_blendv_ps(parts[2 * part], parts[2 * part + 1], __m256(place.bit[bit]));
            }
        }
        return parts[0];
#else
        if constexpr (depth <= 4) {
            return _mm512_permutexvar_ps(__m512i(place.index), load(table));
        } else {
            Floats parts[count / 32];
            for (int part = 0; part * 32 < count; ++part) {
                const Floats low = load(table + 32 * part), high = load(table + 32 * part + 16);
                parts[part] = _mm512_permutex2var_ps(low, __m512i(place.index), high);
            }
            for (int bit = depth - 6; bit >= 0; --bit) {
                const __mmask16 chosen = _mm512_movepi32_mask(__m512i(place.bit[bit]));
                for (int part = 0; part < 1 << bit; ++part) {
                    parts[part] = _mm512_mask_blend_ps(chosen, parts[2 * part], parts[2 * part + 1]);
                }
            }
            return parts[0];
        }
#endif
    }
}

template <int depth, int bits, int vectors>
INLINE void search(const float* steps, const Ints (&sizes)[vectors], Place<bits> (&places)[vectors]) {
    if constexpr (depth < bits - 1) {
#pragma GCC unroll 4
        for (int each = 0; each < vectors; ++each) {
            const Ints above = sizes[each] > Ints(look_up<depth>(steps, places[each]));
            places[each].bit[depth] = above;
            places[each].index += places[each].index - above;
        }
        search<depth + 1>(steps + (depth > 4 ? 1 << depth : 16), sizes, places);
    }
}

// The boundaries are symmetric, so that half of them are searched; what is positive can be compared as integers. A
// boundary belongs to the level below it. For a negative value that is the larger of the two: it is searched for as the
// next larger number. Several vectors take turns, since each step has to wait for the one before.
template <int bits, int vectors>
INLINE void find_places(const Codebook& book, const float* weights, float factor, Place<bits> (&places)[vectors]) {
    Ints sizes[vectors];
#pragma GCC unroll 4
    for (int each = 0; each < vectors; ++each) {
        const Floats values = load(weights + each * LANES) * factor;
        places[each].index = Ints{};
        places[each].negative = values <= 0.0f;
        sizes[each] = (Ints(values) & INT32_MAX) - places[each].negative;
    }
    search<0>(book.steps, sizes, places);
}

template <int vectors>
INLINE void store_bytes(uint8_t* to, const Ints (&codes)[vectors]) {
#if LANES == 16
    for (int each = 0; each < vectors; ++each) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + each, _mm512_cvtepi32_epi8(__m512i(codes[each])));
    }
#elif LANES == 8
    if constexpr (vectors == 4) {
        const __m256i low = _mm256_packs_epi32(__m256i(codes[0]), __m256i(codes[1]));
        const __m256i high = _mm256_packs_epi32(__m256i(codes[2]), __m256i(codes[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    } else {
        const __m256i all = __m256i(codes[0]);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
    }
#else
    for (int code = 0; code < vectors * LANES; ++code) {
        to[code] = codes[code / LANES][code % LANES];
    }
#endif
}

template <int bits, int vectors>
INLINE void round_weights(const Codebook& book, const float* weights, float factor, uint8_t* codes, int count) {
    for (int column = 0; column < count; column += vectors * LANES) {
        Place<bits> places[vectors];
        find_places(book, weights + column, factor, places);
        Ints rounded[vectors];
        for (int each = 0; each < vectors; ++each) {
            rounded[each] = (places[each].index ^ places[each].negative) + (1 << (bits - 1));
        }
        store_bytes(codes + column, rounded);
    }
}

template <int bits>
void round_groups(const Codebook& book, const float* weights, const float* norms, uint8_t* codes, ptrdiff_t groups,
                  int size) {
    for (ptrdiff_t group = 0; group < groups; ++group, weights += size, codes += size) {
        const float factor = factor_of(norms[group], size);
        if (size % (4 * LANES) == 0) {
            round_weights<bits, 4>(book, weights, factor, codes, size);
        } else {
            round_weights<bits, 1>(book, weights, factor, codes, size);
        }
    }
}

template <int bits, int vectors>
INLINE void nearest_levels(const Codebook& book, const float* weights, float factor, const float* positive_levels,
                           float* levels, int count) {
    for (int column = 0; column < count; column += vectors * LANES) {
        Place<bits> places[vectors];
        find_places(book, weights + column, factor, places);
        for (int each = 0; each < vectors; ++each) {
            const Ints level = Ints(look_up<bits - 1>(positive_levels, places[each]));
            store(levels + column + each * LANES, Floats(level ^ (places[each].negative & INT32_MIN)));
        }
    }
}

template <int bits>
void refine_groups(const Codebook& book, const float* weights, const float* norms, float* refined, ptrdiff_t groups,
                   int size) {
    constexpr int half = 1 << (bits - 1);
    float positive_levels[half < 16 ? 16 : half] = {}, levels[256];
    for (int level = 0; level < half; ++level) {
        positive_levels[level] = book.centroids[half + level] * (1 / root(size));
    }
    for (ptrdiff_t group = 0; group < groups; ++group, weights += size) {
        const float factor = factor_of(norms[group], size);
        if (size % (4 * LANES) == 0) {
            nearest_levels<bits, 4>(book, weights, factor, positive_levels, levels, size);
        } else {
            nearest_levels<bits, 1>(book, weights, factor, positive_levels, levels, size);
        }
        refined[group] = dot_by_halves(weights, levels, size) / dot_by_halves(levels, levels, size);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows: decoding, and products with decoded rows.

// Groups of a multiple of `blocks` blocks, of which each is as much as levels are looked up of at once.
template <int width, int bits, int blocks>
INLINE void decode_groups(const Codebook& book, const uint8_t* codes, const float* scales, float* target,
                          ptrdiff_t columns, ptrdiff_t group_size) {
    constexpr int step = Levels<width, bits>::step;
    const Levels<width, bits> levels(book);
    for (ptrdiff_t group = 0; group * group_size < columns; ++group) {
        const float scale = scales[group];
        for (ptrdiff_t column = 0; column < group_size; column += blocks * step) {
            const uint8_t* sources[blocks];
            for (int block = 0; block < blocks; ++block, codes += step * width / 8) {
                sources[block] = codes;
            }
            Floats looked_up[blocks][step / LANES];
            levels(sources, looked_up);
            for (int block = 0; block < blocks; ++block, target += step) {
                for (int part = 0; part < step / LANES; ++part) {
                    store(target + part * LANES, looked_up[block][part] * scale);
                }
            }
        }
    }
}

template <int width, int bits>
void decode_row(const Codebook& book, const uint8_t* codes, const float* scales, float* target, ptrdiff_t columns,
                ptrdiff_t group_size) {
    constexpr int step = Levels<width, bits>::step;
    if (group_size % (2 * step) == 0) {
        decode_groups<width, bits, 2>(book, codes, scales, target, columns, group_size);
    } else if (group_size % step == 0) {
        decode_groups<width, bits, 1>(book, codes, scales, target, columns, group_size);
    } else {  // one by one
        for (ptrdiff_t column = 0; column < columns; column += 8, codes += width) {
            const uint64_t word = load_word<width>(codes);
            for (int index = 0; index < 8; ++index) {
                const float level = book.centroids[word >> (index * width) & ((1 << bits) - 1)];
                target[column + index] = level * scales[(column + index) / group_size];
            }
        }
    }
}

// The sum of sixteen lanes: of the first eight, where even runs of eight columns were added up, and of the others.
INLINE float total(const Floats (&sums)[16 / LANES]) {
#if LANES == 16
    Floats sum = sums[0];
    sum += swapped<4>(sum, EveryLane());
    sum += swapped<2>(sum, EveryLane());
    sum += swapped<1>(sum, EveryLane());
    return sum[0] + sum[8];
#else
#if LANES == 8
    Floats even = sums[0], odd = sums[1];
    even += swapped<4>(even, EveryLane());
    odd += swapped<4>(odd, EveryLane());
#else
    Floats even = sums[0] + sums[1], odd = sums[2] + sums[3];
#endif
    even += swapped<2>(even, EveryLane());
    odd += swapped<2>(odd, EveryLane());
    even += swapped<1>(even, EveryLane());
    odd += swapped<1>(odd, EveryLane());
    return even[0] + odd[0];
#endif
}

template <int bits, int group_size, int rows>
INLINE void multiply_rows_at_once(const RowProduct& product, const Levels<bits, bits>& levels, ptrdiff_t row,
                                  const float* scales) {
    constexpr int step = Levels<bits, bits>::step, parts = 16 / LANES;
    const ptrdiff_t groups = product.groups;
    const float* inputs = product.inputs;
    const uint8_t* codes[rows];
    for (int each = 0; each < rows; ++each) {
        codes[each] = product.packed + (row + each) * groups * (group_size * bits / 8);
    }
    Floats sums[rows][parts] = {};
    for (ptrdiff_t group = 0; group < groups; ++group) {
        Floats of_group[rows][parts] = {};
        for (int column = 0; column < group_size; column += step, inputs += step) {
            Floats looked_up[rows][step / LANES];
            levels(codes, looked_up);
            for (int part = 0; part < step / LANES; ++part) {
                const Floats input = load(inputs + part * LANES);
                for (int each = 0; each < rows; ++each) {
                    Floats& sum = of_group[each][part % parts];
                    sum = multiply_add(looked_up[each][part], input, sum);
                }
            }
            for (int each = 0; each < rows; ++each) {
                codes[each] += step * bits / 8;
            }
        }
        for (int each = 0; each < rows; ++each) {
            const Floats scale = repeated(scales[each * groups + group]);
            for (int part = 0; part < parts; ++part) {
                sums[each][part] = multiply_add(of_group[each][part], scale, sums[each][part]);
            }
        }
    }
    for (int each = 0; each < rows; ++each) {
        write_output(product, row + each, total(sums[each]));
    }
}

template <int bits, int group_size>
void multiply_row(const RowProduct& product, ptrdiff_t first, ptrdiff_t last) {
    constexpr int rows = 2;
    const Levels<bits, bits> levels(*product.book);
    const ptrdiff_t groups = product.groups;
    // Norms of several short rows are scaled together.
    const ptrdiff_t some_rows = groups < 128 ? rows * (128 / groups) : rows;
    float scales[rows * most_groups + spare_scales];
    for (ptrdiff_t start = first; start < last; start += some_rows) {
        const ptrdiff_t end = last - start < some_rows ? last : start + some_rows;
        scale_some_norms(product.norms + start * groups, scales, (end - start) * groups, group_size);
        ptrdiff_t row = start;
        for (; row + rows <= end; row += rows) {
            multiply_rows_at_once<bits, group_size, rows>(product, levels, row, scales + (row - start) * groups);
        }
        for (; row < end; ++row) {
            multiply_rows_at_once<bits, group_size, 1>(product, levels, row, scales + (row - start) * groups);
        }
    }
}

#if LANES <= 8

// One row of the matrix, decoded, times up to four rows of inputs, in sums of eight lanes.
void multiply_decoded(const float* const (&inputs)[4], const float* decoded, ptrdiff_t columns, float (&outputs)[4]) {
    constexpr int parts = 8 / LANES;
    Floats sums[4][parts] = {};
    for (ptrdiff_t column = 0; column < columns; column += 8) {
        for (int part = 0; part < parts; ++part) {
            const Floats weights = load(decoded + column + part * LANES);
            for (int row = 0; row < 4; ++row) {
                sums[row][part] = multiply_add(weights, load(inputs[row] + column + part * LANES), sums[row][part]);
            }
        }
    }
    for (int row = 0; row < 4; ++row) {
#if LANES == 8
        Floats sum = sums[row][0] + swapped<4>(sums[row][0], EveryLane());
#else
        Floats sum = sums[row][0] + sums[row][1];
#endif
        sum += swapped<2>(sum, EveryLane());
        sum += swapped<1>(sum, EveryLane());
        outputs[row] = sum[0];
    }
}

#endif

template <int... index>
constexpr Kernels kernels_of(std::integer_sequence<int, index...>) {
    return {
        scale_norms,
        rotate_groups,
        measure_groups,
        {refine_groups<index + 2>...},
        {round_groups<index + 2>...},
        {decode_row<index + 2, index + 2>...},
        {decode_row<8, index + 2>...},
#if LANES <= 8
        {multiply_row<index + 2, 32>...},
#else
        {},
#endif
        {multiply_row<index + 2, 64>...},
        {multiply_row<index + 2, 128>...},
        {multiply_row<index + 2, 256>...},
#if LANES <= 8
        multiply_decoded,
#else
        avx2::multiply_decoded,
#endif
    };
}

constexpr Kernels kernels = kernels_of(std::make_integer_sequence<int, 7>());

}  // namespace LEVEL
