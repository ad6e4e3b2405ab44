/* Rows of float32 numbers become 8-bit integers with a scale a row, for a product in integers. A NaN or an infinity in a
 * row makes its size, and with it what comes of the row, not finite.
 *
 * Compiled by kernels/__init__.py.
 */
#include "lanes.h"

/* Fewer numbers than this are not worth waking other threads for. */
enum { ALONE = 1 << 14 };

static INLINE lanes load_up_to(const float *at, int64_t count)
{
    float values[LANES] = {0};
    memcpy(values, at, (count < LANES ? count : LANES) * sizeof(float));
    return load_lanes(values);
}

/* A row's size is the largest magnitude in it; its integers go from -largest to largest, stored from 1 on. */
void promptd_quantize(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t largest, uint8_t *integers_out,
                      float *sizes, int64_t num_threads)
{
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
#pragma omp parallel for schedule(static) num_threads(num_rows * num_inputs > ALONE ? num_threads : 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = rows + row * num_inputs;
        uint8_t *to = integers_out + row * num_inputs;
        lanes most = {0};
        for (int64_t i = 0; i < num_inputs; i += LANES) {
            lanes values = num_inputs - i < LANES ? load_up_to(from + i, num_inputs - i) : load_lanes(from + i);
            lanes magnitudes = (lanes)((integers)values & 0x7fffffff);
            most = select_lanes((magnitudes > most) | (magnitudes != magnitudes), magnitudes, most);
        }
        float size = most[0];
        for (int lane = 1; lane < LANES; lane++)
            size = most[lane] > size || most[lane] != most[lane] ? most[lane] : size;
        sizes[row] = size;
        float scale = (float)largest / (size > 1.17549435e-38f ? size : 1.17549435e-38f);
        for (int64_t i = 0; i < num_inputs; i += LANES) {
            lanes values = num_inputs - i < LANES ? load_up_to(from + i, num_inputs - i) : load_lanes(from + i);
            integers whole = __builtin_convertvector(values * scale + ((float)largest + 1.5f), integers);
            bytes small = __builtin_convertvector(whole, bytes);
            memcpy(to + i, &small, num_inputs - i < LANES ? num_inputs - i : LANES);
        }
    }
}
