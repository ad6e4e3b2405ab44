/* Attention of single tokens over keys and values where they lie, for one layer of one step, on the CPU; and how a
 * step's keys and values get there.
 *
 * A row reads a list of spans of the pool; what all rows of a run begin with is read once for them. A row's keys are
 * taken 64 at a time, counted from its first key wherever spans begin and end, with a running softmax (Milakov and
 * Gimelshein, 2018): what a row gets depends neither on its neighbours nor on how its keys are cut into spans. Where
 * there is a bias, each score has that of its key's distance. Sums are float32; a NaN or an infinity in any key or value
 * stays one.
 *
 * Compiled by kernels/__init__.py, once for each kind of number (numbers.h).
 */
#include <stdlib.h>

#include "numbers.h"
#include "softmax.h"

enum { MAX_DIM = 256, AHEAD = 32 };

/* One query's softmax so far: the largest score, the sum of exp(score - largest), the values weighted by it. */
typedef struct {
    float query[MAX_DIM];
    float sum[MAX_DIM];
    float largest, total;
    const float *bias;
    int64_t num_keys; /* of its row */
    number *out;
} state;

typedef struct {
    const number *query;
    const number *keys, *values; /* [num_kv_heads, num_slots, dim] */
    number *out;                 /* [num_tokens, num_heads, dim] */
    int64_t query_head_stride, query_token_stride, num_slots;
    int64_t num_heads, num_kv_heads, dim; /* dim <= MAX_DIM */
    float scale;
    const float *bias; /* [num_heads, reach + 1], of keys `reach` (and more) to 0 tokens back; NULL for none */
    int64_t reach;
} layer;

/* The rows, the same for every layer: runs [num_runs + 1] index tokens and first_spans; first_spans [num_rows + 1]
 * index spans, which are pairs of a first slot and a length. The rows of a run begin with num_shared [num_runs] keys in
 * the same slots, though not always in as many spans. */
typedef struct {
    int64_t num_runs, max_rows; /* no run has more rows */
    const int64_t *runs, *num_shared, *tokens, *first_spans, *spans;
} rows;

static INLINE void prefetch(const number *at, int64_t dim)
{
    for (int64_t byte = 0; byte < dim * (int64_t)sizeof(number); byte += 64)
        __builtin_prefetch((const char *)at + byte);
}

/* A key times a query, all but the sum of the lanes; and of what fills no vector, at the end. */
static INLINE lanes products_of(const state *row, const number *key, int64_t dim)
{
    lanes products = {0};
    for (int64_t i = 0; i + LANES <= dim; i += LANES)
        products += load_lanes(row->query + i) * load_numbers(key + i);
    return products;
}

static INLINE float rest_of(const state *row, const number *key, int64_t dim, float product)
{
    for (int64_t i = dim / LANES * LANES; i < dim; i++)
        product += row->query[i] * value_of(key[i]);
    return product;
}

/* Scores of `count` keys that lie side by side. The first query's fetch `values`, which are read next, and keys that
 * come later meanwhile; for the others `values` is NULL. */
static INLINE void score(const state *row, const number *keys, const number *values, int64_t count, int64_t dim,
                         float *scores)
{
    int64_t key = 0;
    for (; key + LANES <= count; key += LANES) {
        lanes products[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            if (values) {
                prefetch(keys + (key + i + AHEAD) * dim, dim);
                prefetch(values + (key + i) * dim, dim);
            }
            products[i] = products_of(row, keys + (key + i) * dim, dim);
        }
        store_lanes(scores + key, sums_of(products));
        for (int64_t i = 0; dim % LANES && i < LANES; i++)
            scores[key + i] = rest_of(row, keys + (key + i) * dim, dim, scores[key + i]);
    }
    for (; key < count; key++) {
        if (values) {
            prefetch(keys + (key + AHEAD) * dim, dim);
            prefetch(values + key * dim, dim);
        }
        scores[key] = rest_of(row, keys + key * dim, dim, sum_of(products_of(row, keys + key * dim, dim)));
    }
}

/* Add the bias of `count` keys from number `first` on; a row's last key is that of its own token. */
static INLINE void add_bias(const state *row, int64_t reach, int64_t first, int64_t count, float *scores)
{
    int64_t at = first + 1 - row->num_keys + reach;
    for (int64_t key = 0; row->bias && key < count; key++)
        scores[key] += row->bias[at + key > 0 ? at + key : 0];
}

static INLINE void add_values(state *row, const number *values, int64_t count, int64_t dim, const float *weights)
{
    lanes sums[MAX_DIM / LANES];
    for (int64_t i = 0; i < dim / LANES; i++)
        sums[i] = load_lanes(row->sum + i * LANES);
    for (int64_t key = 0; key < count; key++) {
        const number *at = values + key * dim;
        for (int64_t i = 0; i < dim / LANES; i++)
            sums[i] += weights[key] * load_numbers(at + i * LANES);
        for (int64_t i = dim / LANES * LANES; i < dim; i++)
            row->sum[i] += weights[key] * value_of(at[i]);
    }
    for (int64_t i = 0; i < dim / LANES; i++)
        store_lanes(row->sum + i * LANES, sums[i]);
}

/* Keys number `done` up to `end` of these spans, for queries that all read them: 64 keys stay in the nearest cache
 * for all of them. */
static INLINE void attend_keys(state *queries, int64_t num_queries, const number *keys, const number *values,
                               const int64_t *spans, int64_t done, int64_t end, int64_t reach, int64_t dim)
{
    float scores[CHUNK];
    int64_t span = 0, at = done;
    while (done < end && at >= spans[2 * span + 1])
        at -= spans[2 * span++ + 1];
    while (done < end) {
        int64_t count = end - done < CHUNK ? end - done : CHUNK, next_span = span, next_at = at;
        for (int64_t query = 0; query < num_queries; query++) {
            int64_t filled = 0, used = 0;
            for (next_span = span, next_at = at; filled < count;) {
                int64_t left = spans[2 * next_span + 1] - next_at, part = left < count - filled ? left : count - filled;
                int64_t first = (spans[2 * next_span] + next_at) * dim;
                score(queries + query, keys + first, query ? NULL : values + first, part, dim, scores + filled);
                filled += part;
                next_at += part;
                if (part == left)
                    next_span++, next_at = 0;
            }
            add_bias(queries + query, reach, done, filled, scores);
            for (int64_t key = filled; key < CHUNK; key++)
                scores[key] = -INFINITY;
            weigh(scores, queries[query].sum, dim, &queries[query].largest, &queries[query].total);
            for (next_span = span, next_at = at; used < count;) {
                int64_t left = spans[2 * next_span + 1] - next_at, part = left < count - used ? left : count - used;
                add_values(queries + query, values + (spans[2 * next_span] + next_at) * dim, part, dim, scores + used);
                used += part;
                next_at += part;
                if (part == left)
                    next_span++, next_at = 0;
            }
        }
        span = next_span, at = next_at, done += count;
    }
}

static INLINE void attend_run(const layer *one, const rows *all, int64_t run, int64_t head, int64_t dim, state *states)
{
    int64_t group = one->num_heads / one->num_kv_heads;
    int64_t first = all->runs[run], num_rows = all->runs[run + 1] - first;
    const number *keys = one->keys + head * one->num_slots * dim;
    const number *values = one->values + head * one->num_slots * dim;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t num_keys = 0;
        for (int64_t span = all->first_spans[first + row]; span < all->first_spans[first + row + 1]; span++)
            num_keys += all->spans[2 * span + 1];
        for (int64_t query = 0; query < group; query++) {
            state *own = states + row * group + query;
            int64_t token = all->tokens[first + row], at = head * group + query;
            const number *from = one->query + at * one->query_head_stride + token * one->query_token_stride;
            for (int64_t i = 0; i < dim; i++)
                own->query[i] = value_of(from[i]) * one->scale, own->sum[i] = 0.0f;
            own->largest = -INFINITY, own->total = 0.0f;
            own->bias = one->bias ? one->bias + at * (one->reach + 1) : NULL, own->num_keys = num_keys;
            own->out = one->out + (token * one->num_heads + at) * dim;
        }
    }
    int64_t done = num_rows > 1 ? all->num_shared[run] / CHUNK * CHUNK : 0;
    attend_keys(states, num_rows * group, keys, values, all->spans + 2 * all->first_spans[first], 0, done, one->reach,
                dim);
    for (int64_t row = 0; row < num_rows; row++)
        attend_keys(states + row * group, group, keys, values, all->spans + 2 * all->first_spans[first + row], done,
                    states[row * group].num_keys, one->reach, dim);
    for (int64_t query = 0; query < num_rows * group; query++) {
        state *own = states + query;
        float share = 1.0f / own->total;
        for (int64_t i = 0; i < dim; i++)
            own->out[i] = rounded(own->sum[i] * share);
    }
}

/* Returns 0; 1 where there is no memory, 2 where a span is not in the pool: then nothing may be read from `out`. */
int promptd_decode_attention(const layer *one, const rows *all, int64_t num_threads)
{
    int64_t num_rows = all->runs[all->num_runs];
    for (int64_t span = 0; span < all->first_spans[num_rows]; span++) {
        int64_t start = all->spans[2 * span], length = all->spans[2 * span + 1];
        if (start < 0 || length < 1 || start + length > one->num_slots)
            return 2;
    }
    int64_t num_states = all->max_rows * (one->num_heads / one->num_kv_heads), failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        state *states = malloc(num_states * sizeof(state));
        if (states == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < all->num_runs * one->num_kv_heads; task++) {
            int64_t run = task / one->num_kv_heads, head = task % one->num_kv_heads;
            if (states == NULL)
                continue;
            if (one->dim == 64)
                attend_run(one, all, run, head, 64, states);
            else if (one->dim == 128)
                attend_run(one, all, run, head, 128, states);
            else
                attend_run(one, all, run, head, one->dim, states);
        }
        free(states);
    }
    return (int)failed;
}

/* Store tokens [num_heads, num_tokens, dim], strided, at their slots of [num_heads, num_slots, dim]. Returns 0, or 2
 * where a slot is not in the pool: then nothing is stored. */
int promptd_store(const number *from, int64_t head_stride, int64_t token_stride, number *to, int64_t num_heads,
                  int64_t num_slots, int64_t dim, const int64_t *slots, int64_t num_tokens, int64_t num_threads)
{
    for (int64_t token = 0; token < num_tokens; token++)
        if (slots[token] < 0 || slots[token] >= num_slots)
            return 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(num_threads)
    for (int64_t head = 0; head < num_heads; head++)
        for (int64_t token = 0; token < num_tokens; token++)
            memcpy(to + (head * num_slots + slots[token]) * dim, from + head * head_stride + token * token_stride,
                   dim * sizeof(number));
    return 0;
}
