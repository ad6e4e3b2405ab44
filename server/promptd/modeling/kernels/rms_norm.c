/* Root mean square layer normalization (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + epsilon) * weight, in place of
 * the six passes over memory that torch makes. A row's bits depend on no other row. In bfloat16 what is normal is rounded
 * before it meets its weight, as in transformers.
 *
 * Compiled by kernels/__init__.py, once for each kind of number (numbers.h).
 */
#include "numbers.h"

enum { ALONE = 1 << 14 }; /* fewer numbers than this are not worth waking other threads for */

static void normalize(const number *from, const number *weight, number *to, int64_t dim, float epsilon)
{
    lanes squares[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            lanes numbers = load_numbers(from + i + half * LANES);
            squares[half] += numbers * numbers;
        }
    float total = sum_of(squares[0] + squares[1]);
    for (; i < dim; i++)
        total += value_of(from[i]) * value_of(from[i]);
    float factor = 1.0f / sqrtf(total / dim + epsilon);
    for (i = 0; i < dim; i++)
        to[i] = rounded(value_of(weight[i]) * value_of(rounded(value_of(from[i]) * factor)));
}

void promptd_rms_norm(const number *from, const number *weight, number *to, int64_t num_rows, int64_t dim,
                      float epsilon, int64_t num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_rows * dim > ALONE ? num_threads : 1)
    for (int64_t row = 0; row < num_rows; row++)
        normalize(from + row * dim, weight, to + row * dim, dim, epsilon);
}
