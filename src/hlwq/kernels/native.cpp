// The compiled kernels: loops over groups and rows, and the module hlwq.kernels._native that gives them to Python.
//
// What each computes is documented in _native.pyi; each has the bits of the plain torch code, but for products, whose
// sums have an order of their own. native_loops.h holds the loops. It is compiled once for each instruction set, in a
// namespace of its own:
//
//     portable   4 lanes   what every processor of the architecture has: SSE2, NEON, …
//     avx2       8 lanes   AVX2 and FMA
//     avx512    16 lanes   AVX-512 F, BW, DQ, VL and VBMI; for groups of a multiple of 64 weights, others go to avx2
//
// The best that the processor has is used, unless `use` says otherwise. All give the same bits, but that products on an
// x86 processor without FMA round twice where others round once. For that, nothing here may be compiled with
// -ffast-math, and only with -ffp-contract=off: where a product and a sum are one operation, multiply_add says so.
//
// Codes are packed as hlwq.packing says: eight of `bits` bits in `bits` bytes, the lowest first. A row of a matrix is
// such a stream, followed at once by the next; a group is a run of neighbouring weights in a row with one norm. The
// level of a code is the codebook's centroid times norm/√size of the group.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are read as little-endian words");

#define INLINE inline __attribute__((always_inline))

namespace {

// A codebook in the forms in which kernels look it up.
struct Codebook {
    // The levels, ascending, repeated until there are 256.
    alignas(64) float centroids[256];
    // The positive boundaries, one table for each step of a binary search, of 1, 2, 4, … entries; each is filled up to
    // a multiple of 16.
    alignas(64) float steps[176];
    // Byte by byte, the levels for AVX-512: of 7 and 8 bits only the lower half, for the upper is its mirror image.
    alignas(64) uint8_t planes[4][128];
    // The same for AVX2, where more than 4 bits are folded so, in tables of 16. A lookup in a table gives 0 for an
    // index below it, and is made in all; therefore each but the first holds what differs from the one before.
    alignas(64) uint8_t differences[4][8][16];
    bool filled;
};

Codebook codebooks[7];

void fill(Codebook& book, int bits, const float* centroids, const float* boundaries) {
    const int levels = 1 << bits, half = levels / 2;
    for (int index = 0; index < 256; ++index) {
        book.centroids[index] = centroids[index % levels];
    }
    float* step = book.steps;
    for (int stride = half; stride > 1; stride /= 2) {
        const int count = half / stride, size = count > 16 ? count : 16;
        for (int index = 0; index < size; ++index) {
            *step++ = boundaries[half - 1 + stride / 2 + index % count * stride];
        }
    }
    for (int byte = 0; byte < 4; ++byte) {
        uint8_t folded[128];
        for (int index = 0; index < 128; ++index) {
            uint8_t bytes[4];
            memcpy(bytes, &centroids[index % levels], 4);
            book.planes[byte][index] = bytes[byte];
            memcpy(bytes, &centroids[index % (bits > 4 ? half : levels)], 4);
            folded[index] = bytes[byte];
        }
        for (int index = 0; index < 128; ++index) {
            book.differences[byte][index / 16][index % 16] = folded[index] ^ (index < 16 ? 0 : folded[index - 16]);
        }
    }
    book.filled = true;
}

// √size and 1/√size, as float32.
INLINE float root(ptrdiff_t size) { return float(__builtin_sqrt(double(size))); }
INLINE float root_reciprocal(ptrdiff_t size) { return float(1 / __builtin_sqrt(double(size))); }

// √size/norm, which turns a group's weights into what is rounded.
INLINE float factor_of(float norm, ptrdiff_t size) { return norm > 0 ? 1 / norm * root(size) : 0; }

template <typename Word>
INLINE Word load_as(const uint8_t* from) {
    Word word;
    memcpy(&word, from, sizeof word);
    return word;
}

// The next `bytes` bytes; of 3, or 5 to 7, by two loads that overlap.
template <int bytes>
INLINE uint64_t load_word(const uint8_t* from) {
    if constexpr (bytes == 1) {
        return *from;
    } else if constexpr (bytes == 8) {
        return load_as<uint64_t>(from);
    } else {
        using Part = std::conditional_t<(bytes < 4), uint16_t, uint32_t>;
        constexpr int rest = bytes - sizeof(Part);
        return load_as<Part>(from) | uint64_t(load_as<Part>(from + rest)) << 8 * rest;
    }
}

template <typename To, typename From>
INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

// One row of inputs times a packed matrix. The inputs are rotated, the outputs bfloat16 or float32.
struct RowProduct {
    const Codebook* book;
    const float* inputs;
    const uint8_t* packed;
    const uint16_t* norms;
    void* outputs;
    ptrdiff_t groups;
    bool half;
};

INLINE void write_output(const RowProduct& product, ptrdiff_t row, float value) {
    if (!product.half) {
        static_cast<float*>(product.outputs)[row] = value;
        return;
    }
    const uint32_t word = bits_as<uint32_t>(value);
    const uint32_t nearest = (word + 0x7FFF + (word >> 16 & 1)) >> 16;                 // the even one of two
    static_cast<uint16_t*>(product.outputs)[row] = value != value ? 0x7FC0 : nearest;  // a NaN could become anything
}

// In a row of a matrix that `multiply_row` serves.
constexpr ptrdiff_t most_groups = 1024;
// Float32 that `scale_norms` may write behind the last.
constexpr ptrdiff_t spare_scales = 15;

// The kernels of one instruction set, for 2 to 8 bits where there are seven. Those for groups take their size.
struct Kernels {
    using DecodeRow = void(const Codebook&, const uint8_t* codes, const float* scales, float* target, ptrdiff_t columns,
                           ptrdiff_t group_size);
    using MultiplyRow = void(const RowProduct&, ptrdiff_t first, ptrdiff_t last);

    void (*scale_norms)(const uint16_t* norms, float* scales, ptrdiff_t count, ptrdiff_t group_size);
    void (*rotate_groups)(const float* source, float* target, ptrdiff_t groups, int size);
    void (*measure_groups)(const float* weights, float* norms, ptrdiff_t groups, int size);
    void (*refine_groups[7])(const Codebook&, const float* weights, const float* norms, float* refined,
                             ptrdiff_t groups, int size);
    void (*round_groups[7])(const Codebook&, const float* weights, const float* norms, uint8_t* codes, ptrdiff_t groups,
                            int size);
    DecodeRow* decode_packed_row[7];
    DecodeRow* decode_row[7];
    MultiplyRow* multiply_row_32[7];
    MultiplyRow* multiply_row_64[7];
    MultiplyRow* multiply_row_128[7];
    MultiplyRow* multiply_row_256[7];
    void (*multiply_decoded)(const float* const (&inputs)[4], const float* decoded, ptrdiff_t columns,
                             float (&outputs)[4]);

    MultiplyRow* multiply_row(int bits, ptrdiff_t group_size) const {
        const auto& of_bits = group_size == 32    ? multiply_row_32
                              : group_size == 64  ? multiply_row_64
                              : group_size == 128 ? multiply_row_128
                                                  : multiply_row_256;
        return of_bits[bits - 2];
    }
};

#define LEVEL portable
#define LANES 4
#include "native_loops.h"
#undef LEVEL
#undef LANES

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LEVEL avx2
#define LANES 8
#include "native_loops.h"
#undef LEVEL
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#endif
#define LEVEL avx512
#define LANES 16
#include "native_loops.h"
#undef LEVEL
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

struct Level {
    const char* name;
    const Kernels* kernels;
    bool (*available)();
};

// The best last.
const Level levels[] = {
    {"portable", &portable::kernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kernels,
     [] { return bool(__builtin_cpu_supports("avx2")) && bool(__builtin_cpu_supports("fma")); }},
    {"avx512", &avx512::kernels,
     [] {
         return levels[1].available() && bool(__builtin_cpu_supports("avx512f")) &&
                bool(__builtin_cpu_supports("avx512bw")) && bool(__builtin_cpu_supports("avx512dq")) &&
                bool(__builtin_cpu_supports("avx512vl")) && bool(__builtin_cpu_supports("avx512vbmi"));
     }},
#endif
};

const Level* current_level = levels;

const Kernels& kernels_for([[maybe_unused]] ptrdiff_t group_size) {
    const Kernels* kernels = current_level->kernels;  // once, for `use` may change it meanwhile
#if defined(__x86_64__)
    if (kernels == &avx512::kernels && group_size % 64) {
        return avx2::kernels;
    }
#endif
    return *kernels;
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing: the same for all instruction sets, for memory is what it waits for.

// The lowest `width` bits of each `distance` bits.
constexpr uint64_t low_bits(int width, int distance) {
    uint64_t mask = 0;
    for (int first = 0; first < 64; first += distance) {
        mask |= ((1ull << width) - 1) << first;
    }
    return mask;
}

// Eight codes in bytes to the lowest bits of a word: neighbours are joined, then pairs, then fours.
template <int bits>
INLINE uint64_t joined(uint64_t word) {
    word = (word & low_bits(8, 16)) | (word >> 8 & low_bits(8, 16)) << bits;
    word = (word & low_bits(16, 32)) | (word >> 16 & low_bits(16, 32)) << 2 * bits;
    return (word & low_bits(32, 64)) | word >> 32 << 4 * bits;
}

template <int bits>
INLINE uint64_t parted(uint64_t word) {
    word = (word & low_bits(4 * bits, 64)) | (word >> 4 * bits & low_bits(4 * bits, 64)) << 32;
    word = (word & low_bits(2 * bits, 32)) | (word >> 2 * bits & low_bits(2 * bits, 32)) << 16;
    return (word & low_bits(bits, 16)) | (word >> bits & low_bits(bits, 16)) << 8;
}

// A whole word is read or written where it does not reach beyond the end.
template <int bits>
void pack_octets(const uint8_t* codes, uint8_t* packed, ptrdiff_t octets) {
    ptrdiff_t octet = 0;
    for (; octet * bits + 8 <= octets * bits; ++octet) {
        const uint64_t word = joined<bits>(load_word<8>(codes + 8 * octet));
        memcpy(packed + octet * bits, &word, 8);
    }
    for (; octet < octets; ++octet) {
        const uint64_t word = joined<bits>(load_word<8>(codes + 8 * octet));
        memcpy(packed + octet * bits, &word, bits);
    }
}

template <int bits>
void unpack_octets(const uint8_t* packed, uint8_t* codes, ptrdiff_t octets) {
    ptrdiff_t octet = 0;
    for (; octet * bits + 8 <= octets * bits; ++octet) {
        const uint64_t word = parted<bits>(load_word<8>(packed + octet * bits));
        memcpy(codes + 8 * octet, &word, 8);
    }
    for (; octet < octets; ++octet) {
        const uint64_t word = parted<bits>(load_word<bits>(packed + octet * bits));
        memcpy(codes + 8 * octet, &word, 8);
    }
}

using Repack = void(const uint8_t* source, uint8_t* target, ptrdiff_t octets);

template <int... index>
Repack* packer(int bits, std::integer_sequence<int, index...>) {
    constexpr Repack* of_bits[] = {pack_octets<index + 1>...};
    return of_bits[bits - 1];
}

template <int... index>
Repack* unpacker(int bits, std::integer_sequence<int, index...>) {
    constexpr Repack* of_bits[] = {unpack_octets<index + 1>...};
    return of_bits[bits - 1];
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads: those of the OpenMP that torch brings into the process, called by the names that GCC gives it. They wait
// busily for the next layer; a second pool of threads would stand in their way.

struct OpenMP {
    void (*run_in_team)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*thread_number)() = nullptr;
    int (*thread_count)() = nullptr;

    bool present() const { return run_in_team && thread_number && thread_count; }
};

OpenMP openmp;

void find_openmp() {
#if defined(__linux__)
    openmp.run_in_team = reinterpret_cast<decltype(openmp.run_in_team)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    openmp.thread_number = reinterpret_cast<decltype(openmp.thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    openmp.thread_count = reinterpret_cast<decltype(openmp.thread_count)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
}

struct TeamWork {
    RowProduct product;
    Kernels::MultiplyRow* multiply;
    ptrdiff_t rows, busy;
};

// What each thread of a team does. The team may have fewer threads than were asked for, or more than are busy.
void multiply_share(void* data) {
    const TeamWork& work = *static_cast<const TeamWork*>(data);
    const ptrdiff_t thread = openmp.thread_number(), count = openmp.thread_count();
    const ptrdiff_t threads = count < work.busy ? count : work.busy;
    if (thread < threads) {
        work.multiply(work.product, work.rows * thread / threads, work.rows * (thread + 1) / threads);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The module. Tensors come as addresses; that they have the right dtypes and sizes is checked in Python.

// Lets other threads run Python for as long as it lives.
struct WithoutLock {
    PyThreadState* const state = PyEval_SaveThread();
    ~WithoutLock() { PyEval_RestoreThread(state); }
};

// Float32 that are not initialised; null where there is no memory.
struct Buffer {
    float* const values;

    explicit Buffer(ptrdiff_t count) : values(static_cast<float*>(malloc(count * sizeof(float)))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(values); }
};

template <typename T>
bool read(PyObject* object, T*& value) {
    value = static_cast<T*>(PyLong_AsVoidPtr(object));
    return value || !PyErr_Occurred();
}

template <typename Integer>
bool read(PyObject* object, Integer& value) {
    const Py_ssize_t given = PyLong_AsSsize_t(object);
    value = Integer(given);
    return given != -1 || !PyErr_Occurred();
}

// All arguments of a function, in their order.
template <typename... Values>
bool read_all(PyObject* const* arguments, Py_ssize_t count, Values&... values) {
    if (count != Py_ssize_t(sizeof...(values))) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are needed, not %zd", Py_ssize_t(sizeof...(values)), count);
        return false;
    }
    return (read(*arguments++, values) && ...);
}

bool in_range(const char* name, ptrdiff_t value, ptrdiff_t least, ptrdiff_t most) {
    if (value < least || value > most) {
        PyErr_Format(PyExc_ValueError, "%s is %zd, not %zd to %zd", name, value, least, most);
        return false;
    }
    return true;
}

PyObject* use(PyObject*, PyObject* name) {
    for (const Level& each : levels) {
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, each.name) == 0 && each.available()) {
            current_level = &each;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "this processor has no kernels of level %R", name);
}

PyObject* level(PyObject*, PyObject*) { return PyUnicode_FromString(current_level->name); }

PyObject* available_levels(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Level& each : levels) {
        if (names && each.available()) {
            PyObject* name = PyUnicode_FromString(each.name);
            if (!name || PyList_Append(names, name) < 0) {
                Py_CLEAR(names);
            }
            Py_XDECREF(name);
        }
    }
    return names;
}

PyObject* has_openmp(PyObject*, PyObject*) { return PyBool_FromLong(openmp.present()); }

PyObject* set_codebook(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    int bits;
    const float *centroids, *boundaries;
    if (!read_all(arguments, count, bits, centroids, boundaries) || !in_range("bits", bits, 2, 8)) {
        return nullptr;
    }
    Codebook& book = codebooks[bits - 2];
    if (!book.filled) {  // else another thread may be reading it
        fill(book, bits, centroids, boundaries);
    }
    Py_RETURN_NONE;
}

PyObject* rotate_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const float* source;
    float* target;
    ptrdiff_t groups;
    int size;
    if (!read_all(arguments, count, source, target, groups, size)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        kernels_for(size).rotate_groups(source, target, groups, size);
    }
    Py_RETURN_NONE;
}

PyObject* measure_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const float* weights;
    float* norms;
    ptrdiff_t groups;
    int size;
    if (!read_all(arguments, count, weights, norms, groups, size)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        kernels_for(size).measure_groups(weights, norms, groups, size);
    }
    Py_RETURN_NONE;
}

PyObject* refine_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const float *weights, *norms;
    float* refined;
    ptrdiff_t groups;
    int size, bits;
    if (!read_all(arguments, count, weights, norms, refined, groups, size, bits) || !in_range("bits", bits, 2, 8)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        kernels_for(size).refine_groups[bits - 2](codebooks[bits - 2], weights, norms, refined, groups, size);
    }
    Py_RETURN_NONE;
}

PyObject* round_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const float *weights, *norms;
    uint8_t* codes;
    ptrdiff_t groups;
    int size, bits;
    if (!read_all(arguments, count, weights, norms, codes, groups, size, bits) || !in_range("bits", bits, 2, 8)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        kernels_for(size).round_groups[bits - 2](codebooks[bits - 2], weights, norms, codes, groups, size);
    }
    Py_RETURN_NONE;
}

PyObject* decode_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const uint8_t* codes;
    const float* scales;
    float* target;
    ptrdiff_t rows, columns, group_size;
    int bits, width, rotated;
    if (!read_all(arguments, count, codes, scales, target, rows, columns, group_size, bits, width, rotated) ||
        !in_range("bits", bits, 2, 8)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        const Kernels& kernels = kernels_for(group_size);
        const auto decode_row = (width == 8 ? kernels.decode_row : kernels.decode_packed_row)[bits - 2];
        const ptrdiff_t groups = columns / group_size;
        for (ptrdiff_t row = 0; row < rows; ++row, target += columns) {
            decode_row(codebooks[bits - 2], codes + row * columns * width / 8, scales + row * groups, target, columns,
                       group_size);
            if (rotated) {
                kernels.rotate_groups(target, target, groups, int(group_size));
            }
        }
    }
    Py_RETURN_NONE;
}

PyObject* multiply_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const float* inputs;
    const uint8_t* packed;
    const uint16_t* norms;
    float* outputs;
    ptrdiff_t input_rows, first, last, rows, columns, group_size;
    int bits;
    if (!read_all(arguments, count, inputs, input_rows, packed, norms, outputs, first, last, rows, columns, group_size,
                  bits) ||
        !in_range("bits", bits, 2, 8)) {
        return nullptr;
    }
    const ptrdiff_t groups = columns / group_size;
    const Buffer scales(groups + spare_scales), decoded(columns);
    if (!scales.values || !decoded.values) {
        return PyErr_NoMemory();
    }
    {
        WithoutLock unlocked;
        const Kernels& kernels = kernels_for(group_size);
        for (ptrdiff_t row = first; row < last; ++row) {
            kernels.scale_norms(norms + row * groups, scales.values, groups, group_size);
            kernels.decode_packed_row[bits - 2](codebooks[bits - 2], packed + row * columns * bits / 8, scales.values,
                                                decoded.values, columns, group_size);
            for (ptrdiff_t start = 0; start < input_rows; start += 4) {
                const ptrdiff_t left = input_rows - start;
                const float* some[4];
                float sums[4];
                for (ptrdiff_t each = 0; each < 4; ++each) {
                    some[each] = inputs + (start + (each < left ? each : 0)) * columns;
                }
                kernels.multiply_decoded(some, decoded.values, columns, sums);
                for (ptrdiff_t each = 0; each < 4 && each < left; ++each) {
                    outputs[(start + each) * rows + row] = sums[each];
                }
            }
        }
    }
    Py_RETURN_NONE;
}

PyObject* multiply_row(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const void* inputs;
    RowProduct product;
    ptrdiff_t first, last, group_size, busy;
    unsigned threads;
    int bits, half;
    if (!read_all(arguments, count, inputs, half, product.packed, product.norms, product.outputs, first, last,
                  product.groups, group_size, bits, busy, threads) ||
        !in_range("bits", bits, 2, 8) || !in_range("groups", product.groups, 1, most_groups)) {
        return nullptr;
    }
    const ptrdiff_t columns = product.groups * group_size;
    const Buffer rotated(columns);
    if (!rotated.values) {
        return PyErr_NoMemory();
    }
    {
        WithoutLock unlocked;
        const Kernels& kernels = kernels_for(group_size);
        if (half) {
            const uint16_t* from = static_cast<const uint16_t*>(inputs);
            for (ptrdiff_t column = 0; column < columns; ++column) {
                rotated.values[column] = bits_as<float>(uint32_t(from[column]) << 16);
            }
            kernels.rotate_groups(rotated.values, rotated.values, product.groups, int(group_size));
        } else {
            kernels.rotate_groups(static_cast<const float*>(inputs), rotated.values, product.groups, int(group_size));
        }
        product.inputs = rotated.values;
        product.book = &codebooks[bits - 2];
        product.half = half;
        const auto multiply = kernels.multiply_row(bits, group_size);
        if (busy > 1) {
            TeamWork work{product, multiply, last, busy};
            openmp.run_in_team(multiply_share, &work, threads, 0);
        } else {
            multiply(product, first, last);
        }
    }
    Py_RETURN_NONE;
}

using Factory = Repack*(int bits, std::integer_sequence<int, 0, 1, 2, 3, 4, 5, 6, 7>);

PyObject* repack(PyObject* const* arguments, Py_ssize_t count, Factory* function_for) {
    const uint8_t* source;
    uint8_t* target;
    ptrdiff_t octets;
    int bits;
    if (!read_all(arguments, count, source, target, octets, bits) || !in_range("bits", bits, 1, 8)) {
        return nullptr;
    }
    {
        WithoutLock unlocked;
        function_for(bits, {})(source, target, octets);
    }
    Py_RETURN_NONE;
}

PyObject* pack(PyObject*, PyObject* const* arguments, Py_ssize_t count) { return repack(arguments, count, packer); }

PyObject* unpack(PyObject*, PyObject* const* arguments, Py_ssize_t count) { return repack(arguments, count, unpacker); }

PyMethodDef fast(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    {"use", use, METH_O, nullptr},
    {"level", level, METH_NOARGS, nullptr},
    {"available_levels", available_levels, METH_NOARGS, nullptr},
    {"has_openmp", has_openmp, METH_NOARGS, nullptr},
    fast("set_codebook", set_codebook),
    fast("rotate_groups", rotate_groups),
    fast("measure_groups", measure_groups),
    fast("refine_groups", refine_groups),
    fast("round_groups", round_groups),
    fast("decode_rows", decode_rows),
    fast("multiply_rows", multiply_rows),
    fast("multiply_row", multiply_row),
    fast("pack", pack),
    fast("unpack", unpack),
    {nullptr, nullptr, 0, nullptr},
};

int set_up(PyObject*) {
    find_openmp();
    for (const Level& each : levels) {
        if (each.available()) {
            current_level = &each;
        }
    }
    return 0;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(set_up)}, {0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
