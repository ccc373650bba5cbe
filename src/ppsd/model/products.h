// Rows times weights, of bfloat16 numbers or of codes: the part of kernels.c below its layer.
//
// All sums are floats, and all are made in the same order whatever the number of rows or threads.
// CPUs with AVX512_BF16 have an instruction for products; others widen: a 32-bit word holds two
// bfloat16 numbers, shifted left it is the first as a float, masked the second, so that takes no
// shuffles.

#pragma once
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

#define AT_ONCE 4 // rows, or queries, whose sums stay in registers
#ifdef __AVX512BF16__
#define TOGETHER 4 // outputs, or keys, that are multiplied with them at once
#else
#define TOGETHER 2
#endif
#define LANES (AT_ONCE * TOGETHER) // floats in a vector
#define PAIRS (2 * LANES)          // bfloat16 numbers in a vector of words
#define THREAD_WORK 65536          // products that make up for waking a thread

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));

#define ALWAYS static inline __attribute__((always_inline))

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

static inline long least(long a, long b) { return a < b ? a : b; }

static inline words load(const bf16 *pairs) {
    words both;
    memcpy(&both, pairs, sizeof both);
    return both;
}

static inline floats even(words both) { return (floats)(both << 16); }
static inline floats odd(words both) { return (floats)(both & 0xffff0000u); }

static inline float widen(bf16 narrow) {
    uint32_t bits = (uint32_t)narrow << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline bf16 narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest, ties to even; results in the low halves. Widened NaNs have no low bits, so they
// stay NaN.
static inline words narrow_all(floats wide) {
    words bits = (words)wide;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// What a CPU multiplies at once: STEP `numbers`, whose products it adds to `partials`. `totals` are
// those of LANES partials, halved over and over. A `few` is TOGETHER numbers.
#ifdef __AVX512BF16__
#define STEP 32
typedef __m512bh numbers;
typedef __m512 partials;
typedef uint64_t few;

ALWAYS numbers narrows(const bf16 *from) { return (numbers)_mm512_loadu_si512(from); }
ALWAYS partials add_products(partials all, numbers a, numbers b) {
    return _mm512_dpbf16_ps(all, a, b);
}

ALWAYS floats by_8(floats a, floats b) {
    return PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
ALWAYS floats by_4(floats a, floats b) {
    return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
ALWAYS floats by_2(floats a, floats b) {
    return PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
ALWAYS floats by_1(floats a, floats b) {
    return PICK(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           PICK(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
ALWAYS floats totals(const partials v[LANES]) {
    floats each[4];
    for (int i = 0; i < 4; i++) each[i] = by_4(by_8(v[i], v[i + 4]), by_8(v[i + 8], v[i + 12]));
    return by_1(by_2(each[0], each[1]), by_2(each[2], each[3]));
}
#else
#define STEP 16
typedef words numbers;
typedef floats partials;
typedef uint32_t few;

ALWAYS numbers narrows(const bf16 *from) { return load(from); }
ALWAYS partials add_products(partials all, numbers a, numbers b) {
    all += even(a) * even(b);
    return all + odd(a) * odd(b);
}

ALWAYS floats by_4(floats a, floats b) {
    return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
ALWAYS floats by_2(floats a, floats b) {
    return PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
ALWAYS floats by_1(floats a, floats b) {
    return PICK(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + PICK(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
ALWAYS floats totals(const partials v[LANES]) {
    floats each[4];
    for (int i = 0; i < 4; i++) each[i] = by_4(v[i], v[i + 4]);
    return by_1(by_2(each[0], each[1]), by_2(each[2], each[3]));
}
#endif
typedef few fews __attribute__((vector_size(2 * LANES))); // AT_ONCE of them

// Adds one step of rows x [rows, in] times weights to `sums`. Here and below, `rows` is a constant
// after inlining.
ALWAYS void add_step(int rows, const bf16 *x, const numbers weights[TOGETHER],
                     partials sums[TOGETHER][AT_ONCE], long in) {
    for (int row = 0; row < rows; row++) {
        numbers some = narrows(x + row * in);
        for (int i = 0; i < TOGETHER; i++)
            sums[i][row] = add_products(sums[i][row], weights[i], some);
    }
}

ALWAYS floats totals_by_output(partials sums[TOGETHER][AT_ONCE]) { // [TOGETHER, AT_ONCE]
    partials all[LANES];
    for (int i = 0; i < LANES; i++) all[i] = sums[i / AT_ONCE][i % AT_ONCE];
    return totals(all);
}

ALWAYS floats totals_by_row(partials sums[TOGETHER][AT_ONCE]) { // [AT_ONCE, TOGETHER]
    partials all[LANES];
    for (int i = 0; i < LANES; i++) all[i] = sums[i % TOGETHER][i / TOGETHER];
    return totals(all);
}

// Fetches so many numbers, a multiple of 32.
ALWAYS void fetch(const bf16 *from, long many) {
    for (long at = 0; at < many; at += 32) __builtin_prefetch(from + at);
}

// Adds rows x [rows, in] times `many` weights [TOGETHER, in], the last of which stands for those
// that are missing, to `sums`. What lies `ahead` in memory is fetched, line by line in the order in
// which it lies there.
ALWAYS void add_all(int rows, const bf16 *x, const bf16 *weight, int many, long in, long ahead,
                    partials sums[TOGETHER][AT_ONCE]) {
    const bf16 *from[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) from[i] = weight + least(i, many - 1) * in;
    for (long k = 0; k < in; k += STEP) {
        fetch(weight + ahead + TOGETHER * k, TOGETHER * STEP);
        numbers weights[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) weights[i] = narrows(from[i] + k);
        add_step(rows, x + k, weights, sums, in);
    }
}

ALWAYS few load_few(const bf16 *from, int many) {
    few all = 0;
    if (many == TOGETHER) memcpy(&all, from, sizeof all);
    else memcpy(&all, from, sizeof *from * many);
    return all;
}

ALWAYS void store_few(bf16 *to, few all, int many) {
    if (many == TOGETHER) memcpy(to, &all, sizeof all);
    else memcpy(to, &all, sizeof *to * many);
}

ALWAYS floats widen_fews(fews all) {
    return (floats)(__builtin_convertvector((halves)all, words) << 16);
}

// `many` outputs y [rows, out]: `sums` of products [AT_ONCE, TOGETHER] + bias + residual like y,
// both of which may be NULL.
ALWAYS void finish(int rows, floats sums, const bf16 *bias, const bf16 *residual, bf16 *y, long out,
                   int many) {
    if (bias) sums += widen_fews((fews){0} + load_few(bias, many));
    if (residual) {
        fews more = {0};
        for (int row = 0; row < rows; row++) more[row] = load_few(residual + row * out, many);
        sums += widen_fews(more);
    }
    fews all = (fews)__builtin_convertvector(narrow_all(sums), halves);
    for (int row = 0; row < rows; row++) store_few(y + row * out, all[row], many);
}

// What a weight is made of (kernels.py): numbers, or codes of 4 or 8 bits (packed.py).
enum { NUMBERS, CODES_4, CODES_4_WIDE, CODES_8 };

#ifdef __AVX512BF16__
#define BLOCK 32            // inputs that share a scale and an offset
#define SPREAD (32 * BLOCK) // inputs whose scales are widened at once
#define PACKED_AHEAD 16384  // bytes fetched ahead

// A tile is TOGETHER outputs: codes [blocks, block_bytes] and then scales [blocks, TOGETHER], with
// 4 bits scales and offsets [blocks, 2, TOGETHER]. Word k of a block's 4-bit codes holds those of
// input k of all outputs; codes of 8 bits are [TOGETHER, BLOCK].
ALWAYS long block_bytes(int kind) { return kind == CODES_8 ? TOGETHER * BLOCK : 2 * BLOCK; }
ALWAYS long block_scales(int kind) { return kind == CODES_8 ? TOGETHER : 2 * TOGETHER; }
ALWAYS long scale_bytes(int kind) { return kind == CODES_4_WIDE ? 4 : 2; }

static inline long tile_bytes(int kind, long in) {
    if (kind == NUMBERS) return sizeof(bf16) * in * TOGETHER;
    long each = block_bytes(kind) + block_scales(kind) * scale_bytes(kind);
    return (in / BLOCK * each + 63) / 64 * 64;
}

// Numbers of output i in a block; both constants after inlining.
ALWAYS numbers unpacked(int kind, const char *codes, const float *scales, int i) {
    if (kind == CODES_8) {
        const __m128i *bytes = (const __m128i *)(codes + BLOCK * i);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
        __m512 scale = _mm512_set1_ps(scales[i]);
        return _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
    }
    // There are 16 numbers: look each up.
    const __m512 all_codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 all = _mm512_fmadd_ps(all_codes, _mm512_set1_ps(scales[i]),
                                 _mm512_set1_ps(scales[TOGETHER + i]));
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(all, all); // twice: the fifth bit is anything
    __m512i words = _mm512_srli_epi16(_mm512_loadu_si512(codes), 4 * i);
    return (__m512bh)_mm512_permutexvar_epi16(words, table);
}

// So many scales as floats, which `space` has room for. A tile's padding may be read as well.
ALWAYS const float *widened(int kind, const char *scales, long many, float *space) {
    if (kind == CODES_4_WIDE) return (const float *)scales;
    for (long at = 0; at < many; at += 16) {
        __builtin_prefetch(scales + PACKED_AHEAD + 2 * at);
        __m256i some = _mm256_loadu_si256((const __m256i *)(scales + 2 * at));
        _mm512_storeu_ps(space + at, _mm512_cvtph_ps(some));
    }
    return space;
}

// Like add_all, for packed weights; the same bits. Or, where there is a y [TOGETHER, in], writes
// the weights' numbers there instead.
ALWAYS void add_packed(int kind, int rows, const bf16 *x, const char *tile, long in,
                       partials sums[TOGETHER][AT_ONCE], bf16 *y) {
    const long bytes = block_bytes(kind), each = block_scales(kind);
    const char *scales = tile + in / BLOCK * bytes;
    float space[SPREAD / BLOCK * 2 * TOGETHER];
    for (long k = 0; k < in; k += SPREAD) {
        long end = least(k + SPREAD, in), many = (end - k) / BLOCK * each;
        const float *own = widened(kind, scales, many, space);
        scales += many * scale_bytes(kind);
#pragma GCC unroll 2
        for (long at = k; at < end; at += BLOCK, tile += bytes, own += each) {
            numbers weights[TOGETHER];
            for (long line = 0; line < bytes; line += 64)
                __builtin_prefetch(tile + PACKED_AHEAD + line);
            for (int i = 0; i < TOGETHER; i++) weights[i] = unpacked(kind, tile, own, i);
            if (y)
                for (int i = 0; i < TOGETHER; i++)
                    _mm512_storeu_si512(y + i * in + at, (__m512i)weights[i]);
            else add_step(rows, x + at, weights, sums, in);
        }
    }
}

// y [out, in] = the numbers of a packed weight; `out` is a multiple of TOGETHER.
void unpack(const char *weight, int kind, bf16 *y, long in, long out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long tile = 0; tile < out / TOGETHER; tile++) {
        const char *from = weight + tile * tile_bytes(kind, in);
        bf16 *to = y + tile * TOGETHER * in;
        if (kind == CODES_4) add_packed(CODES_4, 0, NULL, from, in, NULL, to);
        else if (kind == CODES_4_WIDE) add_packed(CODES_4_WIDE, 0, NULL, from, in, NULL, to);
        else add_packed(CODES_8, 0, NULL, from, in, NULL, to);
    }
}

int packs(void) { return 1; }

// Adds products with a tile of any kind to `sums`.
ALWAYS void add_any(int kind, int rows, const bf16 *x, const void *tile, int many, long in,
                    partials sums[TOGETHER][AT_ONCE]) {
    if (kind == CODES_4) add_packed(CODES_4, rows, x, tile, in, sums, NULL);
    else if (kind == CODES_4_WIDE) add_packed(CODES_4_WIDE, rows, x, tile, in, sums, NULL);
    else if (kind == CODES_8) add_packed(CODES_8, rows, x, tile, in, sums, NULL);
    else add_all(rows, x, tile, many, in, TOGETHER * in, sums);
}
#else // there are numbers only
void unpack(const char *weight, int kind, bf16 *y, long in, long out, int threads) {}
int packs(void) { return 0; }
static inline long tile_bytes(int kind, long in) { return sizeof(bf16) * in * TOGETHER; }
ALWAYS void add_any(int kind, int rows, const bf16 *x, const void *tile, int many, long in,
                    partials sums[TOGETHER][AT_ONCE]) {
    add_all(rows, x, tile, many, in, TOGETHER * in, sums);
}
#endif

// Some outputs of `rows` (a constant after inlining) rows x [rows, in]; see linear.
ALWAYS void outputs(int rows, const bf16 *x, const void *tile, int kind, const bf16 *bias,
                    const bf16 *residual, bf16 *y, long in, long out, int many) {
    partials sums[TOGETHER][AT_ONCE] = {0};
    add_any(kind, rows, x, tile, many, in, sums);
    finish(rows, totals_by_row(sums), bias, residual, y, out, many);
}

// y [rows, out] = x [rows, in] · weight [out, in] transposed + bias [out] + residual [rows, out],
// both of which may be NULL. `in` is a multiple of 32.
void linear(const bf16 *x, const void *weight, int kind, const bf16 *bias, const bf16 *residual,
            bf16 *y, long rows, long in, long out, int threads) {
    long bytes = tile_bytes(kind, in);
    if (in * out < THREAD_WORK) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j += TOGETHER) {
        const char *tile = (const char *)weight + j / TOGETHER * bytes;
        const bf16 *b = bias ? bias + j : NULL;
        int many = least(TOGETHER, out - j);
        for (long row = 0; row < rows; row += AT_ONCE) {
            const bf16 *from = x + row * in, *add = residual ? residual + row * out + j : NULL;
            bf16 *to = y + row * out + j;
            switch (rows - row) {
            case 1: outputs(1, from, tile, kind, b, add, to, in, out, many); break;
            case 2: outputs(2, from, tile, kind, b, add, to, in, out, many); break;
            case 3: outputs(3, from, tile, kind, b, add, to, in, out, many); break;
            default: outputs(AT_ONCE, from, tile, kind, b, add, to, in, out, many);
            }
        }
    }
}
