/* How the weight of a linear layer lies in memory: panels of PANEL outputs, [num_panels, in / GROUP, PANEL] words, the
 * last panel filled up with zeros.
 *
 * A word is what one output takes of GROUP inputs: a float32, a float16, or two bfloat16, of which the even input's is
 * the lower half, as in a row of them. The short ones are for weights that were stored so: widened they are the same numbers, and half as
 * many bytes come from memory.
 */
#ifndef PROMPTD_PANELS_H
#define PROMPTD_PANELS_H

#include "numbers.h"

enum { WIDTH = LANES_16 ? 3 : 2, PANEL = LANES * WIDTH };

/* Of each form: a word, as many as there are lanes, the lanes of one of its inputs, how a word is made and what each of
 * its inputs then is. */
#if defined(STORED_FLOAT32)
enum { GROUP = 1 };
typedef float word;
typedef lanes words;
static INLINE lanes widened(words from, int input) { return from; }
static INLINE word joined(float first, float second) { return first; }
static INLINE float part_of(word from, int input) { return from; }

#elif defined(STORED_BFLOAT16)
enum { GROUP = 2 };
typedef uint32_t word;
typedef integers words;
static INLINE lanes widened(words from, int input) { return (lanes)(input ? from & (int)0xffff0000 : from << 16); }
static INLINE word joined(float first, float second) { return bits_of(first) >> 16 | (bits_of(second) & 0xffff0000); }
static INLINE float part_of(word from, int input) { return of_bits(input ? from & 0xffff0000 : from << 16); }

#elif defined(__F16C__) || defined(__aarch64__) /* STORED_FLOAT16, where the processor widens it */
enum { GROUP = 1 };
typedef _Float16 word;
typedef int16_t words __attribute__((vector_size(LANES * 2)));
static INLINE lanes widened(words from, int input)
{
#ifdef __F16C__ /* GCC widens one lane after the other */
    lanes wide;
    __asm__("vcvtph2ps %1, %0" : "=v"(wide) : "vm"(from));
    return wide;
#else
    typedef word halves __attribute__((vector_size(LANES * 2)));
    return __builtin_convertvector((halves)from, lanes);
#endif
}
static INLINE word joined(float first, float second) { return (word)first; }
static INLINE float part_of(word from, int input) { return from; }

#else
#error "this processor does not widen float16"
#endif

/* Inputs that are turned around at a time: of each output a line of the cache. */
enum { BLOCK = 16 };

/* Fill the panels from a float32 weight whose number (output, input) is at output * output_stride + input *
 * input_stride. Returns whether all of its numbers were stored bit for bit; num_inputs is a multiple of GROUP. */
int promptd_linear_pack(const float *weight, int64_t output_stride, int64_t input_stride, int64_t num_outputs,
                        int64_t num_inputs, word *packed, int64_t num_threads)
{
    int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    uint32_t lost = 0; /* bits */
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(| : lost)
    for (int64_t panel = 0; panel < num_panels; panel++) {
        const float *from = weight + panel * PANEL * output_stride;
        int width = num_outputs - panel * PANEL < PANEL ? num_outputs - panel * PANEL : PANEL;
        word *to = packed + panel * PANEL * (num_inputs / GROUP);
        float block[BLOCK][PANEL] = {{0}};
        for (int64_t at = 0; at < num_inputs && !lost; at += BLOCK) {
            int count = num_inputs - at < BLOCK ? num_inputs - at : BLOCK;
            for (int output = 0; output < width; output++)
                for (int input = 0; input < count; input++)
                    block[input][output] = from[output * output_stride + (at + input) * input_stride];
            for (int input = 0; input < count; input += GROUP, to += PANEL)
                for (int output = 0; output < PANEL; output++) {
                    float first = block[input][output], second = block[input + GROUP - 1][output];
                    to[output] = joined(first, second);
                    lost |= bits_of(part_of(to[output], 0)) ^ bits_of(first);
                    lost |= bits_of(part_of(to[output], GROUP - 1)) ^ bits_of(second);
                }
        }
    }
    return !lost;
}

/* Write what the panels hold as float32, turned around: [num_inputs, num_outputs]. */
void promptd_linear_unpack(const word *packed, int64_t num_outputs, int64_t num_inputs, float *turned,
                           int64_t num_threads)
{
    int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t panel = 0; panel < num_panels; panel++) {
        int width = num_outputs - panel * PANEL < PANEL ? num_outputs - panel * PANEL : PANEL;
        const word *from = packed + panel * PANEL * (num_inputs / GROUP);
        for (int64_t at = 0; at < num_inputs; at += GROUP, from += PANEL)
            for (int part = 0; part < GROUP; part++) {
                float wide[PANEL], *to = turned + (at + part) * num_outputs + panel * PANEL;
                for (int i = 0; i < WIDTH; i++) {
                    words some;
                    memcpy(&some, from + i * LANES, sizeof some);
                    store_lanes((width == PANEL ? to : wide) + i * LANES, widened(some, part));
                }
                if (width < PANEL)
                    memcpy(to, wide, width * sizeof(float));
            }
    }
}

#endif
