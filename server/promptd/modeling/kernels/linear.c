/* A frozen linear layer on the CPU: [num_rows, in] times [in, out], from a weight packed once (panels.h). Rows, bias and
 * outputs are float32; with NUMBERS_BFLOAT16 rows and outputs are bfloat16, sums are not.
 *
 * A tile of up to TILE rows by one panel stays in registers while it goes through DEPTH inputs; other tiles of the same
 * panel then find these inputs' weights in the second-level cache. Meanwhile each tile fetches its part of the next
 * inputs' from memory, and one that is alone, what it needs soon itself.
 * Every output is the sum over its inputs from first to last in one accumulator, so a row's bits depend neither on
 * its neighbours nor on their number, nor on how the weight is stored.
 *
 * Compiled by kernels/__init__.py, once for each form that weights are stored in, and for bfloat16 rows with and
 * without PAIRS_OF_BFLOAT16: the processor's instruction for them.
 */
#include <stdlib.h>

#include "panels.h"

#if LANES_16 /* 32 registers */
#define TILE 8
#elif !defined(STORED_BFLOAT16) /* 16, or fewer */
#define TILE 6
#else /* the words that are being widened take some of them */
#define TILE 5
#endif
enum { DEPTH = 256, ROWS = 24 * TILE };
/* So many inputs ahead a tile that is alone fetches: nobody else waits for what lies farther. */
enum { NEAR = 32 };
/* Fewer products than this are not worth waking other threads for. */
enum { ALONE = 1 << 17 };

/* Add the products of the rows' next inputs, GROUP of each, and their weights. */
static INLINE void add_products(int num_rows, lanes sums[][WIDTH], const number *rows, int64_t row_stride,
                                const words *weights)
{
#ifdef PAIRS_OF_BFLOAT16
    for (int row = 0; row < num_rows; row++) {
        int32_t pair;
        memcpy(&pair, rows + row * row_stride, sizeof pair);
        for (int i = 0; i < WIDTH; i++)
            __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[row][i]) : "v"((integers){0} + pair), "v"(weights[i]));
    }
#else
    for (int part = 0; part < GROUP; part++) {
        lanes wide[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            wide[i] = widened(weights[i], part);
        for (int row = 0; row < num_rows; row++) {
            float value = value_of(rows[row * row_stride + part]);
            for (int i = 0; i < WIDTH; i++)
                sums[row][i] += wide[i] * value;
        }
    }
#endif
}

/* One tile through `depth` inputs, from `first` (a bias) or from what is in `out` already. Meanwhile `step` of the
 * words at `ahead` are fetched for each group of inputs. */
static INLINE void multiply(int num_rows, const number *rows, int64_t row_stride, const word *weight, int64_t depth,
                            const float *first, const word *ahead, int64_t step, float *out, int64_t out_stride)
{
    lanes sums[TILE][WIDTH];
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < WIDTH; i++)
            sums[row][i] = load_lanes((first ? first : out + row * out_stride) + i * LANES);
    for (int64_t input = 0; input < depth; input += GROUP, weight += PANEL, ahead += step) {
        words weights[WIDTH];
        for (int i = 0; i < WIDTH; i++) {
            if (i * LANES < step)
                __builtin_prefetch(ahead + i * LANES, 0, 2);
            memcpy(&weights[i], weight + i * LANES, sizeof weights[i]);
        }
        add_products(num_rows, sums, rows + input, row_stride, weights);
    }
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < WIDTH; i++)
            store_lanes(out + row * out_stride + i * LANES, sums[row][i]);
}

#define OF_ROWS(n)                                                                                  \
    case n:                                                                                         \
        multiply(n, rows, row_stride, weight, depth, first, ahead, step, out, out_stride);              \
        break;

static void multiply_tile(int num_rows, const number *rows, int64_t row_stride, const word *weight, int64_t depth,
                          const float *first, const word *ahead, int64_t step, float *out, int64_t out_stride)
{
    switch (num_rows) {
        OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5)
#if TILE > 5
        OF_ROWS(6)
#endif
#if TILE > 6
        OF_ROWS(7) OF_ROWS(8)
#endif
    }
}

/* `num_rows` <= ROWS rows times one panel, of which `width` outputs are real. */
static void multiply_panel(const number *rows, int64_t num_rows, int64_t row_stride, const word *weight,
                           int64_t num_inputs, const float *bias, number *out, int64_t out_stride, int64_t width)
{
    float aside[ROWS * PANEL]; /* of the last panel, which is wider than what is left of a row, and before rounding */
    int is_aside = !IS_FLOAT32 || width < PANEL;
    float *target = is_aside ? aside : (float *)out;
    int64_t stride = is_aside ? PANEL : out_stride, num_tiles = (num_rows + TILE - 1) / TILE;
    int64_t step = (PANEL + num_tiles - 1) / num_tiles; /* of the next inputs' weights: the tiles share the fetching */
    int64_t distance = num_tiles > 1 ? DEPTH : NEAR;
    for (int64_t at = 0; at < num_inputs; at += DEPTH) {
        int64_t depth = num_inputs - at < DEPTH ? num_inputs - at : DEPTH;
        for (int64_t tile = 0; tile < num_tiles; tile++) { /* of sizes that differ by one at most */
            int64_t begin = tile * num_rows / num_tiles, end = (tile + 1) * num_rows / num_tiles;
            multiply_tile(end - begin, rows + begin * row_stride + at, row_stride, weight + at / GROUP * PANEL, depth,
                          at ? NULL : bias, weight + ((at + distance) * PANEL + tile * depth * step) / GROUP, step,
                          target + begin * stride, stride);
        }
    }
    for (int64_t row = 0; is_aside && row < num_rows; row++)
        for (int64_t i = 0; i < width; i++)
            out[row * out_stride + i] = rounded(aside[row * PANEL + i]);
}

/* Outputs of a panel: the weight is packed, and the bias filled up, to a multiple of it. */
int64_t promptd_linear_panel(void) { return PANEL; }

void promptd_linear(const number *rows, int64_t num_rows, int64_t num_inputs, const word *packed, const float *bias,
                    number *out, int64_t num_outputs, int64_t num_threads)
{
    int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    int64_t chunk = num_panels / (8 * num_threads) + 1; /* small enough that nobody waits long for the last */
    number *copy = NULL;
    if (num_rows > TILE && num_inputs % 1024 == 0) /* a tile's rows would lie in one set of the nearest cache */
        copy = malloc(num_rows * (num_inputs + LANES) * sizeof(number));
    const number *from = copy ? copy : rows;
    int64_t stride = num_inputs + (copy ? LANES : 0);
    if (num_rows * num_inputs * num_outputs < ALONE)
        num_threads = 1;
#pragma omp parallel num_threads(num_threads)
    {
        if (copy) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < num_rows; row++)
                memcpy(copy + row * stride, rows + row * num_inputs, num_inputs * sizeof(number));
        }
        for (int64_t start = 0; start < num_rows; start += ROWS) {
            int64_t count = num_rows - start < ROWS ? num_rows - start : ROWS;
#pragma omp for schedule(dynamic, chunk) nowait
            for (int64_t panel = 0; panel < num_panels; panel++) {
                int64_t output = panel * PANEL, left = num_outputs - output;
                multiply_panel(from + start * stride, count, stride, packed + output * (num_inputs / GROUP), num_inputs,
                               bias + output, out + start * num_outputs + output, num_outputs,
                               left < PANEL ? left : PANEL);
            }
        }
    }
    free(copy);
}
