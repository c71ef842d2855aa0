/* libacl_op_compiler: an operator that is compiled and executed is a kernel of its name on its stream. */
#include "sim.h"

API aclError aclopCompileAndExecute(const char *type, int input_count, const void *const inputs[], const void *const input_data[],
                                    int output_count, const void *const outputs[], void *const output_data[],
                                    const void *attributes, int32_t engine, int32_t how, const char *path, aclrtStream stream) {
    (void)input_count, (void)inputs, (void)input_data, (void)output_count, (void)outputs, (void)output_data;
    (void)attributes, (void)engine, (void)how, (void)path;
    return sim_acl_launch(__func__, type, stream);
}

API aclError aclSetCompileopt(void) { return ACL_SUCCESS; }
API aclError aclopStartDumpArgs(void) { return ACL_NOT_SUPPORTED; }
API aclError aclopStopDumpArgs(void) { return ACL_NOT_SUPPORTED; }

API size_t aclGetCompileoptSize(int32_t option) {
    (void)option;
    return 1;
}

API aclError aclGetCompileopt(int32_t option, char *value, size_t room) {
    (void)option;
    if (room) *value = 0;
    return ACL_SUCCESS;
}
