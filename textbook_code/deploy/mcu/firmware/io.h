/* The board's way in and out: io_semihost.c through the debugger or the emulator, io_uart.c over a wire. */
#ifndef IO_H
#define IO_H
#include <stdint.h>

int io_read(uint8_t *to, uint32_t bytes); /* 1 when all of them came, 0 when there is nothing more */
void io_write(const char *text);
void io_exit(int status) __attribute__((noreturn));

uint32_t stack_used(void); /* startup.c: the most bytes of stack that were in use until now */
#endif
