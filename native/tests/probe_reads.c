/* A probe's loads pass through every cache line once before they come back, and its reads add up all of it. */
#include "check.h"
#include "probe.c" /* its inside: where the loads are, and the sum */

#define LINES (2 * PAGE / LINE_BYTES)

static void check_loads(tm_probe *probe) {
    static unsigned char seen[LINES];
    uint64_t ns, total = 0, sequential = 0;
    for (uint64_t i = 0; i < LINES; i++) {
        uint64_t before = probe->at;
        OK(tm_probe_latency(probe, 1, &ns));
        TRUE(probe->at < LINES);
        EXPECT(seen[probe->at]++, 0);
        sequential += probe->at == before + 1;
        total += ns;
    }
    EXPECT(probe->at, 0);
    TRUE(sequential < 10);
    TRUE(total > 0);
    OK(tm_probe_latency(probe, LINES + 1, &ns));
    EXPECT(probe->at, probe->lines[0].next);
}

int main(void) {
    tm_probe *probe;
    uint64_t ns, nodes;
    EXPECT(tm_probe_open(0, 1, &probe), TM_E_RANGE);
    EXPECT(tm_probe_open(UINT64_MAX, 1, &probe), TM_E_RANGE);
    EXPECT(tm_probe_open(UINT64_C(1) << 59, 0, &probe), -ENOMEM);
    OK(tm_probe_open(PAGE + 1, 1, &probe)); /* two pages, then */
    int status = tm_probe_where(probe, &nodes);
    if (status != -ENOSYS) {
        OK(status);
        EXPECT(nodes, 1);
        EXPECT(tm_probe_open(PAGE, UINT64_C(1) << 63, &probe), -ENODEV);
    }
    check_loads(probe);
    OK(tm_probe_bandwidth(probe, 3, &ns));
    TRUE(ns > 0);
    EXPECT(probe->sum, LINES * (LINES - 1) / 2);
    tm_probe_close(probe);
    tm_probe_close(NULL);
    return 0;
}
