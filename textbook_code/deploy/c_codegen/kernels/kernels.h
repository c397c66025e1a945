/* The operations of an int8 network in integers, with the rounding of TensorFlow Lite Micro.
 *
 * A tensor holds bytes q, and each stands for scale * (q - zero). The scales are gone by now: what is left of
 * them are factors, each held as a 31-bit multiplier and a power of two. No float, no library, no allocation.
 * Right shifts of negative numbers are taken to keep the sign, as they do on every compiler we know.
 */
#ifndef NET_KERNELS_H
#define NET_KERNELS_H

#include <stdint.h>

/* multiplier * 2^(shift - 31), with the multiplier in [2^30, 2^31) */
struct net_factor {
    int32_t multiplier, shift;
};

/* y = zero_y + factor[o] * (bias[o] + sum_i weight[o][i] x[i]) for each row x; the zero point of the input
 * is in the bias already */
struct net_linear {
    const int8_t *weight; /* [outputs][inputs] */
    const int32_t *bias;
    const int32_t *multiplier; /* of each output */
    const int8_t *shift;
    int32_t rows, inputs, outputs;
    int32_t zero_y, low, high; /* an activation that clamps is in low and high */
};

/* a linear map of each window of an image */
struct net_conv {
    struct net_linear linear; /* rows is not used */
    int32_t width, channels;  /* of the image */
    int32_t rows_y, width_y;
    int32_t window_height, window_width;
    int32_t stride_height, stride_width;
};

/* (batch, rows, inner) by (batch, inner, columns), or by (batch, columns, inner) if transposed */
struct net_matmul {
    int32_t batch, rows, inner, columns, transposed;
    int32_t zero_a, zero_b, zero_y;
    struct net_factor y;
};

struct net_softmax {
    const int32_t *exponential; /* [256]: exp(-scale * d) * 2^31 for the difference d to the maximum */
    int32_t rows, columns;
};

/* an operation on two tensors, element by element; a step of 0 repeats an operand along an axis */
struct net_pair {
    int32_t size[4], step_a[4], step_b[4];
    int32_t zero_a, zero_b, zero_y;
    int32_t bits; /* both operands are shifted left by so many before they are brought to one scale */
    struct net_factor a, b, y;
    int32_t low, high;
};

/* the mean over the middle axis of (outer, count, inner); the division is in the factor */
struct net_mean {
    int32_t outer, count, inner;
    int32_t zero_x, zero_y;
    struct net_factor y;
};

struct net_transpose {
    int32_t size[4], step[4]; /* of the output, and where its axes lie in the input */
};

void net_image(const uint8_t *rgb, int8_t *y, int32_t size); /* rgb - 128 */
void net_conv_2d(const int8_t *x, const struct net_conv *c, int8_t *y);
void net_fully_connected(const int8_t *x, const struct net_linear *l, int8_t *y);
void net_batch_matmul(const int8_t *a, const int8_t *b, const struct net_matmul *m, int8_t *y);
void net_softmax(const int8_t *x, const struct net_softmax *s, int8_t *y);
void net_add(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y);
void net_sub(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y);
void net_squared_difference(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y);
void net_mul(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y);
void net_mean(const int8_t *x, const struct net_mean *m, int8_t *y);
void net_transpose(const int8_t *x, const struct net_transpose *t, int8_t *y);
void net_lookup(const int8_t *x, const int8_t *table, int8_t *y, int32_t size); /* table[256], from -128 */
void net_attended(const int8_t *weights, int32_t *seen, int32_t rows, int32_t columns);

/* x * y / 2^31, rounded to the nearest, ties up */
static inline int32_t net_high_multiply(int32_t x, int32_t y)
{
    if (x == INT32_MIN && y == INT32_MIN) return INT32_MAX;
    return (int32_t)(((int64_t)x * y + (INT64_C(1) << 30)) >> 31);
}

/* x / 2^shift, rounded to the nearest, ties away from zero */
static inline int32_t net_rounding_divide(int32_t x, int32_t shift)
{
    const int32_t mask = (int32_t)((UINT32_C(1) << shift) - 1);
    return (x >> shift) + ((x & mask) > (mask >> 1) + (x < 0));
}

/* x times a factor. It is rounded twice, as TensorFlow Lite does; one rounding gives other bits now and then. */
static inline int32_t net_rescale(int32_t x, int32_t multiplier, int32_t shift)
{
    if (shift > 0) return net_high_multiply((int32_t)((uint32_t)x << shift), multiplier);
    return net_rounding_divide(net_high_multiply(x, multiplier), -shift);
}

static inline int8_t net_clamp(int32_t x, int32_t low, int32_t high)
{
    return (int8_t)(x < low ? low : x > high ? high : x);
}

/* 1 / sum as a factor of 2^31 in [2^30, 2^31), and the shift that the result still needs; sum > 0 */
int32_t net_reciprocal(int32_t sum, int32_t *shift);

#endif
