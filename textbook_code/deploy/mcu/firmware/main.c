/* Reads images, 3072 bytes each (32 rows of 32 pixels of red, green and blue), and writes a line for each:

       logit -23 person 0 ticks 1012345 stack 312

   A tick is a step of SysTick: a clock cycle on a board, and in QEMU, under -icount shift=0, as many
   instructions as nanoseconds fit into a cycle of the board's 25 MHz, which are 40. */
#include "io.h"
#include "net.h"

#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)
#define SYST_PERIOD 0x1000000u /* 24 bits, counted down */

void systick(void);

static volatile uint32_t wraps;
static uint8_t rgb[PERSON_IMAGE_BYTES];

void systick(void)
{
    wraps++;
}

static void clock_start(void)
{
    SYST_CSR = 0;
    SYST_RVR = SYST_PERIOD - 1;
    SYST_CVR = 0;
    wraps = 0;
    SYST_CSR = 7; /* the core's own clock, with an exception at zero, on */
    while (!SYST_CVR) { /* it stands at zero until its first tick */
    }
}

static uint32_t clock_ticks(void)
{
    uint32_t before, value;
    do { /* an exception between the two reads would pair an old count with a new value */
        before = wraps;
        value = SYST_CVR;
    } while (before != wraps);
    return before * SYST_PERIOD + (SYST_PERIOD - 1 - value);
}

static char *append(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    return at;
}

static char *append_int(char *at, int32_t value)
{
    char digits[10];
    uint32_t rest = value < 0 ? 0u - (uint32_t)value : (uint32_t)value;
    int n = 0;
    do {
        digits[n++] = (char)('0' + rest % 10u);
        rest /= 10u;
    } while (rest);
    if (value < 0)
        *at++ = '-';
    while (n)
        *at++ = digits[--n];
    return at;
}

#ifdef NET_PROFILE /* how much each step of the network takes */
static uint32_t step_began, step_ticks[PERSON_STEPS];

void person_step(int step)
{
    step_ticks[step] += clock_ticks() - step_began;
    step_began = clock_ticks();
}

static void write_steps(void)
{
    char line[96];
    for (int i = 0; i < PERSON_STEPS; i++) {
        char *at = append(append(line, "step "), person_kinds[i]);
        at = append_int(append(at, " macs "), person_macs[i]);
        at = append_int(append(at, " ticks "), (int32_t)step_ticks[i]);
        *append(at, "\n") = 0;
        io_write(line);
    }
}
#endif

int main(void)
{
    char line[96];
    while (io_read(rgb, sizeof rgb)) {
        clock_start();
#ifdef NET_PROFILE
        step_began = clock_ticks();
#endif
        const int8_t logit = person_logit(rgb);
        const uint32_t ticks = clock_ticks();
        char *at = append_int(append(line, "logit "), logit);
        at = append_int(append(at, " person "), logit > PERSON_ZERO);
        at = append_int(append(at, " ticks "), (int32_t)ticks);
        at = append_int(append(at, " stack "), (int32_t)stack_used());
        *append(at, "\n") = 0;
        io_write(line);
    }
#ifdef NET_PROFILE
    write_steps();
#endif
    return 0;
}
