/* A sealed segment refuses every way of writing that a process without privilege has. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

static void writes(volatile unsigned char *byte) { *byte = 1; }

static int dies_of_write(unsigned char *byte) {
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* the sanitizers' handler would turn it into an exit */
        writes(byte);
        _exit(0);
    }
    int how;
    EXPECT(waitpid(child, &how, 0), child);
    return WIFSIGNALED(how) && WTERMSIG(how) == SIGSEGV;
}

int main(void) {
    tm_segment *segment;
    OK(tm_segment_create(-1, "s", PAGE, 0, &segment));
    unsigned char *bytes = tm_segment_address(segment);
    bytes[0] = 7;
    TRUE(!dies_of_write(bytes)); /* the mapping is shared: the child wrote 1 */
    OK(tm_segment_seal(segment));
    OK(tm_segment_seal(segment));
    TRUE(dies_of_write(bytes));
    EXPECT(bytes[0], 1);
    EXPECT(tm_segment_prefault(segment, 0, PAGE, 1, 0), TM_E_SEALED);

    int shared;
    struct stat facts;
    char again[32];
    OK(tm_segment_share(segment, &shared));
    OK(fstat(shared, &facts));
    EXPECT(facts.st_mode & 0777, 0400);
    snprintf(again, sizeof again, "/proc/self/fd/%d", shared);
    int writable = open(again, O_RDWR | O_CLOEXEC); /* root may; the seals hold for root too */
    if (writable >= 0) {
        EXPECT(ftruncate(writable, 0), -1);
        EXPECT(write(writable, "x", 1), -1);
        TRUE(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, writable, 0) == MAP_FAILED);
        close(writable);
    }
    close(shared);
    tm_segment_close(segment);
    return 0;
}
