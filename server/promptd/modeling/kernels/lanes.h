/* Vectors of float32 numbers, as GCC and Clang have them for every processor. */
#ifndef PROMPTD_LANES_H
#define PROMPTD_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));

static INLINE lanes load_lanes(const float *at)
{
    lanes values;
    memcpy(&values, at, sizeof values);
    return values;
}

static INLINE void store_lanes(float *at, lanes values) { memcpy(at, &values, sizeof values); }

static INLINE lanes select_lanes(integers condition, lanes yes, lanes no)
{
    return (lanes)(((integers)yes & condition) | ((integers)no & ~condition));
}

/* exp(x): two to the whole part times a polynomial of the rest, to 2 units in the last place; what is too small or too
 * large for a float32 becomes the smallest or largest power of two that is not; a NaN stays one. */
static INLINE lanes exponential(lanes x)
{
    lanes turns = x * 1.44269504088896341f;
    turns = select_lanes(turns < -126.0f, (lanes){0} - 126.0f, turns); /* false for a NaN */
    turns = select_lanes(turns > 127.0f, (lanes){0} + 127.0f, turns);
    lanes shifted = turns + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to a whole number, in its lowest bits */
    lanes rest = (turns - (shifted - 12582912.0f)) * 0.693147180559945309f;
    lanes power = 1.0f / 720 * rest + 1.0f / 120;
    power = power * rest + 1.0f / 24;
    power = power * rest + 1.0f / 6;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    integers whole = (integers)shifted - (integers)((lanes){0} + 12582912.0f);
    return power * (lanes)((whole + 127) << 23);
}

#endif
