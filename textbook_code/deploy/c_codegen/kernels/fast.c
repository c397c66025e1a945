/* The fast kernels. What costs instructions is to fetch and to widen bytes, so each byte of a weight that has
 * been widened is used for four rows, and four rows are widened once for all outputs.
 */
#include "fast.h"

#include "dsp.h"

/* Four rows side by side: of each four columns first row 0, then row 1, …; of a row columns (0, 2), then
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

/* the products of four rows with one row of bytes */
static inline void dot(const net_pair_of_halves *wide, const int8_t *w, int32_t columns, int32_t sum[ROWS])
{
    int32_t s0 = sum[0], s1 = sum[1], s2 = sum[2], s3 = sum[3];
    for (const int8_t *end = w + columns; w < end; w += 4, wide += GROUP) {
        const uint32_t four = net_load(w), even = net_even(four), odd = net_odd(four);
        s0 = net_dual(wide[0], even, s0);
        s0 = net_dual(wide[1], odd, s0);
        s1 = net_dual(wide[2], even, s1);
        s1 = net_dual(wide[3], odd, s1);
        s2 = net_dual(wide[4], even, s2);
        s2 = net_dual(wide[5], odd, s2);
        s3 = net_dual(wide[6], even, s3);
        s3 = net_dual(wide[7], odd, s3);
    }
    sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
}

/* the byte of a sum. It is net_rescale for a shift to the right: adding the sign makes ties go away from 0. */
static inline int32_t settle(int32_t sum, const struct net_channel *c)
{
    const int32_t x = net_high(sum, c->multiplier);
    return net_byte((x + (x >> 31) + c->rounding) >> c->shift);
}

static inline int32_t scaled(int32_t x, const struct net_scale *s)
{
    const int32_t high = net_high(x, s->multiplier);
    return (high + ((high >> 31) & s->sign) + s->rounding) >> s->shift;
}

static inline int32_t with(int32_t x, int32_t other, const struct net_residual *r)
{
    const int32_t sum = scaled((x - r->zero_x) * (INT32_C(1) << 20), &r->x) +
                        scaled((other - r->zero_other) * (INT32_C(1) << 20), &r->other);
    return net_byte(scaled(sum, &r->y));
}

/* all outputs of four rows, to bytes */
static void four_rows(const net_pair_of_halves *wide, const struct net_dense *d, const struct net_residual *r,
                      const int8_t *other, int8_t *y)
{
    const int8_t *w = d->weight;
    for (int32_t o = 0; o < d->outputs; o++, w += d->inputs) {
        const struct net_channel *c = d->channel + o;
        int32_t sum[ROWS] = {c->bias, c->bias, c->bias, c->bias};
        dot(wide, w, d->inputs, sum);
        for (int32_t i = 0; i < ROWS; i++) {
            const int32_t at = i * d->outputs + o, byte = settle(sum[i], c);
            y[at] = (int8_t)(other ? with(byte, other[at], r) : byte);
        }
    }
}

/* some outputs of four rows, less a zero point, as four rows side by side */
static void four_rows_wide(const net_pair_of_halves *wide, const struct net_dense *d, int32_t first, int32_t last,
                           int32_t zero, net_half *y)
{
    const int8_t *w = d->weight + first * d->inputs;
    for (int32_t o = first; o < last; o++, w += d->inputs) {
        const struct net_channel *c = d->channel + o;
        int32_t sum[ROWS] = {c->bias, c->bias, c->bias, c->bias};
        dot(wide, w, d->inputs, sum);
        net_half *p = y + place(0, o - first);
        for (int32_t i = 0; i < ROWS; i++) p[i * 4] = (net_half)(settle(sum[i], c) - zero);
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
            const uint8_t *line = rgb + (row * p->height_patch * p->width + column * p->width_patch) * p->channels;
            for (int32_t j = 0; j < p->dense.inputs; line += p->width * p->channels)
                for (int32_t k = 0; k < run; k++, j++) wide[place(i, j)] = (net_half)((int32_t)line[k] - 128);
        }
        four_rows((net_pair_of_halves *)(void *)scratch, &p->dense, r, other, y);
        if (other) other += ROWS * p->dense.outputs;
    }
}

/* softmax of a row of bytes to row i of four rows side by side, as 0 … 255; returns the sum of these */
static int32_t softmax_row(const int8_t *x, int32_t columns, const int32_t *exponential, int32_t i, net_half *wide)
{
    int32_t most = -128, sum = 0, shift, total = 0;
    for (int32_t j = 0; j < columns; j++)
        if (x[j] > most) most = x[j];
    for (int32_t j = 0; j < columns; j++) 
        sum += (int32_t)(((uint32_t)exponential[most - x[j]] + (UINT32_C(1) << 11)) >> 12);
    const uint32_t inverse = (uint32_t)net_reciprocal(sum, &shift);
    shift += 31 - 8;
    const uint32_t half = UINT32_C(1) << (shift - 1);
    for (int32_t j = 0; j < columns; j++) {
        const uint32_t twice = (uint32_t)exponential[most - x[j]] * 2; /* no number is negative here */
        const uint32_t part = (uint32_t)(((uint64_t)inverse * twice + UINT32_C(0x80000000)) >> 32);
        const uint32_t weight = (part + half) >> shift;
        const int32_t w = weight > 255 ? 255 : (int32_t)weight;
        total += w;
        wide[place(i, j)] = (net_half)w;
    }
    return total;
}

/* One head after the other, four queries at a time: their scores and weights are all that is ever stored of
 * the (rows, rows) that attention computes. */
void net_attention(const int8_t *x, const struct net_attention *a, int8_t *y, int8_t *scratch, int32_t *seen)
{
    const int32_t n = a->rows, width = a->width, inputs = a->query.inputs;
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
                const struct net_channel *k = a->key.channel + first + o, *v = a->value.channel + first + o;
                int32_t sum[ROWS] = {k->bias, k->bias, k->bias, k->bias};
                dot(wide, a->key.weight + (first + o) * inputs, inputs, sum);
                for (int32_t i = 0; i < ROWS; i++) keys[(row + i) * width + o] = (int8_t)settle(sum[i], k);
                sum[0] = sum[1] = sum[2] = sum[3] = v->bias;
                dot(wide, a->value.weight + (first + o) * inputs, inputs, sum);
                for (int32_t i = 0; i < ROWS; i++) values[o * n + row + i] = (int8_t)settle(sum[i], v);
            }
        }
        for (int32_t row = 0; row < n; row += ROWS) {
            int32_t start[ROWS] = {0, 0, 0, 0}; /* what the zero point of the other operand adds to a sum */
            widen(x + row * inputs, inputs, wide);
            four_rows_wide(wide, &a->query, first, first + width, a->zero_query, (net_half *)query);
            for (int32_t i = 0; i < ROWS; i++) {
                for (int32_t o = 0; o < width; o++) start[i] += ((net_half *)query)[place(i, o)];
                start[i] *= -a->zero_key;
            }
            for (int32_t j = 0; j < n; j++) {
                int32_t sum[ROWS] = {start[0], start[1], start[2], start[3]};
                dot(query, keys + j * width, width, sum);
                for (int32_t i = 0; i < ROWS; i++) scores[i * n + j] = (int8_t)settle(sum[i], &a->score);
            }
            for (int32_t i = 0; i < ROWS; i++)
                start[i] = -a->zero_value *
                           softmax_row(scores + i * n, n, a->exponential, i, (net_half *)weights);
            for (int32_t j = 0; seen && j < n; j++)
                for (int32_t i = 0; i < ROWS; i++) seen[j] += ((net_half *)weights)[place(i, j)];
            int8_t *out = y + row * a->heads * width + first;
            for (int32_t o = 0; o < width; o++) {
                int32_t sum[ROWS] = {start[0], start[1], start[2], start[3]};
                dot(weights, values + o * n, n, sum);
                for (int32_t i = 0; i < ROWS; i++)
                    out[i * a->heads * width + o] = (int8_t)settle(sum[i], &a->mixed);
            }
        }
    }
}
