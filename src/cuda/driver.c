// The driver library, opened when the program starts instead of linked: a binary with CUDA support
// then also runs where no driver is installed. candle's cudarc links libcuda; the linker finds each
// function here first and drops the library. A function missing from this list brings it back.

#include <dlfcn.h>

#define FUNCTIONS(DO)                                                                              \
    DO(cuCtxDestroy_v2)                                                                            \
    DO(cuCtxGetCurrent)                                                                            \
    DO(cuCtxSetCurrent)                                                                            \
    DO(cuCtxSynchronize)                                                                           \
    DO(cuDeviceGet)                                                                                \
    DO(cuDeviceGetAttribute)                                                                       \
    DO(cuDeviceGetName)                                                                            \
    DO(cuDevicePrimaryCtxRelease_v2)                                                               \
    DO(cuDevicePrimaryCtxRetain)                                                                   \
    DO(cuDeviceTotalMem_v2)                                                                        \
    DO(cuEventCreate)                                                                              \
    DO(cuEventDestroy_v2)                                                                          \
    DO(cuEventElapsedTime_v2)                                                                      \
    DO(cuEventRecord)                                                                              \
    DO(cuEventSynchronize)                                                                         \
    DO(cuFuncSetAttribute)                                                                         \
    DO(cuGetErrorString)                                                                           \
    DO(cuGraphDestroy)                                                                             \
    DO(cuGraphExecDestroy)                                                                         \
    DO(cuGraphInstantiateWithFlags)                                                                \
    DO(cuGraphLaunch)                                                                              \
    DO(cuInit)                                                                                     \
    DO(cuLaunchKernel)                                                                             \
    DO(cuLaunchKernelEx)                                                                           \
    DO(cuMemAllocAsync)                                                                            \
    DO(cuMemAlloc_v2)                                                                              \
    DO(cuMemFreeAsync)                                                                             \
    DO(cuMemFreeHost)                                                                              \
    DO(cuMemFree_v2)                                                                               \
    DO(cuMemGetInfo_v2)                                                                            \
    DO(cuMemHostAlloc)                                                                             \
    DO(cuMemcpyDtoDAsync_v2)                                                                       \
    DO(cuMemcpyDtoHAsync_v2)                                                                       \
    DO(cuMemcpyHtoDAsync_v2)                                                                       \
    DO(cuMemcpyPeerAsync)                                                                          \
    DO(cuMemsetD8Async)                                                                            \
    DO(cuModuleGetFunction)                                                                        \
    DO(cuModuleLoad)                                                                               \
    DO(cuModuleLoadData)                                                                           \
    DO(cuModuleUnload)                                                                             \
    DO(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)                                       \
    DO(cuStreamBeginCapture_v2)                                                                    \
    DO(cuStreamCreate)                                                                             \
    DO(cuStreamDestroy_v2)                                                                         \
    DO(cuStreamEndCapture)                                                                         \
    DO(cuStreamIsCapturing)                                                                        \
    DO(cuStreamSynchronize)                                                                        \
    DO(cuStreamWaitEvent)                                                                          \
    DO(cuTensorMapEncodeTiled)

// CUDA_ERROR_STUB_LIBRARY: there is no driver.
static int absent(void) { return 34; }

// A function is a jump through its slot, which leaves every argument where it is.
#if defined(__x86_64__)
#define JUMP(slot) "jmp *" slot "(%rip)"
#elif defined(__aarch64__)
#define JUMP(slot) "adrp x16, " slot "\nldr x16, [x16, :lo12:" slot "]\nbr x16"
#endif

#define SLOT(name)                                                                                 \
    __attribute__((visibility("hidden"))) void *slot_##name = (void *)absent;                      \
    __asm__(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" JUMP("slot_" #name));
FUNCTIONS(SLOT)

__attribute__((constructor)) static void open_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver) return;
#define FILL(name)                                                                                 \
    void *found_##name = dlsym(driver, #name);                                                     \
    if (found_##name) slot_##name = found_##name;
    FUNCTIONS(FILL)
}
