/* Statuses as text, and the version. */
#include <stdio.h>
#include <string.h>

#include "internal.h"

const char *tm_version(void) { return TIERMEM_VERSION; }

const char *tm_status_text(int status) {
    static _Thread_local char text[128];
    switch (status) {
    case 0: return "success";
    case TM_E_SHORT: return "the file ends before the bytes that were asked for";
    case TM_E_ALIGN: return "an address, offset or length is not aligned as required";
    case TM_E_RANGE: return "outside of the segment, range or staging memory";
    case TM_E_SEALED: return "the segment is sealed";
    default: break;
    }
    if (status > 0 || status < -4095 || strerror_r(-status, text, sizeof text) != 0)
        snprintf(text, sizeof text, "status %d", status);
    return text;
}
