/* The generated C as a WebAssembly module: what the world outside may call. There is nothing to import, neither a
 * heap nor a clock; the picture is written into the module's memory at pixels(), and then logit() is called.
 * SCALE_NUMERATOR and SCALE_SHIFT, given on the command line, are the logit's step as numerator / 2^shift: a
 * 32-bit float is such a fraction, so nothing is rounded. */
#include "net.h"

#define EXPORT(name) __attribute__((export_name(#name)))

static uint8_t rgb[PERSON_IMAGE_BYTES]; /* row by row, red green blue */

EXPORT(pixels) uint8_t *pixels(void) { return rgb; }
EXPORT(logit) int32_t logit(void) { return person_logit(rgb); } /* in steps, around zero_point() */
EXPORT(person) int32_t is_person(void) { return person(rgb); }
EXPORT(zero_point) int32_t zero_point(void) { return PERSON_ZERO; }
EXPORT(scale_numerator) int32_t scale_numerator(void) { return SCALE_NUMERATOR; }
EXPORT(scale_shift) int32_t scale_shift(void) { return SCALE_SHIFT; }
EXPORT(num_patches) int32_t num_patches(void) { return PERSON_PATCHES; }
EXPORT(attention) const int32_t *attention(void) { return person_attention(); } /* of the last logit() */
