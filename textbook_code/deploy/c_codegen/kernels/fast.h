/* The same network in fewer instructions: matrix products on pairs, and nothing stored that can be used up at
 * once. Every kernel below is built on one product, of four rows of 16-bit numbers with one row of bytes.
 */
#ifndef NET_FAST_H
#define NET_FAST_H

#include "kernels.h"

/* of one output of a matrix product; the rounding has the zero point of the output in it */
struct net_channel {
    int32_t bias, multiplier, rounding, shift;
};

struct net_dense {
    const int8_t *weight; /* [outputs][inputs] */
    const struct net_channel *channel;
    int32_t inputs, outputs;
};

/* what a result is multiplied by, (x * multiplier / 2^31 + rounding) / 2^shift; the sign is -1, or 0 if the
 * shift is 0 */
struct net_scale {
    int32_t multiplier, rounding, shift, sign;
};

/* the sum of a result x and a byte that is there already */
struct net_residual {
    int32_t zero_x, zero_other;
    struct net_scale x, other, y;
};

struct net_patches {
    struct net_dense dense;
    int32_t width, channels; /* of the image */
    int32_t rows, columns;   /* of patches */
    int32_t height_patch, width_patch;
};

struct net_attention {
    struct net_dense query, key, value; /* all heads, one after the other */
    const int32_t *exponential;         /* [256], as of net_softmax */
    int32_t rows, heads, width;         /* width of a head */
    int32_t zero_query, zero_key, zero_value;
    struct net_channel score, mixed; /* their biases are 0 */
};

/* The scratch of each holds, in bytes: net_patches and net_dense 8 * inputs; net_mlp 8 * (inputs + hidden);
 * net_attention 8 * (inputs + width + rows) + 4 * rows + 2 * rows * width. `other` may be 0, and y may be
 * written over it. */
void net_patches(const uint8_t *rgb, const struct net_patches *p, const struct net_residual *r,
                 const int8_t *other, int8_t *y, int8_t *scratch);
void net_dense(const int8_t *x, const struct net_dense *d, int32_t rows, const struct net_residual *r,
               const int8_t *other, int8_t *y, int8_t *scratch);
void net_mlp(const int8_t *x, const struct net_dense *first, const struct net_dense *second, int32_t rows,
             const struct net_residual *r, const int8_t *other, int8_t *y, int8_t *scratch);
void net_attention(const int8_t *x, const struct net_attention *a, int8_t *y, int8_t *scratch, int32_t *seen);

#endif
