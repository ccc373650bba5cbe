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
#define AT_ONCE 4         // rows whose sums stay in registers
#define AHEAD 640         // weights fetched ahead: 1,280 bytes
#define THREAD_WORK 65536 // products that make up for waking a thread

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

// Round to nearest, ties to even. Widened NaNs have no low bits, so they stay NaN.
static inline bf16 narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline words narrow_all(floats wide) { // results in the low halves
    words bits = (words)wide;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline void store(bf16 *pairs, floats evens, floats odds) {
    words both = narrow_all(evens) | narrow_all(odds) << 16;
    memcpy(pairs, &both, sizeof both);
}

static inline float total(floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
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

// Evens and odds of each vector of words apart, as dot wants its x.
static void widen_all(const bf16 *x, float *wide, long n) {
    for (long k = 0; k < n; k += PAIRS) {
        words both = load(x + k);
        *(floats *)(wide + k) = even(both);
        *(floats *)(wide + k + LANES) = odd(both);
    }
}

#ifdef __AVX512BF16__
typedef bf16 factor; // what weights are multiplied with: rows as they are

static inline const factor *factors(const bf16 *x, float *wide, long n) {
    (void)wide, (void)n;
    return x;
}

static inline __m512bh narrows(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

// sums [rows] = x [rows, in] · weight [in]; `rows` is a constant after inlining.
static inline __attribute__((always_inline)) void dots(int rows, const factor *x,
                                                       const bf16 *weight, float *sums, long in) {
    __m512 parts[AT_ONCE];
    for (int row = 0; row < rows; row++) parts[row] = _mm512_setzero_ps();
    for (long k = 0; k < in; k += 2 * PAIRS) {
        __builtin_prefetch(weight + k + AHEAD);
        __m512bh some = narrows(weight + k);
        for (int row = 0; row < rows; row++)
            parts[row] = _mm512_dpbf16_ps(parts[row], some, narrows(x + row * in + k));
    }
    for (int row = 0; row < rows; row++) sums[row] = _mm512_reduce_add_ps(parts[row]);
}
#else
typedef float factor; // rows as widen_all leaves them

static inline const factor *factors(const bf16 *x, float *wide, long n) {
    widen_all(x, wide, n);
    return wide;
}

// sums [rows] = x [rows, in] · weight [in]; `rows` is a constant after inlining.
static inline __attribute__((always_inline)) void dots(int rows, const factor *x,
                                                       const bf16 *weight, float *sums, long in) {
    floats parts[AT_ONCE][2] = {0};
    for (long k = 0; k < in; k += 2 * PAIRS) {
        __builtin_prefetch(weight + k + AHEAD);
        for (long at = k; at < k + 2 * PAIRS; at += PAIRS) {
            words both = load(weight + at);
            for (int row = 0; row < rows; row++) {
                const floats *xs = (const floats *)(x + row * in + at);
                parts[row][0] += even(both) * xs[0];
                parts[row][1] += odd(both) * xs[1];
            }
        }
    }
    for (int row = 0; row < rows; row++) sums[row] = total(parts[row][0] + parts[row][1]);
}
#endif

// One output for each of `rows` (a constant after inlining) rows x [rows, in].
static inline __attribute__((always_inline)) void dot(int rows, const factor *x,
                                                      const bf16 *weight, float bias,
                                                      const bf16 *residual, bf16 *y, long in,
                                                      long out) {
    float sums[AT_ONCE];
    dots(rows, x, weight, sums, in);
    for (int row = 0; row < rows; row++) {
        float sum = sums[row] + bias;
        y[row * out] = narrow(residual ? sum + widen(residual[row * out]) : sum);
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

// Weights 32 · block to 32 · block + 31 of a group; both constants after inlining.
static inline __attribute__((always_inline)) __m512bh unpacked(int bits, const void *group,
                                                               int block) {
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

// Adds the products of one block of two weights' groups.
static inline __attribute__((always_inline)) void add_block(int bits, int rows, const bf16 *x,
                                                            const char *groups, int block,
                                                            __m512 parts[2][AT_ONCE], long in) {
    for (int of = 0; of < 2; of++) {
        __m512bh some = unpacked(bits, groups + of * group_bytes(bits), block);
        for (int row = 0; row < rows; row++)
            parts[of][row] = _mm512_dpbf16_ps(parts[of][row], some,
                                              narrows(x + row * in + BLOCK * block));
    }
}

// Like dot, for two outputs whose packed weights take turns; the same bits.
static inline __attribute__((always_inline)) void packed_dot(int bits, int rows, const bf16 *x,
                                                             const char *weight, const bf16 *bias,
                                                             const bf16 *residual, bf16 *y,
                                                             long in, long out) {
    long bytes = 2 * group_bytes(bits), k = 0;
    __m512 parts[2][AT_ONCE];
    for (int row = 0; row < rows; row++) parts[0][row] = parts[1][row] = _mm512_setzero_ps();
    for (; k + GROUP <= in; k += GROUP, weight += bytes) {
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch(weight + PACKED_AHEAD + at);
        add_block(bits, rows, x + k, weight, 0, parts, in);
        add_block(bits, rows, x + k, weight, 1, parts, in);
        add_block(bits, rows, x + k, weight, 2, parts, in);
        add_block(bits, rows, x + k, weight, 3, parts, in);
    }
    if (k < in) add_block(bits, rows, x + k, weight, 0, parts, in);
    if (k + BLOCK < in) add_block(bits, rows, x + k, weight, 1, parts, in);
    if (k + 2 * BLOCK < in) add_block(bits, rows, x + k, weight, 2, parts, in);
    for (int of = 0; of < 2; of++)
        for (int row = 0; row < rows; row++) {
            float sum = _mm512_reduce_add_ps(parts[of][row]) + (bias ? widen(bias[of]) : 0);
            long at = row * out + of;
            y[at] = narrow(residual ? sum + widen(residual[at]) : sum);
        }
}

static inline __attribute__((always_inline)) void packed_linear(
    int bits, const bf16 *x, const char *weight, const bf16 *bias, const bf16 *residual, bf16 *y,
    long rows, long in, long out, int threads) {
    long bytes = (in + GROUP - 1) / GROUP * group_bytes(bits);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j += 2) {
        const char *w = weight + j * bytes;
        const bf16 *b = bias ? bias + j : NULL;
        for (long row = 0; row < rows; row += AT_ONCE) {
            const bf16 *from = x + row * in, *add = residual ? residual + row * out + j : NULL;
            bf16 *to = y + row * out + j;
            switch (rows - row) {
            case 1: packed_dot(bits, 1, from, w, b, add, to, in, out); break;
            case 2: packed_dot(bits, 2, from, w, b, add, to, in, out); break;
            case 3: packed_dot(bits, 3, from, w, b, add, to, in, out); break;
            default: packed_dot(bits, AT_ONCE, from, w, b, add, to, in, out);
            }
        }
    }
}

static inline __attribute__((always_inline)) void unpack_row(int bits, const char *weight, bf16 *y,
                                                             long in) {
    for (long k = 0; k < in; k += GROUP, weight += 2 * group_bytes(bits)) {
        if (k < in) _mm512_storeu_si512(y + k, (__m512i)unpacked(bits, weight, 0));
        if (k + 32 < in) _mm512_storeu_si512(y + k + 32, (__m512i)unpacked(bits, weight, 1));
        if (k + 64 < in) _mm512_storeu_si512(y + k + 64, (__m512i)unpacked(bits, weight, 2));
        if (k + 96 < in) _mm512_storeu_si512(y + k + 96, (__m512i)unpacked(bits, weight, 3));
    }
}

// y [out, in] = the numbers of a packed weight.
void unpack(const char *weight, int bits, bf16 *y, long in, long out, int threads) {
    long bytes = (in + GROUP - 1) / GROUP * group_bytes(bits);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j++) {
        const char *w = weight + j / 2 * 2 * bytes + j % 2 * group_bytes(bits);
        if (bits == CODES_4) unpack_row(CODES_4, w, y + j * in, in);
        else unpack_row(CODES_8, w, y + j * in, in);
    }
}

int packs(void) { return 1; }
#else
void unpack(const char *weight, int bits, bf16 *y, long in, long out, int threads) {}
int packs(void) { return 0; }
#endif

// y [rows, out] = x [rows, in] · weight [out, in] transposed + bias [out] + residual [rows, out],
// both of which may be NULL. `in` is a multiple of 32; `wide` are rows · in floats to work in,
// aligned to 32 bytes. `bits` say what the weight is made of.
void linear(const bf16 *x, const void *weight, int bits, const bf16 *bias, const bf16 *residual,
            bf16 *y, float *wide, long rows, long in, long out, int threads) {
    if (in * out < THREAD_WORK) threads = 1;
#ifdef __AVX512BF16__
    if (bits == CODES_4) {
        packed_linear(CODES_4, x, weight, bias, residual, y, rows, in, out, threads);
        return;
    }
    if (bits == CODES_8) {
        packed_linear(CODES_8, x, weight, bias, residual, y, rows, in, out, threads);
        return;
    }
#endif
    const factor *all = factors(x, wide, rows * in);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long j = 0; j < out; j++) {
        const bf16 *w = (const bf16 *)weight + j * in;
        float b = bias ? widen(bias[j]) : 0;
        for (long row = 0; row < rows; row += AT_ONCE) {
            const factor *from = all + row * in;
            const bf16 *add = residual ? residual + row * out + j : NULL;
            bf16 *to = y + row * out + j;
            switch (rows - row) {
            case 1: dot(1, from, w, b, add, to, in, out); break;
            case 2: dot(2, from, w, b, add, to, in, out); break;
            case 3: dot(3, from, w, b, add, to, in, out); break;
            default: dot(AT_ONCE, from, w, b, add, to, in, out);
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

// Attention of one query `q` [size], a multiple of 32, over `seen` keys and values. `wide` are `size`
// floats to work in, `scores` are `seen`, rounded up to whole vectors.
static void attend(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *y, float *scores,
                   float *wide, long size, long seen) {
    widen_all(q, wide, size);
    float scale = 1.0f / sqrtf((float)size), largest = -INFINITY;
    for (long t = 0; t < seen; t++) {
        floats sum = {0};
        for (long k = 0; k < size; k += PAIRS) {
            words both = load(keys + t * size + k);
            const floats *qs = (const floats *)(wide + k);
            sum += even(both) * qs[0] + odd(both) * qs[1];
        }
        scores[t] = total(sum) * scale;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    for (long t = seen; t % LANES; t++) scores[t] = -INFINITY;
    floats all = {0};
    for (long t = 0; t < seen; t += LANES) {
        floats *some = (floats *)(scores + t);
        *some = exponential(*some - largest);
        all += *some;
    }
    float share = 1.0f / total(all);
    for (long k = 0; k < size; k += 2 * PAIRS) {
        floats sums[4] = {0};
        for (long t = 0; t < seen; t++) {
            const bf16 *value = values + t * size + k;
            words first = load(value), second = load(value + PAIRS);
            sums[0] += even(first) * scores[t];
            sums[1] += odd(first) * scores[t];
            sums[2] += even(second) * scores[t];
            sums[3] += odd(second) * scores[t];
        }
        store(y + k, sums[0] * share, sums[1] * share);
        store(y + k + PAIRS, sums[2] * share, sums[3] * share);
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

static inline long most(long a, long b) { return a > b ? a : b; }

// The next `bytes` of a work space, aligned.
static void *take(char **space, long bytes) {
    char *start = *space;
    *space += (bytes + 63) / 64 * 64;
    return start;
}

// One layer of `shape` for rows x [rows, hidden] that begin at `position`, whose cosines and sines
// are cos and sin [rows, size]; writes y like x, and keys and values [groups, capacity, size].
// Returns 0, or 1 where there is no memory.
int decoder_layer(const bf16 *x, bf16 *y, const Weights *w, const Shape *shape, const bf16 *cos,
                  const bf16 *sin, bf16 *keys, bf16 *values) {
    const Shape s = *shape;
    long all_heads = s.heads + 2 * s.groups, end = s.position + s.rows;
    long q_size = s.heads * s.size, apart = s.capacity * s.size;
    long each = s.size + (end + LANES - 1) / LANES * LANES; // floats that a query head works in
    long widest = most(most(s.hidden, s.inner), q_size);
    long numbers = s.hidden + (all_heads + 2 * s.heads) * s.size + 3 * s.inner;
    long bytes = s.rows * (2 * numbers + 4 * widest) + 4 * each * s.heads + 64 * 16;
    char *block = aligned_alloc(64, (bytes + 63) / 64 * 64), *space = block;
    if (!block) return 1;
    bf16 *normed = take(&space, 2 * s.rows * s.hidden);
    bf16 *qkv = take(&space, 2 * s.rows * all_heads * s.size);
    bf16 *q = take(&space, 2 * s.rows * q_size);
    bf16 *attended = take(&space, 2 * s.rows * q_size);
    bf16 *gate_up = take(&space, 4 * s.rows * s.inner);
    bf16 *gated = take(&space, 2 * s.rows * s.inner);
    float *wide = take(&space, 4 * s.rows * widest);
    float *work = take(&space, 4 * each * s.heads);

    rms_norm(x, w->input_norm, normed, s.rows, s.hidden, s.eps);
    linear(normed, w->qkv, w->qkv_bits, w->qkv_bias, NULL, qkv, wide, s.rows, s.hidden,
           all_heads * s.size, s.threads);
    for (long row = 0; row < s.rows; row++) {
        bf16 *new = qkv + row * all_heads * s.size, *k = new + q_size, *v = k + s.groups * s.size;
        if (w->q_norm) rms_norm(new, w->q_norm, new, s.heads, s.size, s.eps);
        if (w->k_norm) rms_norm(k, w->k_norm, k, s.groups, s.size, s.eps);
        const bf16 *c = cos + row * s.size, *sn = sin + row * s.size;
        long at = (s.position + row) * s.size;
        rotate(new, c, sn, q + row * q_size, s.heads, s.size, s.size);
        rotate(k, c, sn, keys + at, s.groups, s.size, apart);
        for (long group = 0; group < s.groups; group++)
            memcpy(values + group * apart + at, v + group * s.size, 2 * s.size);
    }
    int threads = s.heads * end * s.size < THREAD_WORK ? 1 : s.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long head = 0; head < s.heads; head++) {
        long group = head / (s.heads / s.groups) * apart, at = head * s.size;
        float *mine = work + head * each;
        for (long row = 0; row < s.rows; row++, at += q_size)
            attend(q + at, keys + group, values + group, attended + at, mine + s.size, mine, s.size,
                   s.position + row + 1);
    }
    linear(attended, w->o, w->o_bits, w->o_bias, x, y, wide, s.rows, q_size, s.hidden, s.threads);
    rms_norm(y, w->post_norm, normed, s.rows, s.hidden, s.eps);
    linear(normed, w->gate_up, w->gate_up_bits, w->gate_up_bias, NULL, gate_up, wide, s.rows,
           s.hidden, 2 * s.inner, s.threads);
    gate(gate_up, gated, s.rows, s.inner);
    linear(gated, w->down, w->down_bits, w->down_bias, y, y, wide, s.rows, s.inner, s.hidden,
           s.threads);
    free(block);
    return 0;
}
