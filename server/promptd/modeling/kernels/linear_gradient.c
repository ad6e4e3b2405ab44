/* How a gradient passes a frozen linear layer on the CPU: [num_rows, out] times [out, in], by the weight as linear.c has
 * it packed (panels.h).
 *
 * What a row's outputs of one panel add to an input is a few vectors' product; its lanes are summed at the end. Of INPUTS
 * inputs the sums of all rows stay in the caches, and a panel's weights are read from memory once. For few rows: many
 * take less time where the weight is unpacked.
 *
 * Compiled by kernels/__init__.py, once for each form that weights are stored in.
 */
#include <stdlib.h>

#include "panels.h"

enum { INPUTS = 32, TILE = 4 };

/* Rows of `grads` [num_rows <= TILE, PANEL] times a panel's weights of `count` inputs, added to `sums` [num_rows,
 * INPUTS]; `ahead` words farther lie the next panel's. */
static INLINE void add_panel(int num_rows, const float *grads, int64_t stride, const word *weight, int64_t count,
                             int64_t ahead, lanes (*sums)[INPUTS])
{
    lanes own[TILE][WIDTH];
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < WIDTH; i++)
            own[row][i] = load_lanes(grads + row * stride + i * LANES);
    for (int64_t input = 0; input < count; input += GROUP, weight += PANEL) {
        words weights[WIDTH];
        for (int i = 0; i < WIDTH; i++) {
            __builtin_prefetch(weight + ahead + i * LANES, 0, 2);
            memcpy(&weights[i], weight + i * LANES, sizeof weights[i]);
        }
        for (int part = 0; part < GROUP; part++)
            for (int row = 0; row < num_rows; row++) {
                lanes sum = sums[row][input + part];
                for (int i = 0; i < WIDTH; i++)
                    sum += widened(weights[i], part) * own[row][i];
                sums[row][input + part] = sum;
            }
    }
}

/* Inputs from `first` on, `count` <= INPUTS of them, for all rows. */
static void add_panels(const float *grads, int64_t num_rows, int64_t num_outputs, const word *packed,
                       int64_t num_inputs, int64_t first, int64_t count, lanes (*sums)[INPUTS], float *out)
{
    int64_t size = num_inputs / GROUP * PANEL;
    memset(sums, 0, num_rows * sizeof *sums);
    for (int64_t output = 0; output < num_outputs; output += PANEL) {
        const word *weight = packed + output / PANEL * size + first / GROUP * PANEL;
        for (int64_t row = 0; row < num_rows; row += TILE) {
            const float *from = grads + row * num_outputs + output;
            if (num_rows - row >= TILE)
                add_panel(TILE, from, num_outputs, weight, count, size, sums + row);
            else
                for (int64_t one = row; one < num_rows; one++, from += num_outputs)
                    add_panel(1, from, num_outputs, weight, count, size, sums + one);
        }
    }
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t input = 0; input < count; input += LANES) {
            lanes found = sums_of(sums[row] + input);
            int64_t left = count - input < LANES ? count - input : LANES;
            memcpy(out + row * num_inputs + first + input, &found, left * sizeof(float));
        }
}

/* `num_outputs` is a multiple of PANEL: `grads` are filled up with zeros. Returns 0; 1 where there is no memory. */
int promptd_linear_gradient(const float *grads, int64_t num_rows, int64_t num_outputs, const word *packed, float *out,
                            int64_t num_inputs, int64_t num_threads)
{
    int failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        lanes(*sums)[INPUTS] = aligned_alloc(sizeof(lanes), (num_rows + 1) * sizeof *sums);
        if (sums == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < num_inputs; first += INPUTS)
            if (sums != NULL)
                add_panels(grads, num_rows, num_outputs, packed, num_inputs, first,
                           num_inputs - first < INPUTS ? num_inputs - first : INPUTS, sums, out);
        free(sums);
    }
    return failed;
}
