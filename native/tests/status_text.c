/* Every status has a text of its own, in every thread. */
#include "check.h"

int main(void) {
    TRUE(strstr(tm_status_text(0), "success"));
    TRUE(strstr(tm_status_text(-ENOSPC), "space"));
    TRUE(strstr(tm_status_text(TM_E_SHORT), "ends before"));
    TRUE(strstr(tm_status_text(TM_E_ALIGN), "aligned"));
    TRUE(strstr(tm_status_text(TM_E_RANGE), "outside"));
    TRUE(strstr(tm_status_text(TM_E_SEALED), "sealed"));
    TRUE(strstr(tm_status_text(-123456), "-123456"));
    TRUE(strstr(tm_status_text(INT32_MIN), "2147483648"));
    TRUE(tm_version()[0] != 0);
    return 0;
}
