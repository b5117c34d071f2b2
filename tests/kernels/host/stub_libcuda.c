// A CUDA driver that does nothing but record launches, so that Triton's own launchers run where there is no GPU.
#include <stdint.h>
#include <string.h>

#define MOST 4096
#define PARAMETERS 40

typedef int CUresult;
typedef struct { unsigned grid[3], block[3], shared; void *stream; } Launch;  // as CUlaunchConfig begins

static int launches, lookups;
static unsigned grids[MOST][3];
static uint64_t parameters[MOST][PARAMETERS];
static void *streams[MOST], *functions[MOST];
static int wanted;

int stub_launches(void) { return launches; }
int stub_lookups(void) { return lookups; }
void stub_reset(int parameters_of_each) { launches = lookups = 0; wanted = parameters_of_each; }
unsigned *stub_grid(int i) { return grids[i]; }
uint64_t *stub_parameters(int i) { return parameters[i]; }
void *stub_stream(int i) { return streams[i]; }
void *stub_function(int i) { return functions[i]; }

CUresult cuLaunchKernelEx(Launch *config, void *function, void **values, void **extra) {
    if (launches < MOST) {
        memcpy(grids[launches], config->grid, sizeof config->grid);
        streams[launches] = config->stream, functions[launches] = function;
        for (int i = 0; i < wanted && i < PARAMETERS; i++) memcpy(&parameters[launches][i], values[i], 8);
    }
    launches++;
    return 0;
}
CUresult cuPointerGetAttribute(void *out, int attribute, unsigned long long pointer) {
    lookups++;
    *(unsigned long long *)out = pointer;
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 232448;  // compute capability 9.0; all else is large
    return 0;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { static long next = 2; *module = (void *)next++; return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count) { *count = 1; return 0; }
CUresult cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuTensorMapEncodeTiled(void *map) { return 0; }
CUresult cuTensorMapEncodeIm2col(void *map) { return 0; }
