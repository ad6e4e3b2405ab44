/* A frozen linear layer in 8-bit integers on the CPU: rows [num_rows, in] of quantize.c times a weight packed once.
 *
 * The weight lies in panels of PANEL outputs, [num_panels, in / 4, PANEL, 4], the last filled up with zeros. A tile of
 * up to TILE rows by one panel stays in registers through all inputs, four of them in one instruction (AVX-512 VNNI);
 * meanwhile each tile fetches its part of the next panel from memory, and one alone what it uses soon itself. Sums of
 * integers are exact, so a row's bits depend neither on its neighbours nor on their number.
 *
 * Compiled by kernels/__init__.py.
 */
#include "lanes.h"

#ifdef __AVX512F__
enum { WIDTH = 3, TILE = 8, PANEL = LANES * WIDTH, ROWS = 24 * TILE };
/* So many inputs ahead one tile alone fetches its weights: another panel would be too far, nobody else finds it. */
enum { NEAR = 64 };
/* Fewer products than this are not worth waking other threads for. */
enum { ALONE = 1 << 19 };

#define UNROLL _Pragma("GCC unroll 8") /* before registers are given out: a sum that is indexed would lie in memory */

typedef struct {
    const uint8_t *rows;
    const float *sizes; /* [num_rows] */
    int64_t num_inputs;
    const int8_t *packed;
    const int32_t *offsets;     /* [num_panels * PANEL], of sums: what the rows' zero adds */
    const float *scales, *bias; /* the same */
    float *out;
    int64_t num_outputs;
} product;

/* Add the products of four inputs each. Whoever calls this file's functions has looked whether the processor has the
 * instruction. */
static INLINE void add_products(integers *sum, integers inputs, integers weights)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(inputs), "v"(weights));
}

/* Rows from `first` on times the panel that begins with `output`. `step` bytes at `ahead` are fetched for each four
 * inputs. */
static INLINE void multiply(int num_rows, const product *one, int64_t first, int64_t output, const int8_t *ahead,
                            int64_t step)
{
    integers sums[TILE][WIDTH];
    UNROLL for (int row = 0; row < num_rows; row++)
        UNROLL for (int i = 0; i < WIDTH; i++)
            sums[row][i] = (integers){0};
    const int8_t *weight = one->packed + output * one->num_inputs;
    const uint8_t *rows = one->rows + first * one->num_inputs;
    for (int64_t input = 0; input < one->num_inputs; input += 4, weight += 4 * PANEL, ahead += step) {
        integers weights[WIDTH];
        UNROLL for (int i = 0; i < WIDTH; i++) {
            if (4 * i * LANES < step)
                __builtin_prefetch(ahead + 4 * i * LANES, 0, 2);
            memcpy(&weights[i], weight + 4 * i * LANES, sizeof weights[i]);
        }
        UNROLL for (int row = 0; row < num_rows; row++) {
            int32_t four;
            memcpy(&four, rows + row * one->num_inputs + input, sizeof four);
            UNROLL for (int i = 0; i < WIDTH; i++)
                add_products(&sums[row][i], (integers){0} + four, weights[i]);
        }
    }
    UNROLL for (int i = 0; i < WIDTH; i++) {
        int64_t at = output + i * LANES, left = one->num_outputs - at;
        lanes scales = load_lanes(one->scales + at), bias = load_lanes(one->bias + at);
        integers offsets;
        memcpy(&offsets, one->offsets + at, sizeof offsets);
        UNROLL for (int row = 0; row < num_rows; row++) {
            lanes sum = __builtin_convertvector(sums[row][i] - offsets, lanes) * scales;
            sum = sum * one->sizes[first + row] + bias;
            float *to = one->out + (first + row) * one->num_outputs + at;
            if (left >= LANES)
                store_lanes(to, sum);
            else if (left > 0)
                memcpy(to, &sum, left * sizeof(float));
        }
    }
}

#define OF_ROWS(n)                                    \
    case n:                                           \
        multiply(n, one, begin, output, ahead, step); \
        break;

/* Rows from `start` to `stop` times one panel. */
static void multiply_panel(const product *one, int64_t start, int64_t stop, int64_t output)
{
    int64_t num_rows = stop - start, num_tiles = (num_rows + TILE - 1) / TILE;
    int64_t step = (4 * PANEL + num_tiles - 1) / num_tiles; /* of the next panel: the tiles share the fetching */
    const int8_t *fetched = one->packed + output * one->num_inputs + (num_tiles > 1 ? one->num_inputs : NEAR) * PANEL;
    for (int64_t tile = 0; tile < num_tiles; tile++) { /* of sizes that differ by one at most */
        int64_t begin = start + tile * num_rows / num_tiles, end = start + (tile + 1) * num_rows / num_tiles;
        const int8_t *ahead = fetched + tile * (one->num_inputs / 4) * step;
        switch (end - begin) {
            OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6) OF_ROWS(7) OF_ROWS(8)
        }
    }
}

int64_t promptd_linear_int8_panel(void) { return PANEL; }

void promptd_linear_int8(const product *one, int64_t num_rows, int64_t num_threads)
{
    int64_t num_panels = (one->num_outputs + PANEL - 1) / PANEL;
    int64_t chunk = num_panels / (8 * num_threads) + 1; /* small enough that nobody waits long for the last */
    if (num_rows * one->num_inputs * one->num_outputs < ALONE)
        num_threads = 1;
#pragma omp parallel num_threads(num_threads)
    for (int64_t start = 0; start < num_rows; start += ROWS) {
        int64_t stop = num_rows - start < ROWS ? num_rows : start + ROWS;
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t panel = 0; panel < num_panels; panel++)
            multiply_panel(one, start, stop, panel * PANEL);
    }
}

#else
/* Outputs of a panel; 0 where this kind of processor has no such instruction. */
int64_t promptd_linear_int8_panel(void) { return 0; }

void promptd_linear_int8(const void *one, int64_t num_rows, int64_t num_threads)
{
    (void)one, (void)num_rows, (void)num_threads;
}
#endif
