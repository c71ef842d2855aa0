/* What operators are described with. Nothing computes, so that only what callers read back is kept. */
#include <stdlib.h>
#include <string.h>

#include "sim.h"

enum { DIMENSIONS_MAX = 32 };

struct tensor {
    int32_t type, format;
    size_t dimensions;
    int64_t sizes[DIMENSIONS_MAX];
};

static void reshape(struct tensor *tensor, int dimensions, const int64_t *sizes) {
    tensor->dimensions = dimensions > DIMENSIONS_MAX ? DIMENSIONS_MAX : dimensions < 0 ? 0 : (size_t)dimensions;
    if (tensor->dimensions) memcpy(tensor->sizes, sizes, tensor->dimensions * sizeof *sizes);
}

API struct tensor *aclCreateTensorDesc(int32_t type, int dimensions, const int64_t *sizes, int32_t format) {
    struct tensor *tensor = calloc(1, sizeof *tensor);
    if (!tensor) return NULL;
    tensor->type = type;
    tensor->format = format;
    reshape(tensor, dimensions, sizes);
    return tensor;
}

API void aclDestroyTensorDesc(struct tensor *tensor) { free(tensor); }

API int32_t aclGetTensorDescType(const struct tensor *tensor) { return tensor->type; }

API int32_t aclGetTensorDescFormat(const struct tensor *tensor) { return tensor->format; }

API size_t aclGetTensorDescNumDims(const struct tensor *tensor) { return tensor->dimensions; }

API aclError aclGetTensorDescDimV2(const struct tensor *tensor, size_t index, int64_t *size) {
    if (index >= tensor->dimensions) return ACL_PARAM_INVALID;
    *size = tensor->sizes[index];
    return ACL_SUCCESS;
}

API aclError aclSetTensorFormat(struct tensor *tensor, int32_t format) {
    tensor->format = format;
    return ACL_SUCCESS;
}

API aclError aclSetTensorShape(struct tensor *tensor, int dimensions, const int64_t *sizes) {
    reshape(tensor, dimensions, sizes);
    return ACL_SUCCESS;
}

API aclError aclSetTensorPlaceMent(void) { return ACL_SUCCESS; }

API void aclSetTensorDescName(void) {}

API void *aclCreateDataBuffer(void) { return malloc(1); }

API aclError aclDestroyDataBuffer(void *buffer) {
    free(buffer);
    return ACL_SUCCESS;
}

API void *aclopCreateAttr(void) { return malloc(1); }

API void aclopDestroyAttr(void *attributes) { free(attributes); }

API aclError aclopSetAttrBool(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrDataType(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrFloat(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrInt(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrListBool(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrListFloat(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrListInt(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrListListInt(void) { return ACL_SUCCESS; }
API aclError aclopSetAttrString(void) { return ACL_SUCCESS; }
