/* The plain kernels: each operation as its definition says it, one loop an index. */
#include "kernels.h"

void net_image(const uint8_t *rgb, int8_t *y, int32_t size)
{
    for (int32_t i = 0; i < size; i++) y[i] = (int8_t)((int32_t)rgb[i] - 128);
}

static int8_t finish(const struct net_linear *l, int32_t o, int32_t sum)
{
    return net_clamp(net_rescale(sum, l->multiplier[o], l->shift[o]) + l->zero_y, l->low, l->high);
}

void net_conv_2d(const int8_t *x, const struct net_conv *c, int8_t *y)
{
    const struct net_linear *l = &c->linear;
    const int32_t run = c->window_width * c->channels; /* bytes of a window that lie side by side */
    for (int32_t row = 0; row < c->rows_y; row++)
        for (int32_t column = 0; column < c->width_y; column++)
            for (int32_t o = 0; o < l->outputs; o++) {
                const int8_t *w = l->weight + o * l->inputs;
                int32_t sum = l->bias[o];
                for (int32_t i = 0; i < c->window_height; i++) {
                    const int32_t line = row * c->stride_height + i;
                    const int8_t *p = x + (line * c->width + column * c->stride_width) * c->channels;
                    for (int32_t j = 0; j < run; j++) sum += p[j] * *w++;
                }
                *y++ = finish(l, o, sum);
            }
}

void net_fully_connected(const int8_t *x, const struct net_linear *l, int8_t *y)
{
    for (int32_t row = 0; row < l->rows; row++, x += l->inputs)
        for (int32_t o = 0; o < l->outputs; o++) {
            const int8_t *w = l->weight + o * l->inputs;
            int32_t sum = l->bias[o];
            for (int32_t i = 0; i < l->inputs; i++) sum += x[i] * w[i];
            *y++ = finish(l, o, sum);
        }
}

void net_batch_matmul(const int8_t *a, const int8_t *b, const struct net_matmul *m, int8_t *y)
{
    const int32_t along = m->transposed ? 1 : m->columns; /* from one term of a sum to the next */
    const int32_t across = m->transposed ? m->inner : 1;  /* from one column to the next */
    for (int32_t n = 0; n < m->batch; n++, b += m->inner * m->columns)
        for (int32_t row = 0; row < m->rows; row++, a += m->inner)
            for (int32_t column = 0; column < m->columns; column++) {
                const int8_t *q = b + column * across;
                int32_t sum = 0;
                for (int32_t i = 0; i < m->inner; i++) sum += (a[i] - m->zero_a) * (q[i * along] - m->zero_b);
                *y++ = net_clamp(net_rescale(sum, m->y.multiplier, m->y.shift) + m->zero_y, -128, 127);
            }
}

/* x * 2^bits, held between the ends of an int32 */
static int32_t shift_left(int32_t x, int32_t bits)
{
    const int64_t wide = (int64_t)x * (INT64_C(1) << bits);
    return (int32_t)(wide > INT32_MAX ? INT32_MAX : wide < INT32_MIN ? INT32_MIN : wide);
}

int32_t net_reciprocal(int32_t sum, int32_t *shift)
{
    int32_t zeros = 0; /* in front of the highest bit of the sum */
    while (((uint32_t)sum << zeros) < UINT32_C(0x80000000)) zeros++;
    *shift = 12 - zeros; /* the sum has 12 bits before its point */
    const int32_t a = (int32_t)(((uint32_t)sum << zeros) - UINT32_C(0x80000000)); /* the sum is 1 + a */
    const int32_t half = (int32_t)(((int64_t)a + INT32_MAX + 1) >> 1);
    /* 48/17 - 32/17 half is within 1/17 of 1 / half; each of Newton's steps doubles the number of right bits */
    int32_t x = 1515870810 + net_high_multiply(half, -1010580540);
    for (int32_t i = 0; i < 3; i++) {
        const int32_t rest = (INT32_C(1) << 29) - net_high_multiply(half, x);
        x += shift_left(net_high_multiply(x, rest), 2);
    }
    return shift_left(x, 1);
}

void net_softmax(const int8_t *x, const struct net_softmax *s, int8_t *y)
{
    for (int32_t row = 0; row < s->rows; row++, x += s->columns, y += s->columns) {
        int32_t most = x[0], sum = 0, shift;
        for (int32_t i = 1; i < s->columns; i++)
            if (x[i] > most) most = x[i];
        for (int32_t i = 0; i < s->columns; i++) sum += net_rounding_divide(s->exponential[most - x[i]], 12);
        const int32_t inverse = net_reciprocal(sum, &shift);
        for (int32_t i = 0; i < s->columns; i++) {
            const int32_t part = net_high_multiply(inverse, s->exponential[most - x[i]]);
            y[i] = net_clamp(net_rounding_divide(part, shift + 31 - 8) - 128, -128, 127);
        }
    }
}

#define FOR_EACH(size)                                            \
    for (int32_t i = 0; i < (size)[0]; i++)                       \
        for (int32_t j = 0; j < (size)[1]; j++)                   \
            for (int32_t k = 0; k < (size)[2]; k++)               \
                for (int32_t l = 0; l < (size)[3]; l++)
#define AT(step) (i * (step)[0] + j * (step)[1] + k * (step)[2] + l * (step)[3])

static int32_t lifted(int32_t x, int32_t bits, const struct net_factor *f)
{
    return net_rescale(x * (INT32_C(1) << bits), f->multiplier, f->shift);
}

static int8_t lowered(int32_t x, const struct net_pair *p)
{
    return net_clamp(net_rescale(x, p->y.multiplier, p->y.shift) + p->zero_y, p->low, p->high);
}

void net_add(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y)
{
    FOR_EACH(p->size)
        *y++ = lowered(lifted(a[AT(p->step_a)] - p->zero_a, p->bits, &p->a) +
                       lifted(b[AT(p->step_b)] - p->zero_b, p->bits, &p->b), p);
}

void net_sub(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y)
{
    FOR_EACH(p->size)
        *y++ = lowered(lifted(a[AT(p->step_a)] - p->zero_a, p->bits, &p->a) -
                       lifted(b[AT(p->step_b)] - p->zero_b, p->bits, &p->b), p);
}

void net_squared_difference(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y)
{
    FOR_EACH(p->size) {
        const int32_t d = lifted(a[AT(p->step_a)] - p->zero_a, p->bits, &p->a) -
                          lifted(b[AT(p->step_b)] - p->zero_b, p->bits, &p->b);
        *y++ = lowered(d * d, p);
    }
}

void net_mul(const int8_t *a, const int8_t *b, const struct net_pair *p, int8_t *y)
{
    FOR_EACH(p->size)
        *y++ = lowered((a[AT(p->step_a)] - p->zero_a) * (b[AT(p->step_b)] - p->zero_b), p);
}

void net_mean(const int8_t *x, const struct net_mean *m, int8_t *y)
{
    for (int32_t n = 0; n < m->outer; n++, x += m->count * m->inner)
        for (int32_t i = 0; i < m->inner; i++) {
            int32_t sum = -m->count * m->zero_x;
            for (int32_t j = 0; j < m->count; j++) sum += x[j * m->inner + i];
            *y++ = net_clamp(net_rescale(sum, m->y.multiplier, m->y.shift) + m->zero_y, -128, 127);
        }
}

void net_transpose(const int8_t *x, const struct net_transpose *t, int8_t *y)
{
    FOR_EACH(t->size) *y++ = x[AT(t->step)];
}

void net_lookup(const int8_t *x, const int8_t *table, int8_t *y, int32_t size)
{
    for (int32_t i = 0; i < size; i++) y[i] = table[x[i] + 128];
}

/* how much each column was attended to: the sum over rows, in 1/256 */
void net_attended(const int8_t *weights, int32_t *seen, int32_t rows, int32_t columns)
{
    for (int32_t j = 0; j < columns; j++) seen[j] = 0;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < columns; j++) seen[j] += weights[i * columns + j] + 128;
}
