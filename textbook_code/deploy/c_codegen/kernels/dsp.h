/* Six instructions that a Cortex-M4 or M7 has and C has no word for, each beside the same in C.
 *
 * A pair is two signed 16-bit numbers in one word, the first in the lower half. The code in C gives the same
 * bits, so the fast kernels can be run, and compared with the plain ones, on any machine.
 */
#ifndef NET_DSP_H
#define NET_DSP_H

#include <stdint.h>

#if defined(__GNUC__)
typedef uint32_t __attribute__((may_alias)) net_pair_of_halves; /* a word of an arena that also holds bytes */
typedef net_pair_of_halves net_eight_words[8];
typedef int16_t __attribute__((may_alias)) net_half;
typedef uint32_t __attribute__((may_alias, aligned(1))) net_four_bytes;
#else
typedef uint32_t net_pair_of_halves;
typedef int16_t net_half;
#endif

#if defined(__ARM_FEATURE_DSP) && defined(__thumb2__)
#define NET_DSP 1
#else
#define NET_DSP 0
#endif

static inline uint32_t net_pack(int32_t first, int32_t second)
{
    return (uint32_t)(first & 0xffff) | (uint32_t)second << 16;
}

static inline int32_t net_first(uint32_t pair) { return (int16_t)(pair & 0xffff); }
static inline int32_t net_second(uint32_t pair) { return (int16_t)(pair >> 16); }

/* four bytes that lie side by side, the first one lowest */
static inline uint32_t net_load(const int8_t *x)
{
#if NET_DSP
    return *(const net_four_bytes *)x;
#else
    return (uint32_t)(uint8_t)x[0] | (uint32_t)(uint8_t)x[1] << 8 | (uint32_t)(uint8_t)x[2] << 16 |
           (uint32_t)(uint8_t)x[3] << 24;
#endif
}

/* bytes 0 and 2 as a pair */
static inline uint32_t net_even(uint32_t four)
{
#if NET_DSP
    uint32_t pair;
    __asm__("sxtb16 %0, %1" : "=r"(pair) : "r"(four));
    return pair;
#else
    return net_pack((int8_t)(four & 0xff), (int8_t)(four >> 16 & 0xff));
#endif
}

/* bytes 1 and 3 as a pair */
static inline uint32_t net_odd(uint32_t four)
{
#if NET_DSP
    uint32_t pair;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(four));
    return pair;
#else
    return net_pack((int8_t)(four >> 8 & 0xff), (int8_t)(four >> 24 & 0xff));
#endif
}

/* words 2 i and 2 i + 1 of the eight at p; i is written out as a number */
#if NET_DSP
#define NET_LOAD_TWO(p, i, a, b)                                       \
    __asm__("ldrd %0, %1, [%2, %3]"                                    \
            : "=&r"(a), "=&r"(b)                                       \
            : "r"(p), "i"((i) * 8), "m"(*(const net_eight_words *)(p)))
#else
#define NET_LOAD_TWO(p, i, a, b) ((a) = (p)[2 * (i)], (b) = (p)[2 * (i) + 1])
#endif

/* two products at once: sum + first * first + second * second */
static inline int32_t net_dual(uint32_t a, uint32_t b, int32_t sum)
{
#if NET_DSP
    __asm__("smlad %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
#else
    return sum + net_first(a) * net_first(b) + net_second(a) * net_second(b);
#endif
}

/* x * y / 2^31, rounded to the nearest, ties up; |x| < 2^30 */
static inline int32_t net_high(int32_t x, int32_t y)
{
#if NET_DSP
    int32_t high; /* the upper word of 2 x y, rounded */
    __asm__("smmulr %0, %1, %2" : "=r"(high) : "r"(x * 2), "r"(y));
    return high;
#else
    return (int32_t)(((int64_t)x * y + (INT64_C(1) << 30)) >> 31);
#endif
}

/* the nearest signed byte */
static inline int32_t net_byte(int32_t x)
{
#if NET_DSP
    int32_t byte;
    __asm__("ssat %0, #8, %1" : "=r"(byte) : "r"(x));
    return byte;
#else
    return x < -128 ? -128 : x > 127 ? 127 : x;
#endif
}

#endif
