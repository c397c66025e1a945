/* What runs before main: the vector table, the memory that C expects, the floating-point unit, faults. */
#include "io.h"

/* Set by flash.ld. Only their addresses mean anything. */
extern uint32_t data_load[], data_start[], data_end[], bss_start[], bss_end[], stack_bottom[], stack_top[];

int main(void);
void fault(void), fault_report(void), reset(void), systick(void);

#define CPACR (*(volatile uint32_t *)0xE000ED88u)
#define MPU_CTRL (*(volatile uint32_t *)0xE000ED94u)
#define MPU_RNR (*(volatile uint32_t *)0xE000ED98u)
#define MPU_RBAR (*(volatile uint32_t *)0xE000ED9Cu)
#define MPU_RASR (*(volatile uint32_t *)0xE000EDA0u)
#define PAINT 0xA5A5A5A5u

/* The core reads two words when power comes: where the stack begins, and where to go. The rest of the table
   says where to go when something happens; a word has the lowest bit set, which says Thumb code. */
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_top,           (const void *)reset,
    (const void *)fault, (const void *)fault,   /*  2 NMI,      3 HardFault */
    (const void *)fault, (const void *)fault,   /*  4 memory,   5 bus */
    (const void *)fault, 0, 0, 0, 0,            /*  6 usage,    7 to 10 reserved */
    (const void *)fault, (const void *)fault,   /* 11 SVCall,  12 DebugMonitor */
    0,                   (const void *)fault,   /* 13 reserved, 14 PendSV */
    (const void *)systick,                      /* 15 SysTick */
};

void reset(void)
{
#if defined(__ARM_FP) && __ARM_FP
    /* Coprocessors 10 and 11, the floating-point unit, are off after reset. The network needs none, but a
       compiler may keep an integer in one of its registers. */
    CPACR |= 0xFu << 20;
    __asm__ volatile("dsb\n isb" ::: "memory");
#endif
    /* Variables with a value have it in flash, those without are zero: copy, and clear. */
    for (uint32_t *to = data_start, *from = data_load; to < data_end;)
        *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    /* A stack that grows out of the RAM is to fault, whatever lies below: the memory protection unit forbids
       the 64 KB there and leaves the rest as it is. */
    MPU_RNR = 0;
    MPU_RBAR = (uint32_t)(uintptr_t)stack_bottom - 0x10000u;
    MPU_RASR = 1u << 28 | 15u << 1 | 1u; /* no code, no access, 2^(15 + 1) bytes, on */
    MPU_CTRL = 5u;                       /* on; the default map for everything else */
    __asm__ volatile("dsb\n isb" ::: "memory");
    /* Paint the stack below this function, to see later how deep it went. */
    volatile uint32_t *here = (volatile uint32_t *)__builtin_frame_address(0);
    for (volatile uint32_t *word = stack_bottom; word < here - 16; word++)
        *word = PAINT;
    io_exit(main());
}

uint32_t stack_used(void)
{
    const volatile uint32_t *word = stack_bottom;
    while (word < stack_top && *word == PAINT)
        word++;
    return (uint32_t)((const char *)stack_top - (const char *)word);
}

/* The stack may be what went wrong, so take a fresh one before calling anything. */
__attribute__((naked)) void fault(void)
{
    __asm__ volatile("ldr r0, =stack_top\n"
                     "mov sp, r0\n"
                     "b   fault_report\n"
                     ".ltorg\n");
}

__attribute__((used)) void fault_report(void)
{
    io_write("fault: the core stopped; a stack that is too small is the usual reason\n");
    io_exit(1);
}
