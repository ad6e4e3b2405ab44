/* Attention of a text's tokens in float32, for one layer, on the CPU: `num_queries` tokens that follow one another, over
 * keys that lie side by side. Either every token sees all keys, or the keys are the tokens' own and each sees those up
 * to itself.
 *
 * QUERIES tokens of one head take CHUNK keys at a time with a running softmax (in blocks as in FlashAttention,
 * Dao et al., 2022): scores are a product with the chunk's keys, turned around, and what is
 * gathered a product of the weights with its values, both in tiles that stay in registers. A token's sums go over
 * dimensions and over keys from first to last, so its bits depend on no other token.
 *
 * Compiled by kernels/__init__.py.
 */
#include <stdlib.h>

#include "softmax.h"

#ifdef __AVX512F__ /* 32 registers */
enum { WIDTH = 4 };
#else /* 16, or fewer */
enum { WIDTH = 2 };
#endif
enum { TILE = 6, PANEL = LANES * WIDTH, QUERIES = 32 * TILE };

typedef struct {
    const float *query, *keys, *values; /* [num_heads or num_kv_heads, num_queries or num_keys, dim], strided */
    float *out;                         /* [num_queries, num_heads, dim] */
    float *log_sums;                    /* [num_heads, num_queries] */
    int64_t query_head_stride, query_token_stride, key_head_stride, key_token_stride;
    int64_t value_head_stride, value_token_stride;
    int64_t num_heads, num_kv_heads, num_queries, num_keys, dim; /* dim is a multiple of 64 */
    float scale;
    int64_t is_causal;
} layer;

/* What one thread works on. */
typedef struct {
    float *query; /* [QUERIES, dim], scaled */
    float *sums;  /* [QUERIES, dim]: values weighted by exp(score - largest) */
    float *keys;  /* [dim, CHUNK] */
    float scores[QUERIES * CHUNK];
    float largest[QUERIES], total[QUERIES];
} room;

/* TILE rows of `depth` numbers by a panel of weights, from zero or from what is in `out` already. */
static INLINE void multiply(const float *rows, int64_t row_stride, const float *weight, int64_t weight_stride,
                            int64_t depth, float *out, int64_t out_stride, int adds)
{
    lanes sums[TILE][WIDTH];
    for (int row = 0; row < TILE; row++)
        for (int i = 0; i < WIDTH; i++)
            sums[row][i] = adds ? load_lanes(out + row * out_stride + i * LANES) : (lanes){0};
    for (int64_t at = 0; at < depth; at++, weight += weight_stride) {
        lanes weights[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            weights[i] = load_lanes(weight + i * LANES);
        for (int row = 0; row < TILE; row++) {
            float value = rows[row * row_stride + at];
            for (int i = 0; i < WIDTH; i++)
                sums[row][i] += weights[i] * value;
        }
    }
    for (int row = 0; row < TILE; row++)
        for (int i = 0; i < WIDTH; i++)
            store_lanes(out + row * out_stride + i * LANES, sums[row][i]);
}

static void attend_block(const layer *all, int64_t head, int64_t first, room *one)
{
    int64_t dim = all->dim, kv_head = head / (all->num_heads / all->num_kv_heads);
    int64_t count = all->num_queries - first < QUERIES ? all->num_queries - first : QUERIES;
    int64_t end = all->is_causal ? first + count : all->num_keys;
    const float *query = all->query + head * all->query_head_stride + first * all->query_token_stride;
    const float *keys = all->keys + kv_head * all->key_head_stride;
    const float *values = all->values + kv_head * all->value_head_stride;
    memset(one->sums, 0, QUERIES * dim * sizeof(float));
    memset(one->query, 0, QUERIES * dim * sizeof(float)); /* the last tile may have fewer rows */
    for (int64_t row = 0; row < count; row++) {
        one->largest[row] = -INFINITY, one->total[row] = 0.0f;
        for (int64_t i = 0; i < dim; i++)
            one->query[row * dim + i] = query[row * all->query_token_stride + i] * all->scale;
    }
    for (int64_t at = 0; at < end; at += CHUNK) {
        int64_t num_keys = end - at < CHUNK ? end - at : CHUNK;
        int64_t seen_from = all->is_causal && at > first ? at - first : 0; /* the first token that sees one of these */
        int64_t begin = seen_from / TILE * TILE;
        for (int64_t key = 0; key < num_keys; key++)
            for (int64_t i = 0; i < dim; i++)
                one->keys[i * CHUNK + key] = keys[(at + key) * all->key_token_stride + i];
        for (int64_t i = 0; i < dim; i++)
            for (int64_t key = num_keys; key < CHUNK; key++)
                one->keys[i * CHUNK + key] = 0.0f;
        for (int64_t row = begin; row < count; row += TILE)
            for (int64_t panel = 0; panel < CHUNK; panel += PANEL)
                multiply(one->query + row * dim, dim, one->keys + panel, CHUNK, dim, one->scores + row * CHUNK + panel,
                         CHUNK, 0);
        for (int64_t row = begin; row < count; row++) {
            int64_t seen = all->is_causal ? first + row + 1 - at : num_keys;
            float *scores = one->scores + row * CHUNK;
            if (seen <= 0) {
                memset(scores, 0, CHUNK * sizeof(float));
                continue;
            }
            for (int64_t key = seen < num_keys ? seen : num_keys; key < CHUNK; key++)
                scores[key] = -INFINITY;
            weigh(scores, one->sums + row * dim, dim, one->largest + row, one->total + row);
        }
        for (int64_t row = begin; row < count; row += TILE)
            for (int64_t panel = 0; panel < dim; panel += PANEL)
                multiply(one->scores + row * CHUNK, CHUNK, values + at * all->value_token_stride + panel,
                         all->value_token_stride, num_keys, one->sums + row * dim + panel, dim, 1);
    }
    for (int64_t row = 0; row < count; row++) {
        float share = 1.0f / one->total[row], *out = all->out + ((first + row) * all->num_heads + head) * dim;
        for (int64_t i = 0; i < dim; i++)
            out[i] = one->sums[row * dim + i] * share;
        all->log_sums[head * all->num_queries + first + row] = one->largest[row] + logf(one->total[row]);
    }
}

/* Returns 0, or 1 where there is no memory: then nothing may be read from what it fills. */
int promptd_prefill_attention(const layer *all, int64_t num_threads)
{
    int64_t num_blocks = (all->num_queries + QUERIES - 1) / QUERIES, failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        room *one = malloc(sizeof(room));
        float *numbers = malloc((2 * QUERIES + CHUNK) * all->dim * sizeof(float));
        if (one == NULL || numbers == NULL) {
#pragma omp atomic write
            failed = 1;
        } else {
            one->query = numbers;
            one->sums = numbers + QUERIES * all->dim;
            one->keys = numbers + 2 * QUERIES * all->dim;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_blocks * all->num_heads; task++) { /* those that see most keys first */
            int64_t block = num_blocks - 1 - task / all->num_heads;
            if (one != NULL && numbers != NULL)
                attend_block(all, task % all->num_heads, block * QUERIES, one);
        }
        free(one);
        free(numbers);
    }
    return (int)failed;
}
