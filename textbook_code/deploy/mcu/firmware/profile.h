/* Put before net.c and main.c with -include, this counts the ticks of each kind of operation. */
void net_step(const char *kind);
#define NET_STEP(index, kind) net_step(kind)
