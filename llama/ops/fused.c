/* What a pass does between its products, each in one reading: norm, rotary embedding, cache, attention and gate.

   In a step of one token each of them is a few microseconds of work, and as PyTorch's single operations a third of the
   step. All is float32. The loops are plain, for compilers to make vectors of: a version for each kind of processor,
   of which the one that fits is taken when the library is loaded. Threads are PyTorch's, as in quantized.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#define EACH_KIND __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define EACH_KIND
#endif

typedef float lanes __attribute__((vector_size(64)));
#define LANES 16
#define MOST 16     /* vectors in a head's channels */
#define KEYS 64     /* that a query meets between two corrections of its softmax */
#define WORK 32768  /* numbers from which on a second thread gains more than it costs to wake */

/* e^x = 2^n e^r with n whole and |r| <= ln 2 / 2, and e^r as its Taylor polynomial: within 2 units in the last place.
   What float32 cannot hold is infinite, or counts as the least that it holds. */
static inline __attribute__((always_inline)) float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88.8f ? 88.8f : x; /* 2^128, which is infinite */
    float n = x * 1.44269504f + 12582912.0f; /* 1.5 × 2^23: what is added to it is rounded to a whole number */
    int32_t power;
    memcpy(&power, &n, 4);
    n -= 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact times n */
    const float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    power = (int32_t)((uint32_t)(power - 0x4b400000 + 127) << 23);
    float scale;
    memcpy(&scale, &power, 4);
    return e * scale;
}

EACH_KIND static void norm_token(const float *x, const float *weight, float eps, int64_t dim, float *y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++) squares += x[i] * x[i];
    const float scale = 1 / sqrtf(squares / dim + eps);
    for (int64_t i = 0; i < dim; i++) y[i] = x[i] * scale * weight[i];
}

/* y (tokens, dim) = x / rms(x) × weight */
void rms_norm(const float *x, const float *weight, float eps, int64_t tokens, int64_t dim, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * dim > WORK)
    for (int64_t t = 0; t < tokens; t++) norm_token(x + t * dim, weight, eps, dim, y + t * dim);
}

EACH_KIND static void gate_token(const float *gate, const float *up, int64_t width, float *y) {
    for (int64_t i = 0; i < width; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

/* y (tokens, width) = silu(gate) × up, whose tokens are `stride` apart */
void gate(const float *gate, const float *up, int64_t stride, int64_t tokens, int64_t width, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > WORK)
    for (int64_t t = 0; t < tokens; t++) gate_token(gate + t * stride, up + t * stride, width, y + t * width);
}

EACH_KIND static void rotate_token(const float *x, const float *cis, int64_t heads, int64_t dim, float *y) {
    for (int64_t h = 0; h < heads; h++, x += dim, y += dim)
        for (int64_t i = 0; i < dim; i += 2) {
            y[i] = x[i] * cis[i] - x[i + 1] * cis[i + 1];
            y[i + 1] = x[i] * cis[i + 1] + x[i + 1] * cis[i];
        }
}

/* y (tokens, heads, dim) = x, whose tokens are `stride` apart, with neighbouring channels as complex numbers times
   cis (positions, dim / 2): token t stands at t modulo `positions` */
void rotate(const float *x, int64_t stride, const float *cis, int64_t positions, int64_t tokens, int64_t heads,
            int64_t dim, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > WORK)
    for (int64_t t = 0; t < tokens; t++)
        rotate_token(x + t * stride, cis + t % positions * dim, heads, dim, y + t * heads * dim);
}

/* Put x (n, seqlen, heads, dim), whose tokens are `stride` apart, to their positions (n, seqlen) of cached rows. */
void write_cache(const float *x, int64_t stride, const int64_t *positions, int64_t n, int64_t seqlen, int64_t heads,
                 int64_t dim, float *cached, int64_t row, int64_t head) {
    for (int64_t t = 0; t < n * seqlen; t++)
        for (int64_t h = 0; h < heads; h++)
            memcpy(cached + t / seqlen * row + h * head + positions[t] * dim, x + t * stride + h * dim, dim * sizeof *x);
}

static inline __attribute__((always_inline)) float total_of(const lanes *sums) {
    float half __attribute__((vector_size(32))), other __attribute__((vector_size(32)));
    float four __attribute__((vector_size(16))), rest __attribute__((vector_size(16)));
    memcpy(&half, sums, 32), memcpy(&other, (const char *)sums + 32, 32);
    half += other;
    memcpy(&four, &half, 16), memcpy(&rest, (const char *)&half + 16, 16);
    four += rest;
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* `group` queries that share a key head, each softmax(q kᵀ × scale) v over the first `length` keys, which are met some
   at a time: what was summed is corrected whenever a larger score comes (Milakov and Gimelshein 2018). Of a head's
   `parts` vectors query and sum stay in registers, where the compiler knows how many they are. */
static inline __attribute__((always_inline)) void attend_parts(
    const int parts, const float *q, const float *keys, const float *values, int64_t length, int64_t group, float scale,
    float *y) {
    const int64_t dim = parts * LANES;
    for (; group > 0; group--, q += dim, y += dim) {
        lanes query[MOST], sum[MOST];
        float top = -INFINITY, total = 0, scores[KEYS];
        for (int i = 0; i < parts; i++) memcpy(query + i, q + i * LANES, sizeof(lanes)), sum[i] = (lanes){0};
        for (int64_t first = 0; first < length; first += KEYS) {
            const int n = length - first < KEYS ? (int)(length - first) : KEYS;
            const float before = top;
            for (int j = 0; j < n; j++) {
                lanes dot = {0}, part;
                for (int i = 0; i < parts; i++) {
                    memcpy(&part, keys + (first + j) * dim + i * LANES, sizeof part);
                    dot += query[i] * part;
                }
                scores[j] = total_of(&dot) * scale;
                top = scores[j] > top ? scores[j] : top;
            }
            for (int j = 0; j < n; j++) scores[j] = exponential(scores[j] - top);
            const float kept = before == top ? 1 : exponential(before - top);
            total *= kept;
            for (int i = 0; i < parts; i++) sum[i] *= kept;
            for (int j = 0; j < n; j++) {
                total += scores[j];
                lanes part;
                for (int i = 0; i < parts; i++) {
                    memcpy(&part, values + (first + j) * dim + i * LANES, sizeof part);
                    sum[i] += scores[j] * part;
                }
            }
        }
        for (int i = 0; i < parts; i++) sum[i] /= total, memcpy(y + i * LANES, sum + i, sizeof(lanes));
    }
}

EACH_KIND static void attend_head(const float *q, const float *keys, const float *values, int64_t length,
                                  int64_t group, int64_t dim, float scale, float *y) {
    if (dim == 128) attend_parts(8, q, keys, values, length, group, scale, y);
    else if (dim == 64) attend_parts(4, q, keys, values, length, group, scale, y);
    else attend_parts(dim / LANES, q, keys, values, length, group, scale, y);
}

/* y (n, seqlen, heads, dim): queries of the same shape, each over its row's keys and values (n, kv_heads, length, dim)
   up to its own position; dim is a multiple of 16, at most 256. Rows of the cache are `row` apart, and heads `head`. */
void attend(const float *q, const float *keys, const float *values, int64_t row, int64_t head,
            const int64_t *positions, int64_t n, int64_t seqlen, int64_t heads, int64_t kv_heads, int64_t dim,
            float scale, float *y, int threads) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t t = 0; t < n * seqlen; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t at = (t * heads + h * group) * dim, from = t / seqlen * row + h * head;
            attend_head(q + at, keys + from, values + from, positions[t] + 1, group, dim, scale, y + at);
        }
}
