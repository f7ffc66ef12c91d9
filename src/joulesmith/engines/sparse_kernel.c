/* Products by pruned matrices on x86-64 with AVX-512 VBMI2: a 64-bit mask tells which of 64
   neighbouring columns are stored, and one instruction spreads the stored values to their
   places. Weights are made exactly as the packed matrix means them; sums are float32.

   A row is `blocks` masks, and its values one after the other; those of each block begin at a
   byte of their own. kind: 4 (nibbles, through `levels`), 8 (int8), 16 (float16), 17 (bfloat16).
   Values may be read up to 64 bytes beyond the last: the caller pads. */

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    const uint64_t *masks;   /* (rows, blocks) */
    const uint8_t *values;
    const int64_t *starts;   /* (rows): where each row's values begin, in bytes */
    const uint16_t *steps;   /* (rows, groups) float16; unused for floats */
    const int32_t *group_of; /* (4 blocks): the group of each 16 columns */
    const int8_t *levels;    /* (16): what a nibble means */
    int64_t blocks, groups;
    int32_t kind;
} matrix;

/* The stored codes of a block as bytes, zeros put back; returns where the next block's begin. */
static inline __attribute__((always_inline)) const uint8_t *
spread_bytes(int kind, __m512i levels, uint64_t mask, const uint8_t *at, __m512i *all)
{
    int count = __builtin_popcountll(mask);
    __m512i stored;
    if (kind == 4) {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at));
        wide = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
        wide = _mm512_and_si512(wide, _mm512_set1_epi8(15));
        stored = _mm512_shuffle_epi8(levels, wide);
        at += (count + 1) / 2;
    } else {
        stored = _mm512_loadu_si512(at);
        at += count;
    }
    *all = _mm512_maskz_expand_epi8((__mmask64)mask, stored);
    return at;
}

/* The 64 weights of a block, steps not applied; returns where the next block's values begin. */
static inline __attribute__((always_inline)) const uint8_t *
spread(int kind, __m512i levels, uint64_t mask, const uint8_t *at, __m512 w[4])
{
    if (kind <= 8) {
        __m512i all;
        at = spread_bytes(kind, levels, mask, at, &all);
        w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(all)));
        w[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 1)));
        w[2] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 2)));
        w[3] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 3)));
        return at;
    }
    for (int half = 0; half < 2; half++) {
        uint32_t part = (uint32_t)(mask >> (32 * half));
        __m512i all = _mm512_maskz_expand_epi16((__mmask32)part, _mm512_loadu_si512(at));
        at += 2 * __builtin_popcount(part);
        __m256i low = _mm512_castsi512_si256(all), high = _mm512_extracti64x4_epi64(all, 1);
        if (kind == 16) {
            w[2 * half] = _mm512_cvtph_ps(low);
            w[2 * half + 1] = _mm512_cvtph_ps(high);
        } else {
            w[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
            w[2 * half + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
    }
    return at;
}

/* One row times `count` inputs (1 to 4), or written out as float32 where count is 0. */
static inline __attribute__((always_inline)) void
row(const matrix *m, int kind, int64_t r, int count, const float *x, int64_t stride, float *out,
    int64_t rows, float *steps)
{
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)m->levels));
    const uint64_t *masks = m->masks + r * m->blocks;
    const uint8_t *at = m->values + m->starts[r];
    __m512 sum[4][2], w[4];
    for (int j = 0; j < count; j++)
        sum[j][0] = sum[j][1] = _mm512_setzero_ps();
    if (kind <= 8) {
        const uint16_t *halves = m->steps + r * m->groups;
        for (int64_t g = 0; g < m->groups; g++)
            steps[g] = _cvtsh_ss(halves[g]);
    }
    for (int64_t b = 0; b < m->blocks; b++) {
        at = spread(kind, levels, masks[b], at, w);
        for (int i = 0; i < 4; i++) {
            if (kind <= 8) /* exact: 8 bits times 11 */
                w[i] = _mm512_mul_ps(w[i], _mm512_set1_ps(steps[m->group_of[4 * b + i]]));
            if (count == 0)
                _mm512_storeu_ps(out + 64 * b + 16 * i, w[i]);
            for (int j = 0; j < count; j++)
                sum[j][i & 1] = _mm512_fmadd_ps(
                    w[i], _mm512_loadu_ps(x + j * stride + 64 * b + 16 * i), sum[j][i & 1]);
        }
    }
    for (int j = 0; j < count; j++)
        out[j * rows + r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[j][0], sum[j][1]));
}

/* x (64 blocks) float32 -> int16 and a scale for each 64, of which even columns come first:
   bytes become 16-bit lanes by a shift and a mask, which costs no permutation. */
void joulesmith_inputs(const float *x, int64_t blocks, int16_t *out, float *scales)
{
    for (int64_t b = 0; b < blocks; b++) {
        __m512 v[4], most = _mm512_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm512_loadu_ps(x + 64 * b + 16 * i);
            most = _mm512_max_ps(most, _mm512_abs_ps(v[i]));
        }
        float largest = _mm512_reduce_max_ps(most);
        scales[b] = largest / 32767;
        __m512 by = _mm512_set1_ps(largest > 0 ? 32767 / largest : 0);
        for (int i = 0; i < 4; i++) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], by));
            /* (even, odd) columns are the halves of 64-bit lanes */
            _mm_storeu_si128((__m128i *)(out + 64 * b + 8 * i), _mm512_cvtepi64_epi16(whole));
            _mm_storeu_si128((__m128i *)(out + 64 * b + 32 + 8 * i),
                             _mm512_cvtepi64_epi16(_mm512_srli_epi64(whole, 32)));
        }
    }
}

/* Codes times 16-bit inputs, of groups that are whole blocks: sums of 4 products a lane stay far
   below 2^31, so that nothing is lost but the inputs' rounding. */
static inline __attribute__((always_inline)) void
row16(const matrix *m, int kind, int64_t r, int count, const int16_t *x, const float *scales,
      float *out, int64_t rows, float *factors)
{
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)m->levels));
    const uint64_t *masks = m->masks + r * m->blocks;
    const uint16_t *steps = m->steps + r * m->groups;
    const uint8_t *at = m->values + m->starts[r];
    const int64_t blocks = m->blocks;
    const int32_t *group_of = m->group_of;
    const __m512i upper = _mm512_set1_epi16((short)0xff00);
    __m512 sum[4];
    /* nibbles are left in the upper byte of their lane: 8 * 256 * 32767 * 4 < 2^31 */
    const float unit = kind == 4 ? 1.0f / 256 : 1.0f;
    for (int j = 0; j < count; j++) {
        sum[j] = _mm512_setzero_ps();
        for (int64_t b = 0; b < blocks; b++)
            factors[j * blocks + b] = _cvtsh_ss(steps[group_of[4 * b]]) * scales[j * blocks + b] * unit;
    }
    for (int64_t b = 0; b < blocks; b++) {
        __m512i all;
        at = spread_bytes(kind, levels, masks[b], at, &all);
        __m512i low = _mm512_slli_epi16(all, 8), high = _mm512_and_si512(all, upper);
        if (kind == 8) {
            low = _mm512_srai_epi16(low, 8);
            high = _mm512_srai_epi16(all, 8);
        }
        for (int j = 0; j < count; j++) {
            const int16_t *given = x + 64 * (j * blocks + b);
            __m512i dot = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(given));
            dot = _mm512_dpwssd_epi32(dot, high, _mm512_loadu_si512(given + 32));
            sum[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                     _mm512_set1_ps(factors[j * blocks + b]), sum[j]);
        }
    }
    for (int j = 0; j < count; j++)
        out[j * rows + r] = _mm512_reduce_add_ps(sum[j]);
}

#define ROWS16(COUNT)                                                                       \
    if (m->kind == 4)                                                                       \
        for (int64_t r = start; r < stop; r++)                                              \
            row16(m, 4, r, COUNT, x, scales, out, rows, factors);                           \
    else                                                                                    \
        for (int64_t r = start; r < stop; r++)                                              \
            row16(m, 8, r, COUNT, x, scales, out, rows, factors)

/* As joulesmith_sparse, for codes, with the inputs of joulesmith_inputs; count 1 to 4.
   factors: room for 4 m->blocks floats. */
void joulesmith_sparse16(const matrix *m, int64_t start, int64_t stop, int32_t count,
                         const int16_t *x, const float *scales, float *out, int64_t rows,
                         float *factors)
{
    switch (count) {
    case 1: ROWS16(1); break;
    case 2: ROWS16(2); break;
    case 3: ROWS16(3); break;
    default: ROWS16(4); break;
    }
}

#define ROWS(KIND, COUNT)                                                                   \
    for (int64_t r = start; r < stop; r++)                                                  \
        row(m, KIND, r, COUNT, x, 64 * m->blocks, COUNT ? out : out + (r - start) * 64 * m->blocks, \
            rows, steps)

#define KINDS(COUNT)                                                                        \
    switch (m->kind) {                                                                      \
    case 4: ROWS(4, COUNT); break;                                                          \
    case 8: ROWS(8, COUNT); break;                                                          \
    case 16: ROWS(16, COUNT); break;                                                        \
    default: ROWS(17, COUNT); break;                                                        \
    }

/* x (count, 64 blocks) float32 -> out (count, rows), columns start to stop; count 0: weights of
   these rows -> out (stop - start, 64 blocks). steps: room for m->groups floats. */
void joulesmith_sparse(const matrix *m, int64_t start, int64_t stop, int32_t count, const float *x,
                       float *out, int64_t rows, float *steps)
{
    switch (count) {
    case 0: KINDS(0); break;
    case 1: KINDS(1); break;
    case 2: KINDS(2); break;
    case 3: KINDS(3); break;
    default: KINDS(4); break;
    }
}

/* Rows in tiles that share their columns: m holds only those, and columns (tiles, 64 m->blocks)
   says which of x's they are. x (count, stride) -> out (count, rows), tiles start to stop. room:
   for count * (100 m->blocks) + m->groups + 4 m->blocks floats. rounds: 16-bit inputs. */
void joulesmith_columns(const matrix *m, const int32_t *columns, int64_t height, int64_t start,
                        int64_t stop, int32_t count, const float *x, int64_t stride, float *out,
                        int64_t rows, float *room, int32_t rounds)
{
    int64_t wide = 64 * m->blocks;
    float *scales = room + count * wide, *steps = scales + count * m->blocks;
    int16_t *whole = (int16_t *)(steps + m->groups + 4 * m->blocks);
    for (int64_t t = start; t < stop; t++) {
        const int32_t *from = columns + t * wide;
        for (int j = 0; j < count; j++) {
            for (int64_t c = 0; c < wide; c += 16)
                _mm512_storeu_ps(room + j * wide + c,
                                 _mm512_i32gather_ps(_mm512_loadu_si512(from + c), x + j * stride, 4));
            if (rounds)
                joulesmith_inputs(room + j * wide, m->blocks, whole + j * wide, scales + j * m->blocks);
        }
        int64_t first = t * height, last = first + height < rows ? first + height : rows;
        if (rounds)
            joulesmith_sparse16(m, first, last, count, whole, scales, out, rows, steps);
        else
            joulesmith_sparse(m, first, last, count, room, out, rows, steps);
    }
}
