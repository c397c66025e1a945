/* A compiler may turn a loop or an assignment into a call of these, library or none. */
#include <stddef.h>

void *memcpy(void *to, const void *from, size_t bytes);
void *memmove(void *to, const void *from, size_t bytes);
void *memset(void *to, int value, size_t bytes);

void *memcpy(void *to, const void *from, size_t bytes)
{
    char *a = to;
    const char *b = from;
    while (bytes--)
        *a++ = *b++;
    return to;
}

void *memmove(void *to, const void *from, size_t bytes)
{
    char *a = to;
    const char *b = from;
    if (a <= b)
        return memcpy(to, from, bytes);
    while (bytes--)
        a[bytes] = b[bytes];
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    char *a = to;
    while (bytes--)
        *a++ = (char)value;
    return to;
}
