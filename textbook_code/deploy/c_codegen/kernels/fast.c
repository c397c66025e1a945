/* The fast kernels. What costs instructions is to fetch and to widen bytes, so each byte of a weight that has
 * been widened is used for four rows, and four rows are widened once for all outputs.
 */
#include "fast.h"

#include "dsp.h"

/* Four rows side by side: of each four columns first row 0, then row 1, ...; of a row columns (0, 2), then
 * (1, 3), which is the order in which net_even and net_odd take four bytes apart. */
enum { ROWS = 4, GROUP = 8 }; /* words of a group of four columns */

/* where column j of row r lies, counted in halves */
static inline int32_t place(int32_t r, int32_t j)
{
    return (j >> 2) * 2 * GROUP + r * 4 + ((j & 1) << 1 | (j >> 1 & 1));
}

static void widen(const int8_t *x, int32_t columns, net_pair_of_halves *wide)
{
    for (int32_t r = 0; r < ROWS; r++, x += columns)
        for (int32_t j = 0; j < columns; j += 4) {
            const uint32_t four = net_load(x + j);
            wide[j * 2 + r * 2] = net_even(four);
            wide[j * 2 + r * 2 + 1] = net_odd(four);
        }
}

/* a number for each of four rows */
struct four {
    int32_t a, b, c, d;
};

static inline void dot_group(const net_pair_of_halves *wide, const int8_t *w, struct four *sum)
{
    const uint32_t bytes = net_load(w), even = net_even(bytes), odd = net_odd(bytes);
    uint32_t x, y;
    NET_LOAD_TWO(wide, 0, x, y);
    sum->a = net_dual(y, odd, net_dual(x, even, sum->a));
    NET_LOAD_TWO(wide, 1, x, y);
    sum->b = net_dual(y, odd, net_dual(x, even, sum->b));
    NET_LOAD_TWO(wide, 2, x, y);
    sum->c = net_dual(y, odd, net_dual(x, even, sum->c));
    NET_LOAD_TWO(wide, 3, x, y);
    sum->d = net_dual(y, odd, net_dual(x, even, sum->d));
}

/* the products of four rows with one row of bytes, added to `sum` */
static inline struct four dot(const net_pair_of_halves *wide, const int8_t *w, int32_t columns, struct four sum)
{
    const int8_t *end = w + columns;
    if (columns & 4) {
        dot_group(wide, w, &sum);
        w += 4, wide += GROUP;
    }
    for (; w < end; w += 8, wide += 2 * GROUP) {
        dot_group(wide, w, &sum);
        dot_group(wide + GROUP, w + 4, &sum);
    }
    return sum;
}

/* the byte of a sum. It is net_rescale for a shift to the right: adding the sign makes ties go away from 0. */
static inline int32_t settle(int32_t sum, const struct net_channel *c)
{
    const int32_t x = net_high(sum, c->multiplier);
    return net_byte((x + (x >> 31) + c->rounding) >> c->shift);
}

/* output o of four rows */
static inline struct four output(const net_pair_of_halves *wide, const struct net_dense *d, int32_t o)
{
    const struct net_channel c = d->channel[o];
    const struct four bias = {c.bias, c.bias, c.bias, c.bias};
    const struct four s = dot(wide, d->weight + o * d->inputs, d->inputs, bias);
    const struct four bytes = {settle(s.a, &c), settle(s.b, &c), settle(s.c, &c), settle(s.d, &c)};
    return bytes;
}

/* to four places that lie `step` apart */
static inline void put(struct four x, int8_t *y, int32_t step)
{
    y[0] = (int8_t)x.a;
    y += step;
    y[0] = (int8_t)x.b;
    y[step] = (int8_t)x.c;
    y[2 * step] = (int8_t)x.d;
}

static inline struct four get(const int8_t *x, int32_t step)
{
    const struct four bytes = {x[0], x[step], x[2 * step], x[3 * step]};
    return bytes;
}

static inline int32_t scaled(int32_t x, const struct net_scale *s)
{
    const int32_t high = net_high(x, s->multiplier);
    return (high + ((high >> 31) & s->sign) + s->rounding) >> s->shift;
}

/* to the scale at which two operands can be added */
static inline int32_t lift(int32_t x, int32_t zero, const struct net_scale *s)
{
    return scaled((x - zero) * (INT32_C(1) << 20), s);
}

static inline struct four lifted(struct four x, int32_t zero, const struct net_scale *s)
{
    const struct four y = {lift(x.a, zero, s), lift(x.b, zero, s), lift(x.c, zero, s), lift(x.d, zero, s)};
    return y;
}

static inline struct four added(struct four x, struct four other, const struct net_residual *r)
{
    const struct four u = lifted(x, r->zero_x, &r->x), v = lifted(other, r->zero_other, &r->other);
    const struct net_scale s = r->y;
    const struct four y = {net_byte(scaled(u.a + v.a, &s)), net_byte(scaled(u.b + v.b, &s)),
                           net_byte(scaled(u.c + v.c, &s)), net_byte(scaled(u.d + v.d, &s))};
    return y;
}

/* all outputs of four rows, to bytes */
static void four_rows(const net_pair_of_halves *wide, const struct net_dense *d, const struct net_residual *r,
                      const int8_t *other, int8_t *y)
{
    for (int32_t o = 0; o < d->outputs; o++) {
        struct four bytes = output(wide, d, o);
        if (other) bytes = added(bytes, get(other + o, d->outputs), r);
        put(bytes, y + o, d->outputs);
    }
}

/* some outputs of four rows, less a zero point, as four rows side by side */
static void four_rows_wide(const net_pair_of_halves *wide, const struct net_dense *d, int32_t first,
                           int32_t last, int32_t zero, net_half *y)
{
    for (int32_t o = first; o < last; o++) {
        const struct four bytes = output(wide, d, o);
        net_half *p = y + place(0, o - first);
        p[0] = (net_half)(bytes.a - zero);
        p[4] = (net_half)(bytes.b - zero);
        p[8] = (net_half)(bytes.c - zero);
        p[12] = (net_half)(bytes.d - zero);
    }
}

void net_dense(const int8_t *x, const struct net_dense *d, int32_t rows, const struct net_residual *r,
               const int8_t *other, int8_t *y, int8_t *scratch)
{
    net_pair_of_halves *wide = (net_pair_of_halves *)(void *)scratch;
    for (int32_t row = 0; row < rows; row += ROWS, x += ROWS * d->inputs, y += ROWS * d->outputs) {
        widen(x, d->inputs, wide);
        four_rows(wide, d, r, other, y);
        if (other) other += ROWS * d->outputs;
    }
}

void net_mlp(const int8_t *x, const struct net_dense *first, const struct net_dense *second, int32_t rows,
             const struct net_residual *r, const int8_t *other, int8_t *y, int8_t *scratch)
{
    net_pair_of_halves *wide = (net_pair_of_halves *)(void *)scratch, *hidden = wide + first->inputs * 2;
    for (int32_t row = 0; row < rows; row += ROWS, x += ROWS * first->inputs, y += ROWS * second->outputs) {
        widen(x, first->inputs, wide);
        four_rows_wide(wide, first, 0, first->outputs, 0, (net_half *)hidden);
        four_rows(hidden, second, r, other, y);
        if (other) other += ROWS * second->outputs;
    }
}

void net_patches(const uint8_t *rgb, const struct net_patches *p, const struct net_residual *r,
                 const int8_t *other, int8_t *y, int8_t *scratch)
{
    net_half *wide = (net_half *)(void *)scratch;
    const int32_t run = p->width_patch * p->channels, patches = p->rows * p->columns;
    for (int32_t patch = 0; patch < patches; patch += ROWS, y += ROWS * p->dense.outputs) {
        for (int32_t i = 0; i < ROWS; i++) {
            const int32_t row = (patch + i) / p->columns, column = (patch + i) % p->columns;
            const int32_t corner = row * p->height_patch * p->width + column * p->width_patch;
            const uint8_t *line = rgb + corner * p->channels;
            for (int32_t j = 0; j < p->dense.inputs; line += p->width * p->channels)
                for (int32_t k = 0; k < run; k++, j++) wide[place(i, j)] = (net_half)((int32_t)line[k] - 128);
        }
        four_rows((net_pair_of_halves *)(void *)scratch, &p->dense, r, other, y);
        if (other) other += ROWS * p->dense.outputs;
    }
}

static inline uint32_t weight_of(int32_t exponential, uint32_t inverse, int32_t shift)
{
    /* net_high_multiply and net_rounding_divide of numbers that are not negative */
    const uint64_t product = (uint64_t)inverse * ((uint32_t)exponential * 2) + UINT32_C(0x80000000);
    const uint32_t weight = ((uint32_t)(product >> 32) + (UINT32_C(1) << (shift - 1))) >> shift;
    return weight > 255 ? 255 : weight;
}

/* softmax of a row of bytes to a row of four side by side, as 0 to 255; returns the sum of these */
static int32_t softmax_row(const int8_t *x, int32_t columns, const int32_t *exponential,
                           net_pair_of_halves *wide)
{
    int32_t most = x[0], sum = 0, shift;
    uint32_t total = 0;
    for (int32_t j = 1; j < columns; j++)
        if (x[j] > most) most = x[j];
    for (int32_t j = 0; j < columns; j++) {
        const uint32_t e = (uint32_t)exponential[most - x[j]];
        sum += (int32_t)((e + (UINT32_C(1) << 11)) >> 12);
    }
    const uint32_t inverse = (uint32_t)net_reciprocal(sum, &shift);
    shift += 31 - 8;
    for (int32_t j = 0; j < columns; j += 4, wide += GROUP) {
        uint32_t w[4];
        for (int32_t i = 0; i < 4; i++) w[i] = weight_of(exponential[most - x[j + i]], inverse, shift);
        wide[0] = w[0] | w[2] << 16;
        wide[1] = w[1] | w[3] << 16;
        total += wide[0] + wide[1]; /* halves apart: the weights of a row add up to little more than 256 */
    }
    return (int32_t)((total & 0xffff) + (total >> 16));
}

/* One head after the other, four queries at a time: their scores and weights are all that is ever stored of
 * the (rows, rows) that attention computes. */
void net_attention(const int8_t *x, const struct net_attention *a, int8_t *y, int8_t *scratch, int32_t *seen)
{
    const int32_t n = a->rows, width = a->width, all = a->heads * width, inputs = a->query.inputs;
    const struct net_channel score = a->score, mixed = a->mixed;
    net_pair_of_halves *wide = (net_pair_of_halves *)(void *)scratch; /* four rows of x */
    net_pair_of_halves *query = wide + 2 * inputs;                    /* four rows */
    net_pair_of_halves *weights = query + 2 * width;                  /* four rows */
    int8_t *scores = (int8_t *)(weights + 2 * n);                     /* [ROWS][n] */
    int8_t *keys = scores + ROWS * n;                                 /* [n][width] */
    int8_t *values = keys + n * width;                                /* [width][n] */
    for (int32_t j = 0; seen && j < n; j++) seen[j] = 0;
    for (int32_t head = 0; head < a->heads; head++) {
        const int32_t first = head * width;
        for (int32_t row = 0; row < n; row += ROWS) {
            widen(x + row * inputs, inputs, wide);
            for (int32_t o = 0; o < width; o++) {
                put(output(wide, &a->key, first + o), keys + row * width + o, width);
                put(output(wide, &a->value, first + o), values + o * n + row, 1);
            }
        }
        for (int32_t row = 0; row < n; row += ROWS) {
            widen(x + row * inputs, inputs, wide);
            four_rows_wide(wide, &a->query, first, first + width, a->zero_query, (net_half *)query);
            /* what the zero point of the keys adds to every sum */
            struct four start = {0, 0, 0, 0};
            for (int32_t o = 0; o < width; o++) {
                const net_half *q = (net_half *)query + place(0, o);
                start.a -= q[0] * a->zero_key;
                start.b -= q[4] * a->zero_key;
                start.c -= q[8] * a->zero_key;
                start.d -= q[12] * a->zero_key;
            }
            for (int32_t j = 0; j < n; j++) {
                const struct four s = dot(query, keys + j * width, width, start);
                const struct four bytes = {settle(s.a, &score), settle(s.b, &score), settle(s.c, &score),
                                           settle(s.d, &score)};
                put(bytes, scores + j, n);
            }
            start.a = -a->zero_value * softmax_row(scores, n, a->exponential, weights);
            start.b = -a->zero_value * softmax_row(scores + n, n, a->exponential, weights + 2);
            start.c = -a->zero_value * softmax_row(scores + 2 * n, n, a->exponential, weights + 4);
            start.d = -a->zero_value * softmax_row(scores + 3 * n, n, a->exponential, weights + 6);
            for (int32_t j = 0; seen && j < n; j++)
                for (int32_t i = 0; i < ROWS; i++) seen[j] += ((net_half *)weights)[place(i, j)];
            for (int32_t o = 0; o < width; o++) {
                const struct four s = dot(weights, values + o * n, n, start);
                const struct four bytes = {settle(s.a, &mixed), settle(s.b, &mixed), settle(s.c, &mixed),
                                           settle(s.d, &mixed)};
                put(bytes, y + row * all + first + o, all);
            }
        }
    }
}
