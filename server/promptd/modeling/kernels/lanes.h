/* Vectors of float32 numbers, as GCC and Clang have them for every processor. */
#ifndef PROMPTD_LANES_H
#define PROMPTD_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
#define LANES_16 1
#else
#define LANES_16 0 /* 8 */
#endif
enum { LANES = LANES_16 ? 16 : 8 };

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));

/* Lanes of two vectors, by their numbers: the second one's follow the first one's. */
#ifdef __clang__
#define MIX(first, second, ...) __builtin_shufflevector(first, second, __VA_ARGS__)
#else
#define MIX(first, second, ...) __builtin_shuffle(first, second, (integers){__VA_ARGS__})
#endif

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

/* The lanes' sum, always in this order. */
static INLINE float sum_of(lanes values)
{
    float parts[LANES];
    memcpy(parts, &values, sizeof parts);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            parts[i] += parts[i + width];
    return parts[0];
}

/* The sums of LANES vectors, each in the order of `sum_of`, one in each lane. */
static INLINE lanes sums_of(lanes *values)
{
#if LANES_16
    for (int i = 0; i < 16; i += 2)
        values[i / 2] = MIX(values[i], values[i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                        MIX(values[i], values[i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 8; i += 2)
        values[i / 2] = MIX(values[i], values[i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                        MIX(values[i], values[i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 4; i += 2)
        values[i / 2] = MIX(values[i], values[i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                        MIX(values[i], values[i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return MIX(values[0], values[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           MIX(values[0], values[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    for (int i = 0; i < 8; i += 2)
        values[i / 2] = MIX(values[i], values[i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                        MIX(values[i], values[i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 4; i += 2)
        values[i / 2] = MIX(values[i], values[i + 1], 0, 1, 4, 5, 8, 9, 12, 13) +
                        MIX(values[i], values[i + 1], 2, 3, 6, 7, 10, 11, 14, 15);
    return MIX(values[0], values[1], 0, 2, 4, 6, 8, 10, 12, 14) + MIX(values[0], values[1], 1, 3, 5, 7, 9, 11, 13, 15);
#endif
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
