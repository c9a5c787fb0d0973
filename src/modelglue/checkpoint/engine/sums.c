/* Weighted sums of tensors in one pass: every input is read once, the result is rounded as it is stored and written once.

   The bits are those of plain torch: numbers are widened to float32, each product and each sum is rounded once (compile with
   -ffp-contract=off), and the result is rounded to nearest, ties to even. The work goes by blocks that stay in the first-level cache.
   Functions with a `const` flag are inlined where the flag is known, so that every loop below has one kind of number and no branch. */

#include <stdint.h>
#include <string.h>

#define INLINED static inline __attribute__((always_inline))
#define EACH for (int k = 0; k < n; k++)

enum { BLOCK = 1024 };
enum kind { FLOAT32, BFLOAT16, FLOAT16 }; /* known to native.py by their numbers */

INLINED int64_t bytes(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* -- numbers as bits -- */

INLINED uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINED float number(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINED uint32_t not_finite(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

/* bfloat16 is the upper half of a float32 */
INLINED float from_bfloat16(uint16_t x) { return number((uint32_t)x << 16); }
INLINED uint32_t to_bfloat16(uint32_t bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; }

/* float16 has 5 bits of exponent, biased by 15 instead of 127, and 10 of fraction; its smallest normal number is 2^-14 */
INLINED float from_float16(uint16_t x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, shifted = (uint32_t)(x & 0x7fff) << 13, exponent = shifted & 0x0f800000u;
    const uint32_t normal = shifted + (112u << 23), special = shifted + (224u << 23);
    const uint32_t subnormal = bits_of(number(shifted + (113u << 23)) - 0x1p-14f); /* drops the leading 1 that it has not */
    return number((exponent == 0x0f800000u ? special : exponent ? normal : subnormal) | sign);
}
INLINED uint16_t to_float16(uint32_t bits) /* of a finite number; what `beyond_float16` comes out as anything */
{
    const uint32_t size = bits & 0x7fffffffu;
    const uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const uint32_t subnormal = bits_of(number(size) + 0.5f) - bits_of(0.5f); /* the sum is rounded to multiples of 2^-24 */
    return (uint16_t)((size < 113u << 23 ? subnormal : normal) | (bits >> 16 & 0x8000));
}
INLINED uint32_t beyond_float16(uint32_t bits) { return (bits & 0x7fffffffu) >= 0x477ff000u; } /* 65520 rounds to infinity */

INLINED float read(const void *p, const int bfloat, int k)
{
    return bfloat ? from_bfloat16(((const uint16_t *)p)[k]) : ((const float *)p)[k];
}

/* -- one block of n numbers: the loops, and below each the choice between its versions -- */

/* scale x, or scale (x - below) where there is a base */
INLINED float term(const void *p, const int bfloat, float scale, const float *below, int k)
{
    const float x = read(p, bfloat, k);
    return (below ? x - below[k] : x) * scale;
}

INLINED void adding(float *restrict sum, const void *p, const int bfloat, float scale, const float *below, const int first, int n)
{
    EACH { const float x = term(p, bfloat, scale, below, k); sum[k] = first ? x : sum[k] + x; }
}
static void add(float *restrict sum, const void *p, int kind, float scale, const float *below, int first, int n)
{
    float wide[BLOCK];
    if (kind == FLOAT16) { EACH wide[k] = from_float16(((const uint16_t *)p)[k]); p = wide; }
#define ADDING(bfloat, first) { if (below) adding(sum, p, bfloat, scale, below, first, n); else adding(sum, p, bfloat, scale, 0, first, n); }
    if (kind == BFLOAT16) { if (first) ADDING(1, 1) else ADDING(1, 0) }
    else { if (first) ADDING(0, 1) else ADDING(0, 0) }
}

/* The result as it is stored: `sum`, or where that is 0 the sum of two bfloat16 inputs, which needs no buffer; plus the base, rounded if
   `narrow`, and written as bfloat16 if `half`. Returns whether some number is not finite. */
struct two { const void *p, *q; float scale, second; };

INLINED uint32_t storing(const float *sum, struct two two, const float *below, const int narrow, void *restrict out, const int half, int n)
{
    uint32_t bad = 0;
    EACH {
        float x = sum ? sum[k] : term(two.p, 1, two.scale, below, k) + term(two.q, 1, two.second, below, k);
        if (below) x += below[k];
        uint32_t bits = bits_of(x);
        bad |= not_finite(bits);
        if (narrow) { bits = to_bfloat16(bits) << 16; bad |= not_finite(bits); }
        if (half) ((uint16_t *)out)[k] = (uint16_t)(bits >> 16); else ((float *)out)[k] = number(bits);
    }
    return bad;
}
static uint32_t store_float16(const float *x, void *restrict out, int half, int n)
{
    uint32_t bad = 0;
    EACH bad |= beyond_float16(bits_of(x[k]));
    if (half) EACH ((uint16_t *)out)[k] = to_float16(bits_of(x[k]));
    else EACH ((float *)out)[k] = from_float16(to_float16(bits_of(x[k])));
    return bad;
}
static uint32_t store(const float *sum, struct two two, const float *below, int stored, void *restrict out, int kind, int n)
{
    float wide[BLOCK];
    void *to = stored == FLOAT16 ? wide : out;
    uint32_t bad;
#define STORING(sum, below) ( \
        stored != BFLOAT16 ? storing(sum, two, below, 0, to, 0, n) : \
        kind == BFLOAT16 ? storing(sum, two, below, 1, to, 1, n) : storing(sum, two, below, 1, to, 0, n))
    if (sum) bad = below ? STORING(sum, below) : STORING(sum, 0);
    else bad = below ? STORING(0, below) : STORING(0, 0);
    return stored == FLOAT16 ? bad | store_float16(wide, out, kind == FLOAT16, n) : bad;
}

/* -- whole tensors -- */

/* out = sum_i scales[i] inputs[i], or base + sum_i scales[i] (inputs[i] - base), all of `length`. Rounded to the kind `stored`, written as
   that or as float32. Returns whether some number in it is not finite. */
int modelglue_sum(int64_t length, int count, const void **inputs, const int *kinds, const float *scales,
                  const void *base, int base_kind, int stored, void *out, int out_kind)
{
    float sum[BLOCK], base_block[BLOCK];
    const float *below = base ? base_block : 0;
    const int pair = count == 2 && kinds[0] == BFLOAT16 && kinds[1] == BFLOAT16;
    uint32_t bad = 0;
#define AT(p, kind) ((const char *)(p) + at * bytes(kind))
    for (int64_t at = 0; at < length; at += BLOCK) {
        const int n = length - at < BLOCK ? (int)(length - at) : BLOCK;
        struct two two = {0};
        if (base) add(base_block, AT(base, base_kind), base_kind, 1.0f, 0, 1, n);
        if (pair) two = (struct two){AT(inputs[0], BFLOAT16), AT(inputs[1], BFLOAT16), scales[0], scales[1]};
        else for (int i = 0; i < count; i++) add(sum, AT(inputs[i], kinds[i]), kinds[i], scales[i], below, i == 0, n);
        bad |= store(pair ? 0 : sum, two, below, stored, (char *)out + at * bytes(out_kind), out_kind, n);
    }
    return bad != 0;
}

/* -- inner products -- */

/* The order of additions is fixed, so that the sums are the same everywhere (methods/_sums.py adds in this order with plain torch): the
   1,024 products of a run are halved to 64 in float32, the 64 times 64 sums of a block are halved to one in float64. To halve is to add the
   upper half of the numbers to the lower half. What is missing in a run or a block counts as 0. */
enum { RUN = BLOCK, LANES = 64, RUNS = 64, SUMS = LANES * RUNS };

static void halve_run(float *restrict lanes, const float *restrict a, const float *restrict b)
{
#define PRODUCT(j) (a[k + LANES * (j)] * b[k + LANES * (j)])
#define OF_2(j) (PRODUCT(j) + PRODUCT((j) + 8))
#define OF_4(j) (OF_2(j) + OF_2((j) + 4))
#define OF_8(j) (OF_4(j) + OF_4((j) + 2))
    for (int k = 0; k < LANES; k++) lanes[k] = OF_8(0) + OF_8(1);
}
static double halve_block(const float *lanes)
{
    double sums[SUMS / 2];
    for (int k = 0; k < SUMS / 2; k++) sums[k] = (double)lanes[k] + (double)lanes[k + SUMS / 2];
    for (int half = SUMS / 4; half; half /= 2)
        for (int k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

/* sums[block][pair]: inner products of every pair i <= j of the inputs, or of their differences to the base, over each block of 65,536.
   `room` is for count * RUN + pairs * SUMS numbers. */
void modelglue_grams(int64_t length, int count, const void **inputs, const int *kinds, const void *base, int base_kind,
                     float *room, double *sums)
{
    float base_run[RUN], *lanes = room + (int64_t)count * RUN;
    for (int64_t block = 0; block < length; block += RUN * RUNS) {
        for (int run = 0; run < RUNS; run++) {
            const int64_t at = block + (int64_t)run * RUN;
            const int n = length - at < RUN ? (int)(length > at ? length - at : 0) : RUN;
            float *to = lanes + run * LANES;
            if (base && n) add(base_run, AT(base, base_kind), base_kind, 1.0f, 0, 1, n);
            for (int i = 0; i < count && n; i++) {
                float *row = room + (int64_t)i * RUN;
                add(row, AT(inputs[i], kinds[i]), kinds[i], 1.0f, base ? base_run : 0, 1, n);
                memset(row + n, 0, sizeof(float) * (size_t)(RUN - n));
            }
            for (int i = 0; i < count; i++)
                for (int j = i; j < count; j++, to += SUMS) {
                    if (n) halve_run(to, room + (int64_t)i * RUN, room + (int64_t)j * RUN);
                    else memset(to, 0, sizeof(float) * LANES);
                }
        }
        for (int pair = 0; pair < count * (count + 1) / 2; pair++) *sums++ = halve_block(lanes + (int64_t)pair * SUMS);
    }
}
