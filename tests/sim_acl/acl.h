/* The part of ACL's binary interface that is simulated: its handles, the structs that callers pass, the values of its enums
 * that are told apart, its status codes. Sizes and values are those of CANN 8.5; nothing here is declared for users. */
#ifndef SIM_ACL_ACL_H
#define SIM_ACL_ACL_H

#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef int32_t aclError;
typedef void *aclrtStream;
typedef void *aclrtEvent;
typedef void *aclrtContext;
typedef void *aclrtDrvMemHandle;
typedef void (*aclrtCallback)(void *data);

enum {
    ACL_SUCCESS = 0,
    ACL_PARAM_INVALID = 107000,
    ACL_INVALID_DEVICE = 107001,
    ACL_CONTEXT_NULL = 107002,
    ACL_INVALID_MEMORY_TYPE = 107016,
    ACL_INVALID_HANDLE = 107017,
    ACL_NOT_SUPPORTED = 207000,
    ACL_OUT_OF_MEMORY = 207001,
    ACL_NO_DEVICE = 207004,
    ACL_NO_RESOURCE = 207005,
    ACL_LOST_HEARTBEAT = 507010,
    ACL_REPORT_TIMEOUT = 507012,
    ACL_DMA_FAILED = 507013,
    ACL_STREAM_SYNC_TIMEOUT = 507046,
};

enum { COPY_H2H, COPY_H2D, COPY_D2H, COPY_D2D, COPY_BY_ADDRESS }; /* aclrtMemcpyKind; the others are device to device */
enum { ON_FAILURE_CONTINUE, ON_FAILURE_STOP };                    /* aclrtSetStreamFailureMode */
enum { EVENT_IPC = 0x40 };                                        /* a flag of aclrtCreateEventExWithFlag */
enum { LOCATION_HOST, LOCATION_DEVICE, LOCATION_UNREGISTERED };   /* aclrtMemLocationType */

struct acl_location {
    uint32_t device;
    int32_t type;
};

struct acl_pointer_attributes {
    struct acl_location location;
    uint32_t page_bytes;
    uint32_t reserved[4];
};

struct acl_physical_properties {
    int32_t handle_type, allocation_type, memory_attribute;
    struct acl_location location;
    uint64_t reserved;
};

struct acl_uuid {
    char bytes[16];
};

struct acl_utilization {
    int32_t cube, vector, aicpu, memory;
    void *extension;
};

struct acl_package_version {
    char text[128];
};

#endif
