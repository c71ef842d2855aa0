/* Any number of threads copies every byte once, at any length and alignment. */
#include "check.h"

int main(void) {
    uint64_t room = 9 * PAGE + 100;
    unsigned char *source = malloc(room), *destination = malloc(room);
    TRUE(source && destination);
    random_fill(source, room, 7);
    const uint64_t lengths[] = {0, 1, 4095, 2 * PAGE, 2 * PAGE + 1, 9 * PAGE + 17};
    const unsigned threads[] = {0, 1, 3, 1000000};
    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (unsigned j = 0; j < sizeof threads / sizeof *threads; j++) {
            memset(destination, 0xEE, room);
            OK(tm_copy(destination + 13, source + 5, lengths[i], threads[j]));
            OK(memcmp(destination + 13, source + 5, lengths[i]));
            EXPECT(destination[12], 0xEE);
            EXPECT(destination[13 + lengths[i]], 0xEE);
        }
    }
    EXPECT(tm_copy(destination, source, UINT64_MAX, 1), TM_E_RANGE);
    free(source);
    free(destination);
    return 0;
}
