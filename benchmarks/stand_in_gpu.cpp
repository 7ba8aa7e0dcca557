// For stand_in_gpu.py: all that PyTorch asks of CUDA before it would run a kernel, for shapes without values.
// Preloaded, it answers as one H100 would. It has the name of the driver's library, so that PyTorch finds it there.
#include <cstring>
#include <cuda_runtime_api.h>

static cudaDeviceProp *h100() {
  static cudaDeviceProp properties;
  std::strcpy(properties.name, "stand-in H100");
  properties.major = 9; // by which PyTorch chooses its attention
  return &properties;
}

namespace at::cuda {
cudaDeviceProp *getDeviceProperties(signed char) { return h100(); }
} // namespace at::cuda

extern "C" {
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return *least = *greatest = 0, cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int, unsigned *, int *active) { return *active = 0, 0; }
}
