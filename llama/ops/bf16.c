/* Products of few rows of activations with bfloat16 weights, in the layout of files: y (m, out) =
   x (m, in) times w (out, in). For processors that multiply bfloat16 (AVX512-BF16). x is rounded to
   bfloat16, sums are float32, and y is rounded to bfloat16, as in PyTorch's product of many rows:
   results for short and long prompts differ at most in the last bit.

   A row of weights is read from its first input to its last, because sequential reads are fastest.
   For one row of activations, nothing else matters. Several rows share each read: the sums of 4 rows
   of weights times 4 rows of x stay in registers, while the next 4 rows of weights are prefetched. */

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#include <stdint.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define BLOCK 32   /* inputs in a vector */
#define TILE 4     /* rows of each side */
#define UNROLLED _Pragma("GCC unroll 4") /* otherwise sums would not stay in registers */

/* `rows` rows of w times m rows of x. x is stored in blocks, (in / BLOCK, m, BLOCK), and padded with
   zeros. */
TARGET static inline __attribute__((always_inline)) void tile(
    const int rows, const int m, const uint16_t *w, int64_t stride, const uint16_t *x, int64_t in, float *y, int64_t out) {
    __m512 sums[TILE][TILE];
UNROLLED
    for (int r = 0; r < rows; r++)
UNROLLED
        for (int j = 0; j < m; j++) sums[r][j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < in; i += BLOCK, x += m * BLOCK) {
        const __mmask32 mask = in - i < BLOCK ? ((__mmask32)1 << (in - i)) - 1 : ~(__mmask32)0;
        __m512bh xs[TILE];
UNROLLED
        for (int j = 0; j < m; j++) xs[j] = (__m512bh)_mm512_loadu_si512(x + j * BLOCK);
UNROLLED
        for (int r = 0; r < rows; r++) {
            if (rows > 1) _mm_prefetch((const char *)(w + (r + TILE) * stride + i), _MM_HINT_T1);
            const __m512bh ws = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * stride + i);
UNROLLED
            for (int j = 0; j < m; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], ws, xs[j]);
        }
    }
UNROLLED
    for (int r = 0; r < rows; r++)
UNROLLED
        for (int j = 0; j < m; j++) {
            const __m128bh sum = _mm_cvtneps_pbh(_mm_set_ss(_mm512_reduce_add_ps(sums[r][j])));
            y[j * out + r] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32((__m128i)sum, 16)));
        }
}

#define CASE(rows, m) case m: tile(rows, m, w, stride, x, in, y, out); break;

TARGET static void tiles(int64_t rows, int64_t m, const uint16_t *w, int64_t stride, const uint16_t *x, int64_t in,
                         float *y, int64_t out) {
    if (m > 1 && rows == TILE) switch (m) { CASE(TILE, 2) CASE(TILE, 3) CASE(TILE, 4) }
    else /* for a single row of x, one row of weights at a time is fastest */
        for (; rows > 0; rows--, w += stride, y++) switch (m) { CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) }
}

/* Rows of w are `stride` apart. `near` is room for x in bfloat16. */
TARGET void multiply_bfloat16(const uint16_t *w, int64_t stride, const float *x, uint16_t *near, float *y, int64_t m,
                              int64_t in, int64_t out, int threads) {
    const int64_t blocks = (in + BLOCK - 1) / BLOCK;
    uint16_t *to = near; /* m rows of whole blocks */
    for (int64_t first = 0; first < m; first += TILE)
        for (int64_t i = 0; i < in; i += BLOCK)
            for (int64_t j = first; j < first + TILE && j < m; j++)
                for (int part = 0; part < BLOCK; part += 16, to += 16) {
                    const int64_t left = in - i - part;
                    const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
                    const __m512 values = _mm512_maskz_loadu_ps(mask, x + j * in + i + part);
                    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
                }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t o = 0; o < out; o += TILE)
        for (int64_t first = 0; first < m; first += TILE)
            tiles(out - o < TILE ? out - o : TILE, m - first < TILE ? m - first : TILE, w + o * stride, stride,
                  near + first * blocks * BLOCK, in, y + first * out + o, out);
}
#endif
