// A decoder layer for a few bfloat16 rows.
//
// Decoding reads every weight once a token, so the weights have to come from memory at its full
// speed and be multiplied on the way, for all rows of a block at once. CPUs with AVX512_BF16 have
// an instruction for it; others widen: a 32-bit word holds two bfloat16 numbers, shifted left it is
// the first as a float, masked the second, so that takes no shuffles. All sums are floats, and all
// are made in the same order whatever the number of rows or threads: a row of a block has the same
// bits as that row alone.

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(32), may_alias));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));

#define LANES 8           // floats in a vector
#define PAIRS 16          // bfloat16 numbers in a vector of words
#define AT_ONCE 4         // rows, or queries, whose sums stay in registers
#define TOGETHER 2        // outputs, or keys, that are multiplied with them at once
#define NEAR 64           // positions whose values stay near while they are read piece by piece
#define THREAD_WORK 65536 // products that make up for waking a thread

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

// Round to nearest, ties to even; results in the low halves. Widened NaNs have no low bits, so they
// stay NaN.
static inline words narrow_all(floats wide) {
    words bits = (words)wide;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline void store(bf16 *pairs, floats evens, floats odds) {
    words both = narrow_all(evens) | narrow_all(odds) << 16;
    memcpy(pairs, &both, sizeof both);
}

static inline float total(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The total of each of 8 vectors.
ALWAYS floats totals(const floats v[LANES]) {
    floats fours[4], twos[2];
    for (int i = 0; i < 4; i++)
        fours[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
                   PICK(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        twos[i] = PICK(fours[2 * i], fours[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  PICK(fours[2 * i], fours[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return PICK(twos[0], twos[1], 0, 2, 8, 10, 4, 6, 12, 14) +
           PICK(twos[0], twos[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

static inline floats choose(ints which, floats yes, floats no) {
    return (floats)((which & (ints)yes) | (~which & (ints)no));
}

// e to the power of x within 2 units in the last place; 0 below -87, infinite above 88.
static inline floats exponential(floats x) {
    floats zero = {0}, least = zero - 87.0f, most = zero + 88.0f;
    floats magic = zero + 0x1.8p23f; // adding it rounds to whole numbers
    floats within = choose(x > most, most, choose(x < least, least, x));
    floats whole = (within * 1.44269504f + magic) - magic;
    floats rest = within - whole * 0.693359375f + whole * 2.12194440e-4f; // ln 2 in two parts
    floats sum = zero + 1.9875691500e-4f; // Cephes' polynomial
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    floats result = choose(x < least, zero, sum * (floats)power);
    return choose(x > most, zero + INFINITY, result);
}

// What a CPU multiplies at once: so many `numbers`, whose products it adds to `partials`.
#ifdef __AVX512BF16__
#define STEP 32
typedef __m512bh numbers;
typedef __m512 partials;

ALWAYS numbers narrows(const bf16 *from) { return (numbers)_mm512_loadu_si512(from); }
ALWAYS partials add_products(partials all, numbers a, numbers b) {
    return _mm512_dpbf16_ps(all, a, b);
}
ALWAYS floats folded(partials all) {
    __m256d upper = _mm512_extractf64x4_pd((__m512d)all, 1);
    return (floats)_mm512_castps512_ps256(all) + (floats)upper;
}
#else
#define STEP 16
typedef words numbers;
typedef floats partials;

ALWAYS numbers narrows(const bf16 *from) { return load(from); }
ALWAYS partials add_products(partials all, numbers a, numbers b) {
    all += even(a) * even(b);
    return all + odd(a) * odd(b);
}
ALWAYS floats folded(partials all) { return all; }
#endif

// Adds one step of rows x [rows, in] times two weights to `sums`. Here and below, `rows` is a
// constant after inlining.
ALWAYS void add_step(int rows, const bf16 *x, numbers first, numbers second,
                     partials sums[TOGETHER][AT_ONCE], long in) {
    for (int row = 0; row < rows; row++) {
        numbers some = narrows(x + row * in);
        sums[0][row] = add_products(sums[0][row], first, some);
        sums[1][row] = add_products(sums[1][row], second, some);
    }
}

ALWAYS floats totals_of(partials sums[TOGETHER][AT_ONCE]) { // [TOGETHER, AT_ONCE]
    floats all[LANES];
    for (int i = 0; i < LANES; i++) all[i] = folded(sums[i / AT_ONCE][i % AT_ONCE]);
    return totals(all);
}

// Rows x [rows, in] times the weight [in] and the one that lies `next` numbers behind: [TOGETHER,
// AT_ONCE], 0 for what is not a row. What follows the two in memory is fetched line by line, in the
// order in which it lies there.
ALWAYS floats products(int rows, const bf16 *x, const bf16 *weight, long next, long in) {
    partials sums[TOGETHER][AT_ONCE] = {0};
    for (long k = 0; k < in; k += STEP) {
        const bf16 *ahead = weight + TOGETHER * (in + k);
        for (long at = 0; at < TOGETHER * STEP; at += 32) __builtin_prefetch(ahead + at);
        add_step(rows, x + k, narrows(weight + k), narrows(weight + next + k), sums, in);
    }
    return totals_of(sums);
}

// Two outputs, or one without a `second`, for rows y [rows, out]: `sums` of products + bias +
// residual like y, both of which may be NULL.
ALWAYS void finish(int rows, floats sums, const bf16 *bias, const bf16 *residual, bf16 *y, long out,
                   int second) {
    if (bias) {
        float a = widen(bias[0]), b = widen(bias[second]);
        sums += (floats){a, a, a, a, b, b, b, b};
    }
    if (residual) {
        floats more = {0};
        for (int row = 0; row < rows; row++) {
            more[row] = widen(residual[row * out]);
            more[AT_ONCE + row] = widen(residual[row * out + second]);
        }
        sums += more;
    }
    words bits = narrow_all(sums);
    for (int row = 0; row < rows; row++) {
        y[row * out] = (bf16)bits[row];
        if (second) y[row * out + 1] = (bf16)bits[AT_ONCE + row];
    }
}

// What a weight is made of: numbers, or codes of so many bits (packed.py).
enum { CODES_4 = 4, CODES_8 = 8, NUMBERS = 16 };

#ifdef __AVX512BF16__
#define BLOCK 32         // weights that share a scale and an offset
#define GROUP 128        // weights whose codes lie together
#define PACKED_AHEAD 4096 // bytes fetched ahead

typedef struct { // lane k of the words holds the codes of weights k, k + 32, k + 64, k + 96
    uint16_t words[BLOCK];
    float scales[4], offsets[4];
} Group4;

typedef struct {
    int8_t codes[GROUP];
    float scales[4];
} Group8;

static inline long group_bytes(int bits) {
    return bits == CODES_4 ? sizeof(Group4) : sizeof(Group8);
}

static inline long packed_bytes(int bits, long in) {
    return (in + GROUP - 1) / GROUP * group_bytes(bits);
}

// Weights 32 · block to 32 · block + 31 of a group; both constants after inlining.
ALWAYS numbers unpacked(int bits, const void *group, int block) {
    if (bits == CODES_4) { // of 16 weights there may be: look each up
        const Group4 *g = group;
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 all = _mm512_fmadd_ps(codes, _mm512_set1_ps(g->scales[block]),
                                     _mm512_set1_ps(g->offsets[block]));
        __m512i table = (__m512i)_mm512_cvtne2ps_pbh(all, all); // twice: the fifth bit is anything
        __m512i words = _mm512_loadu_si512(g->words);
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * block), table);
    }
    const Group8 *g = group;
    const __m128i *codes = (const __m128i *)(g->codes + BLOCK * block);
    __m512 scale = _mm512_set1_ps(g->scales[block]);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1)));
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
}

// Adds to `sums` one block of two weights' groups.
ALWAYS void add_block(int bits, int rows, const bf16 *x, const char *groups, int block,
                      partials sums[TOGETHER][AT_ONCE], long in) {
    numbers first = unpacked(bits, groups, block);
    numbers second = unpacked(bits, groups + group_bytes(bits), block);
    add_step(rows, x + BLOCK * block, first, second, sums, in);
}

// Like products, for two weights whose groups take turns; the same bits.
ALWAYS floats packed_products(int bits, int rows, const bf16 *x, const char *weight, long in) {
    long bytes = TOGETHER * group_bytes(bits), k = 0;
    partials sums[TOGETHER][AT_ONCE] = {0};
    for (; k + GROUP <= in; k += GROUP, weight += bytes) {
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch(weight + PACKED_AHEAD + at);
        add_block(bits, rows, x + k, weight, 0, sums, in);
        add_block(bits, rows, x + k, weight, 1, sums, in);
        add_block(bits, rows, x + k, weight, 2, sums, in);
        add_block(bits, rows, x + k, weight, 3, sums, in);
    }
    if (k < in) add_block(bits, rows, x + k, weight, 0, sums, in);
    if (k + BLOCK < in) add_block(bits, rows, x + k, weight, 1, sums, in);
    if (k + 2 * BLOCK < in) add_block(bits, rows, x + k, weight, 2, sums, in);
    return totals_of(sums);
}

ALWAYS void unpack_row(int bits, const char *weight, bf16 *y, long in) {
    for (long k = 0; k < in; k += GROUP, weight += 2 * group_bytes(bits)) {
        if (k < in) _mm512_storeu_si512(y + k, (__m512i)unpacked(bits, weight, 0));
        if (k + 32 < in) _mm512_storeu_si512(y + k + 32, (__m512i)unpacked(bits, weight, 1));
        if (k + 64 < in) _mm512_storeu_si512(y + k + 64, (__m512i)unpacked(bits, weight, 2));
        if (k + 96 < in) _mm512_storeu_si512(y + k + 96, (__m512i)unpacked(bits, weight, 3));
    }
}

// y [out, in] = the numbers of a packed weight.
void unpack(const char *weight, int bits, bf16 *y, long in, long out, int threads) {
    long bytes = packed_bytes(bits, in);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j++) {
        const char *w = weight + j / 2 * 2 * bytes + j % 2 * group_bytes(bits);
        if (bits == CODES_4) unpack_row(CODES_4, w, y + j * in, in);
        else unpack_row(CODES_8, w, y + j * in, in);
    }
}

int packs(void) { return 1; }

static inline long weight_bytes(int bits, long in) {
    return bits == NUMBERS ? 2 * in : packed_bytes(bits, in);
}

// Products with weights of any kind, the next of which lies `next` numbers behind.
ALWAYS floats any_products(int rows, const bf16 *x, const void *weight, int bits, long next,
                           long in) {
    if (bits == CODES_4) return packed_products(CODES_4, rows, x, weight, in);
    if (bits == CODES_8) return packed_products(CODES_8, rows, x, weight, in);
    return products(rows, x, weight, next, in);
}
#else // there are numbers only
void unpack(const char *weight, int bits, bf16 *y, long in, long out, int threads) {}
int packs(void) { return 0; }
static inline long weight_bytes(int bits, long in) { return 2 * in; }
ALWAYS floats any_products(int rows, const bf16 *x, const void *weight, int bits, long next,
                           long in) {
    return products(rows, x, weight, next, in);
}
#endif

// Two outputs, or one, of `rows` (a constant after inlining) rows x [rows, in]; see linear.
ALWAYS void outputs(int rows, const bf16 *x, const void *weight, int bits, const bf16 *bias,
                    const bf16 *residual, bf16 *y, long in, long out, int second) {
    floats sums = any_products(rows, x, weight, bits, in * second, in);
    finish(rows, sums, bias, residual, y, out, second);
}

// y [rows, out] = x [rows, in] · weight [out, in] transposed + bias [out] + residual [rows, out],
// both of which may be NULL. `in` is a multiple of 32. `bits` say what the weight is made of.
void linear(const bf16 *x, const void *weight, int bits, const bf16 *bias, const bf16 *residual,
            bf16 *y, long rows, long in, long out, int threads) {
    long bytes = weight_bytes(bits, in);
    if (in * out < THREAD_WORK) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j += TOGETHER) {
        const char *w = (const char *)weight + j * bytes;
        const bf16 *b = bias ? bias + j : NULL;
        int second = j + 1 < out;
        for (long row = 0; row < rows; row += AT_ONCE) {
            const bf16 *from = x + row * in, *add = residual ? residual + row * out + j : NULL;
            bf16 *to = y + row * out + j;
            switch (rows - row) {
            case 1: outputs(1, from, w, bits, b, add, to, in, out, second); break;
            case 2: outputs(2, from, w, bits, b, add, to, in, out, second); break;
            case 3: outputs(3, from, w, bits, b, add, to, in, out, second); break;
            default: outputs(AT_ONCE, from, w, bits, b, add, to, in, out, second);
            }
        }
    }
}

// y = x / rms(x) · weight, for rows of `size` numbers, a multiple of 16; y may be x.
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, long rows, long size, float eps) {
    for (long row = 0; row < rows; row++, x += size, y += size) {
        floats sum = {0};
        for (long k = 0; k < size; k += PAIRS) {
            words both = load(x + k);
            sum += even(both) * even(both) + odd(both) * odd(both);
        }
        float scale = 1.0f / sqrtf(total(sum) / (float)size + eps);
        for (long k = 0; k < size; k += PAIRS) {
            words both = load(x + k), by = load(weight + k);
            store(y + k, even(both) * scale * even(by), odd(both) * scale * odd(by));
        }
    }
}

// y [rows, size] = silu(gate) · up, for rows [gate, up] of twice `size`, a multiple of 16.
static void gate(const bf16 *gate_up, bf16 *y, long rows, long size) {
    for (long row = 0; row < rows; row++, gate_up += 2 * size, y += size)
        for (long k = 0; k < size; k += PAIRS) {
            words gates = load(gate_up + k), ups = load(gate_up + size + k);
            floats e = even(gates), o = odd(gates);
            e = e / (1.0f + exponential(-e));
            o = o / (1.0f + exponential(-o));
            store(y + k, e * even(ups), o * odd(ups));
        }
}

// Rotary embedding of x [heads, size] by cos and signed sin [size], half a multiple of 16; the
// heads of y lie `apart`.
static void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long heads, long size,
                   long apart) {
    long half = size / 2;
    for (long head = 0; head < heads; head++, x += size, y += apart)
        for (long k = 0; k < size; k += PAIRS) {
            words a = load(x + k), b = load(k < half ? x + k + half : x + k - half);
            words c = load(cos + k), s = load(sin + k);
            store(y + k, even(a) * even(c) + even(b) * even(s), odd(a) * odd(c) + odd(b) * odd(s));
        }
}

// Up to AT_ONCE queries of the same keys and values [T, size].
typedef struct {
    const bf16 *q, *keys, *values; // q [n, size], size a multiple of 32
    bf16 *y[AT_ONCE];              // each [size]
    long size, seen[AT_ONCE];      // positions that each query sees; none sees less than the first
    float *weights;                // [T rounded up to an even number, AT_ONCE]: what it gives each
    floats *sums;                  // [n, size] to work in
} Queries;

// Weights of n queries, a constant after inlining: e to the power of q · key / √size less the
// largest. Gives what makes each query's sum 1.
ALWAYS floats weigh(int n, const Queries *queries) {
    const Queries s = *queries;
    long end = s.seen[n - 1], many = (end + 1) / TOGETHER;
    float scale = 1.0f / sqrtf((float)s.size);
    floats *pairs = (floats *)s.weights, largest = (floats){0} - INFINITY, all = {0};
    for (long t = 0; t < end; t += TOGETHER) {
        long next = t + 1 < end ? s.size : 0;
        pairs[t / TOGETHER] = products(n, s.q, s.keys + t * s.size, next, s.size) * scale;
    }
    for (int i = 0; i < n; i++)
        for (long t = s.seen[i]; t < many * TOGETHER; t++) s.weights[t * AT_ONCE + i] = -INFINITY;
    for (long k = 0; k < many; k++) largest = choose(pairs[k] > largest, pairs[k], largest);
    floats other = PICK(largest, largest, 4, 5, 6, 7, 0, 1, 2, 3);
    largest = choose(other > largest, other, largest);
    for (long k = 0; k < many; k++) all += pairs[k] = exponential(pairs[k] - largest);
    return 1.0f / (all + PICK(all, all, 4, 5, 6, 7, 0, 1, 2, 3));
}

// Adds to n queries' `sums`, each [size], what they give values [T, size] from position t to `end`,
// `vectors` of words of each; n and `vectors` are constants after inlining.
ALWAYS void mix(int n, int vectors, long size, const bf16 *values, const float *weights, long t,
                long end, floats *sums) {
    long apart = size / LANES;
    floats all[AT_ONCE][4];
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 2 * vectors; v++) all[i][v] = sums[i * apart + v];
    for (; t < end; t++)
        for (int v = 0; v < vectors; v++) {
            words both = load(values + t * size + v * PAIRS);
            for (int i = 0; i < n; i++) {
                all[i][2 * v] += even(both) * weights[t * AT_ONCE + i];
                all[i][2 * v + 1] += odd(both) * weights[t * AT_ONCE + i];
            }
        }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 2 * vectors; v++) sums[i * apart + v] = all[i][v];
}

// Attention of n queries, a constant after inlining.
ALWAYS void attend(int n, const Queries *queries) {
    const Queries s = *queries;
    const int vectors = n > 2 ? 1 : 2;
    floats *sums = s.sums, share = weigh(n, queries);
    memset(sums, 0, n * s.size * sizeof *s.weights);
    for (long t = 0; t < s.seen[0]; t += NEAR)
        for (long k = 0; k < s.size; k += vectors * PAIRS)
            mix(n, vectors, s.size, s.values + k, s.weights, t, least(t + NEAR, s.seen[0]),
                sums + k / LANES);
    for (int i = 0; i < n; i++, sums += s.size / LANES) {
        for (long k = 0; k < s.size; k += PAIRS) {
            // Alone, as a later row's value, if not a number, times 0 were none.
            mix(1, 1, s.size, s.values + k, s.weights + i, s.seen[0], s.seen[i], sums + k / LANES);
            store(s.y[i] + k, sums[k / LANES] * share[i], sums[k / LANES + 1] * share[i]);
        }
    }
}

typedef struct { // as in layers.py, whose order of fields this is; biases and last two may be NULL
    const bf16 *input_norm;
    const void *qkv, *o;
    const bf16 *post_norm;
    const void *gate_up, *down;
    const bf16 *qkv_bias, *o_bias, *gate_up_bias, *down_bias, *q_norm, *k_norm;
    intptr_t qkv_bits, o_bits, gate_up_bits, down_bits;
} Weights;

typedef struct {
    long rows, position, hidden, heads, groups, size, inner;
    long capacity; // positions that keys and values have room for
    float eps;
    int threads;
} Shape;

// The next `bytes` of a work space, aligned.
static void *take(char **space, long bytes) {
    char *start = *space;
    *space += (bytes + 63) / 64 * 64;
    return start;
}

static inline long work_floats(const Shape *shape) { // of a thread, for AT_ONCE queries
    long end = shape->position + shape->rows;
    return AT_ONCE * (shape->size + (end + 1) / TOGETHER * TOGETHER);
}

// Attention of queries q [groups, rows, heads of a group, size]; y [rows, heads, size]. Each thread
// has work_floats in `work`.
static void attention(const Shape *shape, const bf16 *q, const bf16 *keys, const bf16 *values,
                      bf16 *y, float *work) {
    const Shape s = *shape;
    long end = s.position + s.rows, shared = s.heads / s.groups, queries = s.rows * shared;
    long tiles = (queries + AT_ONCE - 1) / AT_ONCE, entered = 0;
    int threads = s.heads * end * s.size < THREAD_WORK ? 1 : s.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long thread; // counted, as omp.h may be missing where the pragmas work
#pragma omp atomic capture
        thread = entered++;
#pragma omp for schedule(static)
        for (long tile = 0; tile < s.groups * tiles; tile++) {
            long group = tile / tiles, first = tile % tiles * AT_ONCE;
            long apart = group * s.capacity * s.size, n = least(AT_ONCE, queries - first);
            Queries some = {.q = q + (group * queries + first) * s.size,
                            .keys = keys + apart,
                            .values = values + apart,
                            .size = s.size,
                            .sums = (floats *)(work + thread * work_floats(shape))};
            some.weights = (float *)some.sums + AT_ONCE * s.size;
            for (long i = 0; i < n; i++) {
                long row = (first + i) / shared, head = group * shared + (first + i) % shared;
                some.seen[i] = s.position + row + 1;
                some.y[i] = y + (row * s.heads + head) * s.size;
            }
            switch (n) {
            case 1: attend(1, &some); break;
            case 2: attend(2, &some); break;
            case 3: attend(3, &some); break;
            default: attend(AT_ONCE, &some);
            }
        }
    }
}

// One layer of `shape` for rows x [rows, hidden] that begin at `position`, whose cosines and sines
// are cos and sin [rows, size]; writes y like x, and keys and values [groups, capacity, size].
// Returns 0, or 1 where there is no memory.
int decoder_layer(const bf16 *x, bf16 *y, const Weights *w, const Shape *shape, const bf16 *cos,
                  const bf16 *sin, bf16 *keys, bf16 *values) {
    const Shape s = *shape;
    long shared = s.heads / s.groups, all_heads = s.heads + 2 * s.groups;
    long q_size = s.heads * s.size, apart = s.capacity * s.size;
    long of_a_row = s.hidden + (all_heads + 2 * s.heads) * s.size + 3 * s.inner;
    long bytes = 2 * s.rows * of_a_row + 4 * s.threads * work_floats(shape) + 64 * 8;
    char *block = aligned_alloc(64, (bytes + 63) / 64 * 64), *space = block;
    if (!block) return 1;
    bf16 *normed = take(&space, 2 * s.rows * s.hidden);
    bf16 *qkv = take(&space, 2 * s.rows * all_heads * s.size);
    bf16 *q = take(&space, 2 * s.rows * q_size);
    bf16 *attended = take(&space, 2 * s.rows * q_size);
    bf16 *gate_up = take(&space, 4 * s.rows * s.inner);
    bf16 *gated = take(&space, 2 * s.rows * s.inner);
    float *work = take(&space, 4 * s.threads * work_floats(shape));

    rms_norm(x, w->input_norm, normed, s.rows, s.hidden, s.eps);
    linear(normed, w->qkv, w->qkv_bits, w->qkv_bias, NULL, qkv, s.rows, s.hidden,
           all_heads * s.size, s.threads);
    for (long row = 0; row < s.rows; row++) {
        bf16 *new = qkv + row * all_heads * s.size, *k = new + q_size, *v = k + s.groups * s.size;
        if (w->q_norm) rms_norm(new, w->q_norm, new, s.heads, s.size, s.eps);
        if (w->k_norm) rms_norm(k, w->k_norm, k, s.groups, s.size, s.eps);
        const bf16 *c = cos + row * s.size, *sn = sin + row * s.size;
        long at = (s.position + row) * s.size;
        rotate(k, c, sn, keys + at, s.groups, s.size, apart);
        for (long group = 0; group < s.groups; group++) {
            bf16 *to = q + (group * s.rows + row) * shared * s.size;
            rotate(new + group * shared * s.size, c, sn, to, shared, s.size, s.size);
            memcpy(values + group * apart + at, v + group * s.size, 2 * s.size);
        }
    }
    attention(shape, q, keys, values, attended, work);
    linear(attended, w->o, w->o_bits, w->o_bias, x, y, s.rows, q_size, s.hidden, s.threads);
    rms_norm(y, w->post_norm, normed, s.rows, s.hidden, s.eps);
    linear(normed, w->gate_up, w->gate_up_bits, w->gate_up_bias, NULL, gate_up, s.rows, s.hidden,
           2 * s.inner, s.threads);
    gate(gate_up, gated, s.rows, s.inner);
    linear(gated, w->down, w->down_bits, w->down_bias, y, y, s.rows, s.inner, s.hidden, s.threads);
    free(block);
    return 0;
}
