/* Settings, which are accepted and change nothing here, and features that a card may lack and this one does. Where arguments
 * are not looked at they are not declared: in every ABI that CANN is made for they are the caller's affair. */
#include "sim.h"

#define ACCEPT(name) \
    API aclError name(void) { return sim_accept(#name); }
#define REFUSE(name) \
    API aclError name(void) { return sim_refuse(#name); }

ACCEPT(aclmdlFinalizeDump)
ACCEPT(aclmdlInitDump)
ACCEPT(aclmdlSetDump)
ACCEPT(aclrtCtxSetSysParamOpt)
ACCEPT(aclrtGetLastError)
ACCEPT(aclrtPeekAtLastError)
ACCEPT(aclrtResetDeviceResLimit)
ACCEPT(aclrtResetStreamResLimit)
ACCEPT(aclrtSetDeviceResLimit)
ACCEPT(aclrtSetDeviceSatMode)
ACCEPT(aclrtSetOpExecuteTimeOut)
ACCEPT(aclrtSetOpWaitTimeout)
ACCEPT(aclrtSetStreamAttribute)
ACCEPT(aclrtSetStreamOverflowSwitch)
ACCEPT(aclrtSetStreamResLimit)
ACCEPT(aclrtSetSysParamOpt)
ACCEPT(aclrtUnuseStreamResInCurrentThread)
ACCEPT(aclrtUseStreamResInCurrentThread)

REFUSE(aclrtCmoAsync)
REFUSE(aclrtDeviceTaskAbort)
REFUSE(aclrtGetErrorVerbose)
REFUSE(aclrtGetHardwareSyncAddr)
REFUSE(aclrtIpcGetEventHandle)
REFUSE(aclrtIpcOpenEventHandle)
REFUSE(aclrtMemExportToShareableHandle)
REFUSE(aclrtMemImportFromShareableHandle)
REFUSE(aclrtMemSetPidToShareableHandle)
REFUSE(aclrtMemUceRepair)
REFUSE(aclrtMemcpyBatch)
REFUSE(aclrtRepairError)
REFUSE(aclrtValueWait)
REFUSE(aclrtValueWrite)
REFUSE(rtGetC2cCtrlAddr)

API aclError aclrtGetSysParamOpt(int32_t option, int64_t *value) {
    (void)option;
    *value = 0;
    return sim_accept(__func__);
}

API aclError aclrtCtxGetSysParamOpt(int32_t option, int64_t *value) {
    (void)option;
    *value = 0;
    return sim_accept(__func__);
}

API aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *on) {
    (void)stream;
    *on = 0;
    return sim_accept(__func__);
}

API aclError aclrtGetDeviceResLimit(int32_t device, int32_t kind, uint32_t *limit) {
    (void)device, (void)kind;
    *limit = SIM_CORES;
    return sim_accept(__func__);
}

API aclError aclrtGetStreamResLimit(aclrtStream stream, int32_t kind, uint32_t *limit) {
    (void)stream, (void)kind;
    *limit = SIM_CORES;
    return sim_accept(__func__);
}

API aclError aclrtGetResInCurrentThread(int32_t kind, uint32_t *limit) {
    (void)kind;
    *limit = SIM_CORES;
    return sim_accept(__func__);
}

API aclError aclrtSetOpExecuteTimeOutV2(uint64_t wanted_us, uint64_t *actual_us) {
    *actual_us = wanted_us;
    return sim_accept(__func__);
}

API aclError aclrtGetMemUceInfo(int32_t device, void *errors, size_t room, size_t *count) {
    (void)device, (void)errors, (void)room;
    *count = 0;
    return sim_accept(__func__);
}

API aclError aclrtGetMemUsageInfo(uint32_t device, void *modules, size_t room, size_t *count) {
    (void)device, (void)modules, (void)room;
    *count = 0;
    return sim_accept(__func__);
}

API void aclAppLog(void) {}

/* The profiler: nothing is profiled. */
API uint64_t MsprofGetHashId(void) { return 0; }
API uint64_t MsprofSysCycleTime(void) { return 0; }
API int32_t MsprofRegisterCallback(void) { return 0; }
API int32_t MsprofReportAdditionalInfo(void) { return 0; }
API int32_t MsprofReportApi(void) { return 0; }
API int32_t MsprofReportCompactInfo(void) { return 0; }
