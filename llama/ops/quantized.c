/* Products of few rows of activations with 4-bit or 8-bit weights: y (m, out) = x (m, in) times
   w (out, in).

   A decode step reads every weight once and computes little with it, so a kernel has to run at the
   speed of memory.

   Layout. Weights are stored in panels of 16 rows, and a panel in groups of 32 inputs, with a scale
   and a minimum for every row: w = q × scale + min. Without mins, min is 0 in 8 bits and -8 × scale
   in 4 bits. A group consists of lines of 32 bytes: a pair of adjacent inputs of row 0, of row 1, and
   so on. In 4 bits, the high halves of the same bytes hold the pair 16 inputs further on.

   The lanes of a vector are therefore rows. The integer products of a group are summed in their
   lanes, and converted to float and scaled once per group.

   Activations are rounded to 16-bit integers with a scale for every 32 of them. An outlier costs
   precision only within its 32, and one instruction multiplies and adds pairs of integers.

   The file includes itself once for every kind of processor. The best kind that this processor
   supports is chosen when the library is loaded. Work is divided over PyTorch's own threads, because
   PyTorch's OpenMP library is already loaded. */

#ifndef KIND
#include <stdint.h>
#include <string.h>

#define GROUP 32 /* inputs that share a scale */
#define PAIRS (GROUP / 2)
#define PANEL 16 /* rows whose weights are stored together */
#define LINE 32  /* bytes: one pair of inputs of each row of a panel, or two pairs in 4 bits */
#define SWEEP 8  /* rows of activations for which the weights are read once */
#define AHEAD 2048 /* bytes: how far ahead of their use weights are prefetched */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define OWN(name) JOIN(KIND, name)

typedef struct {
    int bits, wide;            /* 4 or 8; whether scales and mins are float32 */
    const uint8_t *w;          /* (panels, groups, lines, LINE): 16 lines in 8 bits, 8 in 4 bits */
    const void *scales, *mins; /* (panels, groups, PANEL), float16 or float32 */
    int64_t in, out, groups;
} weights;

/* Each group holds all rows of a sweep, because rows a power of two apart would share a cache set. */
typedef struct {
    const int32_t *q;           /* (groups, m, PAIRS): x / scale, two 16-bit integers in each */
    const float *scales, *sums; /* (groups, m): the scale of each group of x, and its sum of q × scale */
} rounded;

static inline float float_of(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x400) return float_of(sign | bits_of(rest * 0x1p-24f)); /* a subnormal number, or zero */
    return float_of(sign | (rest < 0x7c00 ? (rest << 13) + 0x38000000 : 0x7f800000 | (rest & 0x3ff) << 13));
}
static inline float factor(const weights *h, const void *p, int64_t at) {
    return h->wide ? ((const float *)p)[at] : from_half(((const uint16_t *)p)[at]);
}

/* Vectors of GCC and Clang. Plain operators compile to the instructions of each kind of processor.
   Only products of pairs of integers and float16 conversions use intrinsics. */
#define VECTOR(bytes) __attribute__((vector_size(bytes)))
#define VECTORS(kind, lanes) \
    typedef int8_t kind##_int8 VECTOR(2 * lanes); typedef uint8_t kind##_bytes VECTOR(2 * lanes); \
    typedef int16_t kind##_ints VECTOR(4 * lanes); typedef int32_t kind##_sums VECTOR(4 * lanes); \
    typedef float kind##_floats VECTOR(4 * lanes)

#define KIND plain
#define TARGET
#define LANES 4
VECTORS(plain, 4);
INLINE plain_sums plain_dot(plain_sums sums, plain_ints a, int32_t x) {
    const plain_sums pairs = (plain_sums)a; /* little-endian: the first of a pair is the lower half */
    return sums + (pairs << 16 >> 16) * (x << 16 >> 16) + (pairs >> 16) * (x >> 16);
}
INLINE plain_floats plain_halves(const uint16_t *p) {
    return (plain_floats){from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
}
#include "quantized.c"
#if defined(__x86_64__)
#include <immintrin.h>
#define KIND avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
VECTORS(avx2, 8);
INLINE avx2_sums avx2_dot(avx2_sums sums, avx2_ints a, int32_t x) {
    return sums + (avx2_sums)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(x));
}
INLINE avx2_floats avx2_halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#include "quantized.c"
#define KIND avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define LANES 16
VECTORS(avx512, 16);
INLINE avx512_sums avx512_dot(avx512_sums sums, avx512_ints a, int32_t x) {
    return (avx512_sums)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, _mm512_set1_epi32(x));
}
INLINE avx512_floats avx512_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((__m256i *)p)); }
#include "quantized.c"
#endif

static void (*panels)(const weights *, rounded, float *, int64_t, int64_t) = plain_panels;
static void (*round_group)(const float *, int64_t, int32_t *, float *, float *) = plain_round;
static void (*expand_panel)(const weights *, int64_t, int, void *) = plain_expand;
#define CHOOSE(kind) panels = kind##_panels, round_group = kind##_round, expand_panel = kind##_expand
int choose(int level) { /* At most this level: 0 plain, 1 AVX2, 2 AVX512 with VNNI. Returns the level chosen. */
    CHOOSE(plain);
#if defined(__x86_64__)
#define HAS(what) __builtin_cpu_supports(what)
    if (level < 1 || !HAS("avx2") || !HAS("fma") || !HAS("f16c")) return 0;
    CHOOSE(avx2);
    if (level < 2 || !HAS("avx512bw") || !HAS("avx512vl") || !HAS("avx512dq") || !HAS("avx512vnni")) return 1;
    CHOOSE(avx512);
    return 2;
#endif
    return 0;
}

/* y (m, out) = x (m, in) wᵀ */
void multiply(int bits, int wide, const void *w, const void *scales, const void *mins, const float *x, float *scratch,
              float *y, int64_t m, int64_t in, int64_t out, int threads) {
    const weights h = {bits, wide, w, scales, mins, in, out, (in + GROUP - 1) / GROUP};
    const int64_t all = m * h.groups;
    float *xs = scratch; /* all scales, all sums, then PAIRS integers per group */
    int32_t *q = (int32_t *)(xs + 2 * all);
    for (int64_t i = 0; i < m; i++)
        for (int64_t g = 0; g < h.groups; g++) {
            const int64_t first = i - i % SWEEP, n = m - first < SWEEP ? m - first : SWEEP;
            const int64_t at = first * h.groups + g * n + i % SWEEP;
            round_group(x + i * in + g * GROUP, in - g * GROUP, q + at * PAIRS, xs + at, xs + all + at);
        }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (out + PANEL - 1) / PANEL; panel++)
        panels(&h, (rounded){q, xs, xs + all}, y, m, panel);
}

/* The dequantized rows of all panels, (out, in), multiples of PANEL and GROUP. They are bfloat16 if
   `half`, else float32. */
void expand(int bits, int wide, const void *w, const void *scales, const void *mins, int64_t in, int64_t out, int half,
            void *to, int threads) {
    const weights h = {bits, wide, w, scales, mins, in, out, in / GROUP};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < out / PANEL; panel++)
        expand_panel(&h, panel, half, (char *)to + panel * PANEL * in * (half ? 2 : 4));
}

#else /* for each kind of processor */

/* Rounds a group of activations to integers up to 32767 and their scale. NaN and infinity make the
   scale NaN. */
TARGET static void OWN(round)(const float *x, int64_t n, int32_t *pairs, float *scale, float *sum_of) {
    float part[GROUP] = {0};
    int16_t q[GROUP];
    if (n >= GROUP) memcpy(part, x, sizeof part); /* a constant length, so no call */
    else memcpy(part, x, n * sizeof(float));
    uint32_t largest = 0, bits; /* as bits: floats without signs are ordered like integers */
    for (int i = 0; i < GROUP; i++) largest = (bits = bits_of(part[i]) & 0x7fffffff) > largest ? bits : largest;
    const float top = float_of(largest), one = top > 1e-30f ? 32767 / top : 0;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        /* Adding 1.5 × 2^23 rounds to the nearest integer, ties to even. */
        q[i] = (int16_t)(int32_t)(bits_of(part[i] * one + 12582912.0f) - 0x4b400000);
        sum += q[i];
    }
    memcpy(pairs, q, sizeof q);
    *scale = one ? top / 32767 : top * 0;
    *sum_of = one ? sum * *scale : *scale;
}

INLINE OWN(floats) OWN(factors)(const weights *h, const void *p, int64_t at) {
    OWN(floats) wide;
    if (h->wide) memcpy(&wide, (const float *)p + at, sizeof wide);
    return h->wide ? wide : OWN(halves)((const uint16_t *)p + at);
}

/* m rows of activations times one panel. The weights stay in registers for all of them. */
INLINE void OWN(sweep)(const int bits, const weights *h, rounded r, float *y, int64_t panel, const int m) {
    const int lines = 2 * bits, parts = PANEL / LANES;
    const uint8_t *w = h->w + panel * h->groups * lines * LINE;
    OWN(floats) sum[PANEL / LANES][SWEEP];
    for (int part = 0; part < parts; part++) for (int i = 0; i < m; i++) sum[part][i] = (OWN(floats)){0};
    for (int64_t g = 0; g < h->groups; g++, w += lines * LINE)
        for (int part = 0; part < parts; part++) {
            const int64_t at = (panel * h->groups + g) * PANEL + part * LANES;
            const int32_t *pairs = r.q + g * m * PAIRS;
            OWN(sums) dots[SWEEP] = {{0}};
#pragma GCC unroll 16
            for (int j = 0; j < lines; j++) {
                const uint8_t *line = w + j * LINE + part * 2 * LANES;
                if (part == 0 && j % 2 == 0) __builtin_prefetch(line + AHEAD);
                OWN(bytes) bytes;
                memcpy(&bytes, line, sizeof bytes);
                if (bits == 8) {
                    const OWN(ints) q = __builtin_convertvector((OWN(int8))bytes, OWN(ints));
                    for (int i = 0; i < m; i++) dots[i] = OWN(dot)(dots[i], q, pairs[i * PAIRS + j]);
                } else {
                    const OWN(ints) both = __builtin_convertvector(bytes, OWN(ints)), low = both & 15, high = both >> 4;
                    for (int i = 0; i < m; i++) {
                        dots[i] = OWN(dot)(dots[i], low, pairs[i * PAIRS + j]);
                        dots[i] = OWN(dot)(dots[i], high, pairs[i * PAIRS + 8 + j]);
                    }
                }
            }
            const OWN(floats) scale = OWN(factors)(h, h->scales, at);
            for (int i = 0; i < m; i++)
                sum[part][i] += __builtin_convertvector(dots[i], OWN(floats)) * (scale * r.scales[g * m + i]);
            if (bits == 8 && !h->mins) continue;
            const OWN(floats) min = h->mins ? OWN(factors)(h, h->mins, at) : scale * -8.0f;
            for (int i = 0; i < m; i++) sum[part][i] += min * r.sums[g * m + i];
        }
    for (int i = 0; i < m; i++) {
        const int64_t first = panel * PANEL, left = h->out - first;
        float all[PANEL];
        for (int part = 0; part < parts; part++) memcpy(all + part * LANES, sum[part] + i, sizeof sum[part][i]);
        memcpy(y + i * h->out + first, all, (left < PANEL ? left : PANEL) * sizeof(float));
    }
}

#define CASE(bits, n) case n: OWN(sweep)(bits, h, r, y, panel, n); break;
#define SWEEPS(bits, n) switch (n) { \
    CASE(bits, 1) CASE(bits, 2) CASE(bits, 3) CASE(bits, 4) CASE(bits, 5) CASE(bits, 6) CASE(bits, 7) CASE(bits, 8) }

TARGET static void OWN(panels)(const weights *h, rounded r, float *y, int64_t m, int64_t panel) {
    for (; m > 0; m -= SWEEP, y += SWEEP * h->out, r.q += SWEEP * h->groups * PAIRS) {
        const int n = m < SWEEP ? (int)m : SWEEP;
        if (h->bits == 8) SWEEPS(8, n) else SWEEPS(4, n)
        r.scales += SWEEP * h->groups, r.sums += SWEEP * h->groups;
    }
}

/* A panel's dequantized rows, in their original order. */
INLINE void OWN(rows)(const int bits, const weights *h, int64_t panel, int half, void *to) {
    const int64_t lines = 2 * bits, in = h->groups * GROUP;
    for (int64_t g = 0; g < h->groups; g++) {
        const int64_t group = panel * h->groups + g;
        uint16_t pairs[PANEL][16];
        for (int row = 0; row < PANEL; row++)
            for (int j = 0; j < lines; j++) memcpy(&pairs[row][j], h->w + (group * lines + j) * LINE + 2 * row, 2);
        for (int row = 0; row < PANEL; row++) {
            const float scale = factor(h, h->scales, group * PANEL + row);
            const float min = h->mins ? factor(h, h->mins, group * PANEL + row) : bits == 8 ? 0 : -8 * scale;
            const uint8_t *q = (const uint8_t *)pairs[row];
            float values[GROUP];
            for (int i = 0; i < 4 * bits; i++) values[i] = (bits == 8 ? (int8_t)q[i] : q[i] & 15) * scale + min;
            if (bits == 4) for (int i = 0; i < 16; i++) values[16 + i] = (q[i] >> 4) * scale + min;
            const int64_t at = row * in + g * GROUP;
            if (!half) memcpy((float *)to + at, values, sizeof values);
            else for (uint32_t i = 0, u; i < GROUP; i++)
                u = bits_of(values[i]), ((uint16_t *)to)[at + i] = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        }
    }
}

TARGET static void OWN(expand)(const weights *h, int64_t panel, int half, void *to) {
    if (h->bits == 8) OWN(rows)(8, h, panel, half, to); else OWN(rows)(4, h, panel, half, to);
}
#undef KIND
#undef TARGET
#undef LANES
#endif
