// The AVX-512 instructions of kernels.c in plain C: for their numbers, not for their speed.
//
// Found before the compiler's own header where a test builds kernels.c for a CPU without them.
// Denormal numbers are not flushed to zero, as dot products do there.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EMULATED static __attribute__((noinline, unused)) // compiles in half the time

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef int16_t __m512bh __attribute__((vector_size(64), may_alias));
typedef int64_t __m512i __attribute__((vector_size(64), may_alias));
typedef int64_t __m256i __attribute__((vector_size(32), may_alias));
typedef int64_t __m128i __attribute__((vector_size(16), may_alias));

EMULATED float wide_of(uint16_t narrow) {
    uint32_t bits = (uint32_t)narrow << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

EMULATED uint16_t narrow_of(float wide) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

EMULATED __m512i _mm512_loadu_si512(const void *from) {
    __m512i all;
    memcpy(&all, from, sizeof all);
    return all;
}

EMULATED void _mm512_storeu_si512(void *to, __m512i all) { memcpy(to, &all, sizeof all); }

EMULATED void _mm512_storeu_ps(void *to, __m512 all) { memcpy(to, &all, sizeof all); }

EMULATED __m256i _mm256_loadu_si256(const __m256i *from) {
    __m256i all;
    memcpy(&all, from, sizeof all);
    return all;
}

EMULATED __m128i _mm_loadu_si128(const __m128i *from) {
    __m128i all;
    memcpy(&all, from, sizeof all);
    return all;
}

EMULATED __m512 _mm512_set1_ps(float x) { return (__m512){0} + x; }

EMULATED __m512 _mm512_setr_ps(float a, float b, float c, float d, float e, float f, float g,
                                    float h, float i, float j, float k, float l, float m, float n,
                                    float o, float p) {
    return (__m512){a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}

EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }

EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}

EMULATED __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    for (int i = 0; i < 16; i++)
        for (int k = 2 * i + 1; k >= 2 * i; k--)
            sums[i] = fmaf(wide_of((uint16_t)a[k]), wide_of((uint16_t)b[k]), sums[i]);
    return sums;
}

EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
    __m512bh all;
    for (int i = 0; i < 16; i++) {
        all[i] = (int16_t)narrow_of(lower[i]);
        all[16 + i] = (int16_t)narrow_of(upper[i]);
    }
    return all;
}

EMULATED __m512i _mm512_srli_epi16(__m512i words, int by) {
    uint16_t each[32];
    memcpy(each, &words, sizeof each);
    for (int i = 0; i < 32; i++) each[i] >>= by;
    return _mm512_loadu_si512(each);
}

EMULATED __m512i _mm512_permutexvar_epi16(__m512i which, __m512i words) {
    uint16_t index[32], from[32], to[32];
    memcpy(index, &which, sizeof index);
    memcpy(from, &words, sizeof from);
    for (int i = 0; i < 32; i++) to[i] = from[index[i] % 32];
    return _mm512_loadu_si512(to);
}

EMULATED __m512i _mm512_cvtepi8_epi32(__m128i bytes) {
    int8_t from[16];
    int32_t to[16];
    memcpy(from, &bytes, sizeof from);
    for (int i = 0; i < 16; i++) to[i] = from[i];
    return _mm512_loadu_si512(to);
}

EMULATED __m512 _mm512_cvtepi32_ps(__m512i words) {
    int32_t from[16];
    __m512 to;
    memcpy(from, &words, sizeof from);
    for (int i = 0; i < 16; i++) to[i] = (float)from[i];
    return to;
}

EMULATED __m512 _mm512_cvtph_ps(__m256i halves) {
    uint16_t from[16];
    __m512 to;
    memcpy(from, &halves, sizeof from);
    for (int i = 0; i < 16; i++) {
        int power = from[i] >> 10 & 31, whole = from[i] & 1023;
        float size = power ? ldexpf((float)(whole + 1024), power - 25) : ldexpf((float)whole, -24);
        to[i] = from[i] >> 15 ? -size : size; // no infinities
    }
    return to;
}
