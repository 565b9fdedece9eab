/* Products of few rows of activations with weights in 4 or 8 bits: y (m, out) = x (m, in) times w (out, in).

   A decoding step reads every weight once and does little with it, so a kernel's whole art is to keep up with memory.
   Weights lie in panels of 16 rows, and a panel in groups of 32 inputs, each with a scale and a minimum for every row:
   w = q scale + min; without mins, they are 0 in 8 bits and -8 scale in 4. A group is made of lines of 32 bytes: a pair of
   neighbouring inputs of row 0, of row 1, and so on; in 4 bits the pair 16 inputs on lies in the higher halves of the
   same bytes. So a vector's lanes are rows, integers of a group add up where they are, and only once in a group become
   floats and meet their scales. Activations are rounded to 16-bit integers with a scale for every 32 of them: no
   outlier costs its neighbours their precision, and one instruction multiplies and adds pairs of integers. The file
   includes itself once for every kind of processor; the best that this one has is chosen when it is loaded. Work is
   divided over PyTorch's own threads: its OpenMP library is the one that is loaded already. */

#ifndef KIND
#include <stdint.h>
#include <string.h>

#define GROUP 32 /* inputs that share a scale */
#define PAIRS (GROUP / 2)
#define PANEL 16 /* rows whose weights lie together */
#define LINE 32  /* bytes that hold a pair of inputs, or in 4 bits two pairs, of a panel's rows */
#define SWEEP 8  /* rows of activations that one reading of the weights serves */
#define AHEAD 2048 /* bytes: weights are asked for so long before they are used */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define OWN(name) JOIN(KIND, name)

typedef struct {
    int bits, wide;            /* 4 or 8; whether scales and mins are float32 */
    const uint8_t *w;          /* (panels, groups, lines, LINE), 16 lines or in 4 bits 8 */
    const void *scales, *mins; /* (panels, groups, PANEL), float16 or float32 */
    int64_t in, out, groups;
} weights;

/* Rows of one sweep stand beside each other: those that are a power of two apart would share a cache set. */
typedef struct {
    const int32_t *q;           /* (groups, m, PAIRS), x / scale: two of 16 bits each */
    const float *scales, *sums; /* (groups, m): of a group of x, its scale and the sum of q × scale */
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

/* Vectors of GCC and Clang: plain operators, for whatever instructions the kind of processor has. Only a product of
   pairs of integers, and float16, are better said in the processor's own words. */
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
    const plain_sums pairs = (plain_sums)a; /* in memory's order the first of a pair is the lower half */
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
int choose(int level) { /* 0: plain, 1: AVX2, 2: AVX512 with VNNI; or what the processor has. Returns it. */
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
    float *xs = scratch; /* scales, sums, and PAIRS integers of each group */
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

/* the rows of all panels, as bfloat16 if `half`, else as float32: (out, in), multiples of PANEL and GROUP */
void expand(int bits, int wide, const void *w, const void *scales, const void *mins, int64_t in, int64_t out, int half,
            void *to, int threads) {
    const weights h = {bits, wide, w, scales, mins, in, out, in / GROUP};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < out / PANEL; panel++)
        expand_panel(&h, panel, half, (char *)to + panel * PANEL * in * (half ? 2 : 4));
}

#else /* for each kind of processor */

/* Each 32 activations -> integers up to 32767 and their scale; NaN and what is infinite make the scale NaN. */
TARGET static void OWN(round)(const float *x, int64_t n, int32_t *pairs, float *scale, float *sum_of) {
    float part[GROUP] = {0};
    int16_t q[GROUP];
    if (n >= GROUP) memcpy(part, x, sizeof part); /* of a length that is known, it is no call */
    else memcpy(part, x, n * sizeof(float));
    uint32_t largest = 0, bits; /* of bits: floats without their signs are ordered as integers are */
    for (int i = 0; i < GROUP; i++) largest = (bits = bits_of(part[i]) & 0x7fffffff) > largest ? bits : largest;
    const float top = float_of(largest), one = top > 1e-30f ? 32767 / top : 0;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        /* 1.5 × 2^23: what is added to it loses its fraction, rounded to the nearest even integer */
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

/* m rows of activations times one panel. The weights' integers stay in registers for all of them. */
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

/* A panel's rows as they were before they were laid into lines. */
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
