/* The tanh form of GELU (Hendrycks and Gimpel, 2016), in place of torch's: x / (1 + exp(-2 u)) with
 * u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh(u)) / 2.
 *
 * Compiled by kernels/__init__.py, once for each kind of number (numbers.h).
 */
#include "numbers.h"

enum { BLOCK = 1 << 14 }; /* numbers that one thread takes at a time */

static INLINE lanes gelu(lanes x)
{
    lanes u = x * (0.79788456080286536f + 0.035677408136300125f * x * x);
    return x / (1.0f + exponential(-2.0f * u));
}

void promptd_gelu(const number *from, number *to, int64_t count, int64_t num_threads)
{
#pragma omp parallel for schedule(static) num_threads(count > BLOCK ? num_threads : 1)
    for (int64_t block = 0; block < count; block += BLOCK) {
        int64_t end = block + BLOCK < count ? block + BLOCK : count, at = block;
        for (; at + LANES <= end; at += LANES)
            store_numbers(to + at, gelu(load_numbers(from + at)));
        if (at < end) { /* the same instructions for the rest: bits depend on no place */
            number rest[LANES] = {0};
            memcpy(rest, from + at, (end - at) * sizeof(number));
            store_numbers(rest, gelu(load_numbers(rest)));
            memcpy(to + at, rest, (end - at) * sizeof(number));
        }
    }
}
