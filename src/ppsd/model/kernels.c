// A decoder layer for a few bfloat16 rows.
//
// Decoding reads every weight once a token, so the weights have to come from memory at its full
// speed and be multiplied on the way, for all rows of a block at once (products.h). A row of a block
// has the same bits as that row alone.

#include "products.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>

#define NEAR 64         // positions whose values stay near while they are read piece by piece
#define KEYS_AHEAD 1024 // numbers fetched ahead
#define SEARCHED 256    // numbers, among which the largest is then looked for

static inline void store(bf16 *pairs, floats evens, floats odds) {
    words both = narrow_all(evens) | narrow_all(odds) << 16;
    memcpy(pairs, &both, sizeof both);
}

// The bits of x as a number in the order of the x: both zeros are 0, infinities ±INFINITE, and NaNs
// lie beyond them.
#define INFINITE 0x7f80
static inline int16_t ordered(bf16 x) {
    int16_t size = x & 0x7fff;
    return x & 0x8000 ? -size : size;
}

// Whether all n numbers are finite.
int all_finite(const bf16 *x, long n) {
    int16_t most = 0;
    for (long i = 0; i < n; i++) {
        int16_t size = x[i] & 0x7fff;
        most = size > most ? size : most;
    }
    return most < INFINITE;
}

// Where the largest of n numbers stands, the first of equals; -1 where it is not finite or one is
// NaN.
long largest(const bf16 *x, long n) {
    int16_t most = -INFINITE, least = 0;
    long block = 0;
    for (long start = 0; start < n; start += SEARCHED) {
        int16_t high = INT16_MIN, end = start + SEARCHED < n ? SEARCHED : n - start;
        for (long i = 0; i < end; i++) {
            int16_t one = ordered(x[start + i]);
            high = one > high ? one : high;
            least = one < least ? one : least;
        }
        if (high > most) most = high, block = start;
    }
    if (most == -INFINITE || most >= INFINITE || least < -INFINITE) return -1;
    while (ordered(x[block]) != most) block++;
    return block;
}

static inline float total(floats v) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
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

// y = x / rms(x) · weight, for rows of `size` numbers, a multiple of 32; y may be x.
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

// y = x, divided by its rms and times `norm` where that is not NULL, times `weight` as in linear.
// Returns 0, or 1 where there is no memory.
int product(const bf16 *x, const bf16 *norm, float eps, const void *weight, int kind,
            const bf16 *bias, bf16 *y, long rows, long in, long out, int threads) {
    bf16 *normed = norm ? malloc(2 * rows * in) : NULL;
    if (norm && !normed) return 1;
    if (norm) rms_norm(x, norm, normed, rows, in, eps);
    linear(norm ? normed : x, weight, kind, bias, NULL, y, rows, in, out, threads);
    free(normed);
    return 0;
}

// y [rows, size] = silu(gate) · up, for rows [gate, up] of twice `size`, a multiple of 32.
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

// Rotary embedding of x [heads, size] by cos and signed sin [size]; the heads of y lie `apart`.
static void rotate(const bf16 *restrict x, const bf16 *restrict cos, const bf16 *restrict sin,
                   bf16 *restrict y, long heads, long size, long apart) {
    long half = size / 2;
    for (long head = 0; head < heads; head++, x += size, y += apart)
        for (long k = 0; k < half; k++) {
            float a = widen(x[k]), b = widen(x[k + half]);
            y[k] = narrow(a * widen(cos[k]) + b * widen(sin[k]));
            y[k + half] = narrow(b * widen(cos[k + half]) + a * widen(sin[k + half]));
        }
}

// Up to AT_ONCE queries of the same keys and values [T, size]: those below `split`, and later ones
// in the tails. Which lie where does not change a bit.
typedef struct {
    const bf16 *q, *keys, *values; // q [n, size], size a multiple of 32
    const bf16 *tail_keys, *tail_values;
    long split;                    // a multiple of TOGETHER
    bf16 *y[AT_ONCE];              // each [size]
    long size, seen[AT_ONCE];      // positions that each query sees; none sees less than the first
    float *weights;                // [T rounded up, AT_ONCE]: what it gives each
    floats *sums;                  // [n, size] to work in
} Queries;

// The keys or values from position t on.
static inline const bf16 *from(long t, const Queries *s, const bf16 *whole, const bf16 *tail) {
    return t < s->split ? whole + t * s->size : tail + (t - s->split) * s->size;
}

static inline long rounded_up(long keys) { return (keys + TOGETHER - 1) / TOGETHER * TOGETHER; }

// Weights of n queries, a constant after inlining: e to the power of q · key / √size less the
// largest. Writes what makes each query's sum 1 to `share`.
ALWAYS void weigh(int n, const Queries *queries, float share[AT_ONCE]) {
    const Queries s = *queries;
    long end = s.seen[n - 1], room = rounded_up(end), many = room / TOGETHER;
    float scale = 1.0f / sqrtf((float)s.size);
    floats *tiles = (floats *)s.weights, largest = (floats){0} - INFINITY, all = {0};
    for (long t = 0; t < end; t += TOGETHER) {
        partials sums[TOGETHER][AT_ONCE] = {0};
        const bf16 *keys = from(t, &s, s.keys, s.tail_keys);
        fetch(from(t, &s, s.values, s.tail_values), TOGETHER * s.size); // for `mix`
        add_all(n, s.q, keys, least(TOGETHER, end - t), s.size, KEYS_AHEAD, sums);
        tiles[t / TOGETHER] = totals_by_output(sums) * scale;
    }
    for (int i = 0; i < n; i++)
        for (long t = s.seen[i]; t < room; t++) s.weights[t * AT_ONCE + i] = -INFINITY;
    for (long k = 0; k < many; k++) largest = choose(tiles[k] > largest, tiles[k], largest);
    for (int i = AT_ONCE; i < LANES; i++)
        if (largest[i] > largest[i % AT_ONCE]) largest[i % AT_ONCE] = largest[i];
    for (int i = AT_ONCE; i < LANES; i++) largest[i] = largest[i % AT_ONCE];
    for (long k = 0; k < many; k++) all += tiles[k] = exponential(tiles[k] - largest);
    for (int i = AT_ONCE; i < LANES; i++) all[i % AT_ONCE] += all[i];
    for (int i = 0; i < AT_ONCE; i++) share[i] = 1.0f / all[i];
}

// Adds to n queries' `sums`, each [size], what they give `count` values [count, size], `vectors` of
// words of each; n and `vectors` are constants after inlining.
ALWAYS void mix(int n, int vectors, long size, const bf16 *values, const float *weights, long count,
                floats *sums) {
    long apart = size / LANES;
    floats all[AT_ONCE][4];
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 2 * vectors; v++) all[i][v] = sums[i * apart + v];
    for (long t = 0; t < count; t++)
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
    const int roomy = LANES == 16 || n <= 2; // there are registers for two vectors' sums
    float share[AT_ONCE];
    floats *sums = s.sums;
    weigh(n, queries, share);
    memset(sums, 0, n * s.size * sizeof *s.weights);
    for (long t = 0, count; t < s.seen[0]; t += count) {
        const bf16 *values = from(t, &s, s.values, s.tail_values);
        const float *weights = s.weights + t * AT_ONCE;
        count = least(NEAR, (t < s.split ? least(s.split, s.seen[0]) : s.seen[0]) - t);
        for (long k = 0, vectors; k < s.size; k += vectors * PAIRS) {
            vectors = roomy && k + 2 * PAIRS <= s.size ? 2 : 1;
            if (vectors == 2) mix(n, 2, s.size, values + k, weights, count, sums + k / LANES);
            else mix(n, 1, s.size, values + k, weights, count, sums + k / LANES);
        }
    }
    for (int i = 0; i < n; i++, sums += s.size / LANES) {
        long more = s.seen[i] - s.seen[0]; // none in trees, whose queries are of one row
        const bf16 *values = s.values + s.seen[0] * s.size;
        for (long k = 0; k < s.size; k += PAIRS) {
            // Alone, as a later row's value, if not a number, times 0 were none.
            mix(1, 1, s.size, values + k, s.weights + s.seen[0] * AT_ONCE + i, more,
                sums + k / LANES);
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
    intptr_t qkv_kind, o_kind, gate_up_kind, down_kind;
} Weights;

typedef struct {
    long rows, position, hidden, heads, groups, size, inner;
    long cells;    // that keys and values have of a slot
    long gathered; // positions of a tree's row that may lie elsewhere than in their own cells
    float eps;
    int threads;
} Shape;

typedef struct { // a tree's row: Place of passes.py
    long slot, position, cell, base;
    const long *path; // cells of the positions from `base` to before its own
} Place;

// The next `bytes` of a work space, aligned.
static void *take(char **space, long bytes) {
    char *start = *space;
    *space += (bytes + 63) / 64 * 64;
    return start;
}

static inline long work_floats(const Shape *shape) { // of a thread, for AT_ONCE queries
    long tail = shape->gathered ? (shape->gathered + TOGETHER) * shape->size : 0; // of 2 bf16
    return AT_ONCE * (shape->size + rounded_up(shape->position + shape->rows)) + tail;
}

static inline long cell_at(const Place *row, long t) {
    return t < row->base ? t : t < row->position ? row->path[t - row->base] : row->cell;
}

// Copies the keys and values that a row sees, from the first that is not in its own cell on, to
// tails in `space`, in order of position.
static void gather(const Place *row, Queries *queries, bf16 *space) {
    long t = row->base, size = queries->size, end = row->position + 1;
    while (t < end && cell_at(row, t) == t) t++;
    if (t == end) return;
    queries->split = t = t / TOGETHER * TOGETHER;
    bf16 *keys = space, *values = space + (end - t) * size;
    queries->tail_keys = keys, queries->tail_values = values;
    for (; t < end; t++, keys += size, values += size) {
        long at = cell_at(row, t) * size;
        memcpy(keys, queries->keys + at, 2 * size);
        memcpy(values, queries->values + at, 2 * size);
    }
}

// Attention of queries q [groups, rows, heads of a group, size]; y [rows, heads, size]. Those of all
// rows share keys and values, or in trees, where there are `places`, those of one row. Each thread
// has work_floats in `work`.
static void attention(const Shape *shape, const Place *places, const bf16 *q, const bf16 *keys,
                      const bf16 *values, bf16 *y, float *work) {
    const Shape s = *shape;
    long end = s.position + s.rows, shared = s.heads / s.groups, parts = places ? s.rows : 1;
    long queries = s.rows / parts * shared, tiles = (queries + AT_ONCE - 1) / AT_ONCE, entered = 0;
    int threads = s.heads * end * s.size < THREAD_WORK ? 1 : s.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long thread; // counted, as omp.h may be missing where the pragmas work
#pragma omp atomic capture
        thread = entered++;
#pragma omp for schedule(static)
        for (long tile = 0; tile < s.groups * parts * tiles; tile++) {
            long group = tile / tiles / parts, part = tile / tiles % parts;
            long first = tile % tiles * AT_ONCE, n = least(AT_ONCE, queries - first);
            const Place *place = places ? places + part : NULL;
            long apart = ((place ? place->slot * s.groups : 0) + group) * s.cells * s.size;
            Queries some = {.q = q + ((group * parts + part) * queries + first) * s.size,
                            .keys = keys + apart,
                            .values = values + apart,
                            .split = LONG_MAX,
                            .size = s.size,
                            .sums = (floats *)(work + thread * work_floats(shape))};
            some.weights = (float *)some.sums + AT_ONCE * s.size;
            if (place) gather(place, &some, (bf16 *)(some.weights + AT_ONCE * rounded_up(end)));
            for (long i = 0; i < n; i++) {
                long row = part + (first + i) / shared, head = group * shared + (first + i) % shared;
                some.seen[i] = (place ? place->position : s.position + row) + 1;
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

// One layer of `shape` for rows x [rows, hidden] that begin at `position`; writes y like x, and keys
// and values [groups, cells, size]. Or for rows of trees at `places` in keys and values of all
// slots, where `position` is the last of theirs. Cosines and sines, cos and sin [positions, size],
// are those of all positions. Returns 0, or 1 where there is no memory.
int decoder_layer(const bf16 *x, bf16 *y, const Weights *w, const Shape *shape, const Place *places,
                  const bf16 *cos, const bf16 *sin, bf16 *keys, bf16 *values) {
    const Shape s = *shape;
    long shared = s.heads / s.groups, all_heads = s.heads + 2 * s.groups;
    long q_size = s.heads * s.size, apart = s.cells * s.size;
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
    linear(normed, w->qkv, w->qkv_kind, w->qkv_bias, NULL, qkv, s.rows, s.hidden,
           all_heads * s.size, s.threads);
    for (long row = 0; row < s.rows; row++) {
        bf16 *new = qkv + row * all_heads * s.size, *k = new + q_size, *v = k + s.groups * s.size;
        if (w->q_norm) rms_norm(new, w->q_norm, new, s.heads, s.size, s.eps);
        if (w->k_norm) rms_norm(k, w->k_norm, k, s.groups, s.size, s.eps);
        long position = places ? places[row].position : s.position + row;
        const bf16 *c = cos + position * s.size, *sn = sin + position * s.size;
        long at = position * s.size;
        if (places) at = places[row].slot * s.groups * apart + places[row].cell * s.size;
        rotate(k, c, sn, keys + at, s.groups, s.size, apart);
        for (long group = 0; group < s.groups; group++) {
            bf16 *to = q + (group * s.rows + row) * shared * s.size;
            rotate(new + group * shared * s.size, c, sn, to, shared, s.size, s.size);
            memcpy(values + group * apart + at, v + group * s.size, 2 * s.size);
        }
    }
    attention(shape, places, q, keys, values, attended, work);
    linear(attended, w->o, w->o_kind, w->o_bias, x, y, s.rows, q_size, s.hidden, s.threads);
    rms_norm(y, w->post_norm, normed, s.rows, s.hidden, s.eps);
    linear(normed, w->gate_up, w->gate_up_kind, w->gate_up_bias, NULL, gate_up, s.rows, s.hidden,
           2 * s.inner, s.threads);
    gate(gate_up, gated, s.rows, s.inner);
    linear(gated, w->down, w->down_kind, w->down_bias, y, y, s.rows, s.inner, s.hidden, s.threads);
    free(block);
    return 0;
}

typedef struct { // a layer and its keys and values
    const Weights *weights;
    bf16 *keys, *values;
} Layer;

// Layers from the `first` to before the `end`, one after another: see decoder_layer. Between two it
// looks at `words` that others write, and goes on only while they are as `expected`. Returns the
// layer to go on with, or -1 where there is no memory.
long decoder_layers(const bf16 *x, bf16 *y, const Layer *layers, long first, long end,
                    const Shape *shape, const Place *places, const bf16 *cos, const bf16 *sin,
                    int64_t *const *words, const int64_t *expected, long count) {
    for (long i = first; i < end; i++) {
        if (i > first)
            for (long word = 0; word < count; word++)
                if (__atomic_load_n(words[word], __ATOMIC_ACQUIRE) != expected[word]) return i;
        const Layer *l = layers + i;
        if (decoder_layer(i ? y : x, y, l->weights, shape, places, cos, sin, l->keys, l->values))
            return -1;
    }
    return end;
}
