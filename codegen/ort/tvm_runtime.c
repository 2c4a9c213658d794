/* The one function of TVM's runtime that compiled kernels call: they describe an error to it, then return non-zero. */
#include "sparse_linear.h"

#include <stdio.h>

static _Thread_local char last_error[256];

const char *tvm_last_error(void) { return last_error; }

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    size_t used = (size_t)snprintf(last_error, sizeof last_error, "%s: ", kind);
    for (int32_t i = 0; i < count && used < sizeof last_error; i++)
        if (parts[i])
            used += (size_t)snprintf(last_error + used, sizeof last_error - used, "%s", parts[i]);
}
