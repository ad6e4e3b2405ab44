/* A running softmax over keys that come CHUNK at a time (Milakov and Gimelshein, 2018). */
#ifndef PROMPTD_SOFTMAX_H
#define PROMPTD_SOFTMAX_H

#include "lanes.h"

enum { CHUNK = 64 };

/* Turn a chunk's scores, of which the last may be -inf for no key, into weights. What was summed before, `total` and the
 * `dim` numbers of `sums`, shrinks to the same scale; `largest` is the largest score so far. */
static INLINE void weigh(float *scores, float *sums, int64_t dim, float *largest, float *total)
{
    lanes most = load_lanes(scores);
    for (int64_t key = LANES; key < CHUNK; key += LANES) {
        lanes more = load_lanes(scores + key);
        most = select_lanes(more > most, more, most);
    }
    float before = *largest;
    for (int64_t key = 0; key < LANES; key++)
        *largest = most[key] > *largest ? most[key] : *largest;
    if (*largest > before) {
        float shrunk = *total == 0.0f ? 0.0f : exponential((lanes){0} + (before - *largest))[0];
        *total *= shrunk;
        for (int64_t i = 0; i < dim; i++)
            sums[i] *= shrunk;
    }
    lanes totals = {0};
    for (int64_t key = 0; key < CHUNK; key += LANES) {
        lanes weights = exponential(load_lanes(scores + key) - *largest);
        store_lanes(scores + key, weights);
        totals += weights;
    }
    *total += sum_of(totals);
}

#endif
