/* The first serial port of the MPS2 boards (a CMSDK APB UART). For another chip, change these four words and
   how the port is switched on. */
#include "io.h"

#define UART_DATA (*(volatile uint32_t *)0x40004000u)
#define UART_STATE (*(volatile uint32_t *)0x40004004u) /* bit 0: cannot send now; bit 1: a byte has come */
#define UART_CTRL (*(volatile uint32_t *)0x40004008u)  /* bit 0: send; bit 1: receive */
#define UART_BAUDDIV (*(volatile uint32_t *)0x40004010u)

static void switch_on(void)
{
    if (!(UART_CTRL & 3u)) {
        UART_BAUDDIV = 25000000u / 115200u;
        UART_CTRL = 3u;
    }
}

int io_read(uint8_t *to, uint32_t bytes)
{
    switch_on();
    while (bytes--) {
        while (!(UART_STATE & 2u)) {
        }
        *to++ = (uint8_t)UART_DATA;
    }
    return 1; /* a wire has no end */
}

void io_write(const char *text)
{
    switch_on();
    while (*text) {
        while (UART_STATE & 1u) {
        }
        UART_DATA = (uint8_t)*text++;
    }
}

void io_exit(int status)
{
    (void)status;
    for (;;) {
    }
}
