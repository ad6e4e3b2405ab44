/* What rows consist of: float32, or with NUMBERS_BFLOAT16 bfloat16, the upper half of a float32. Sums are float32. */
#ifndef PROMPTD_NUMBERS_H
#define PROMPTD_NUMBERS_H

#include "lanes.h"

static INLINE uint32_t bits_of(float from)
{
    uint32_t bits;
    memcpy(&bits, &from, sizeof bits);
    return bits;
}

static INLINE float of_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

#ifndef NUMBERS_BFLOAT16
enum { IS_FLOAT32 = 1 };
typedef float number;
static INLINE float value_of(number from) { return from; }
static INLINE number rounded(float from) { return from; }
static INLINE lanes load_numbers(const number *at) { return load_lanes(at); }
static INLINE void store_numbers(number *at, lanes values) { store_lanes(at, values); }

#else
enum { IS_FLOAT32 = 0 };
typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t wholes __attribute__((vector_size(LANES * 4)));

static INLINE float value_of(number from) { return of_bits((uint32_t)from << 16); }

/* To the nearest, halves to even; a NaN is one of few bits, for its own might round to an infinity. */
static INLINE number rounded(float from)
{
    uint32_t bits = bits_of(from);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static INLINE lanes load_numbers(const number *at)
{
    halves upper;
    memcpy(&upper, at, sizeof upper);
    return (lanes)(__builtin_convertvector(upper, wholes) << 16);
}

static INLINE void store_numbers(number *at, lanes values)
{
    wholes bits = (wholes)values, near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    wholes is_nan = (wholes)(values != values);
    halves upper = __builtin_convertvector((near & ~is_nan) | (0x7fc0 & is_nan), halves);
    memcpy(at, &upper, sizeof upper);
}
#endif

#endif
