/* The operations between matrix multiplications, each in one pass over its data: norm, rotary
   embedding, cache, attention and gate.

   In a step of one token, each of them takes a few microseconds; as separate PyTorch operations they
   take a third of the step. All data is float32. The loops are plain, so that compilers can vectorize
   them. There is a version for each kind of processor, and the right one is chosen when the library
   is loaded. Threads are PyTorch's, as in quantized.c. */

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
#define MOST 16     /* vectors in the largest head */
#define KEYS 64     /* keys between two corrections of a softmax */
#define WORK 32768  /* values beyond which a second thread is worth the time to wake it */

/* e^x = 2^n e^r with an integer n and |r| <= ln 2 / 2, and e^r by its Taylor polynomial: within 2
   units in the last place. Overflow gives infinity. x below -87 counts as -87, whose exponential is
   close to the smallest normal float32. */
static inline __attribute__((always_inline)) float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88.8f ? 88.8f : x; /* n is then 128, and 2^128 is infinite */
    float n = x * 1.44269504f + 12582912.0f; /* adding 1.5 × 2^23 rounds to an integer */
    int32_t power;
    memcpy(&power, &n, 4);
    n -= 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts: n times the first is exact */
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

/* y (tokens, width) = silu(gate) × up. Tokens of gate and up are `stride` apart. */
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

/* y (tokens, heads, dim) = x times cis (positions, dim / 2), with adjacent channels of x as complex
   numbers. Tokens of x are `stride` apart. Token t uses row t modulo `positions` of cis. */
void rotate(const float *x, int64_t stride, const float *cis, int64_t positions, int64_t tokens, int64_t heads,
            int64_t dim, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > WORK)
    for (int64_t t = 0; t < tokens; t++)
        rotate_token(x + t * stride, cis + t % positions * dim, heads, dim, y + t * heads * dim);
}

/* Write x (n, seqlen, heads, dim) to `positions` (n, seqlen) of `cached`. Tokens of x are `stride`
   apart, rows of `cached` `row`, and its heads `head`. */
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

/* For each of `group` queries that share a key head, softmax(q kᵀ × scale) v over the first `length`
   keys. Keys are processed KEYS at a time, and the sums are corrected whenever a larger score occurs
   (Milakov and Gimelshein 2018). The `parts` vectors of a head's query and sum stay in registers if
   `parts` is known at compile time. */
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

/* y (n, seqlen, heads, dim): attention of the queries q, of the same shape, over their row's keys and
   values (n, kv_heads, length, dim), each up to its own position. dim is a multiple of 16, at most
   256. Rows of the cache are `row` apart, and heads `head`. */
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
