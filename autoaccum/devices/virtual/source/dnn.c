/* cuDNN: convolutions, attention and batch norm; recurrent nets are in rnn.c. */
#include "gpu.h"
#include <cudnn.h>
#include <time.h>

#define DNN(name, arguments, doing) \
  API cudnnStatus_t name arguments { return doing, CUDNN_STATUS_SUCCESS; }

/* The library and its handle --------------------------------------------- */

API size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
API size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
DNN(cudnnGetProperty, (libraryPropertyType which, int *value),
    *value = which == MAJOR_VERSION ? CUDNN_MAJOR : which == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL)
API const char *cudnnGetErrorString(cudnnStatus_t status) {
  return status ? "not supported (not modelled by the virtual GPU)" : "success";
}
API void cudnnGetLastErrorString(char *text, size_t length) {
  if (length) *text = 0;
}
DNN(cudnnCreate, (cudnnHandle_t *h), *h = calloc(1, 64))
DNN(cudnnDestroy, (cudnnHandle_t h), free(h))
DNN(cudnnSetStream, (cudnnHandle_t h, cudaStream_t stream), *(cudaStream_t *)h = stream)
DNN(cudnnGetStream, (cudnnHandle_t h, cudaStream_t *stream), *stream = *(cudaStream_t *)h)

/* Convolutions and attention --------------------------------------------
 * PyTorch uses the backend (graph) API, whose objects are opaque: here each carries the bytes of the tensors under it,
 * from which the workspace of the one faked engine follows. Only convolutions have one: what attention asks for, in its
 * backward pass above all, isn't known here. If that is not nothing, a second engine without one is
 * offered, as the real library mostly does: PyTorch turns to it when the workspace doesn't fit. Without that fallback
 * PyTorch says "unable to find an engine" instead of "out of memory". */

typedef struct { int element, channels_last; int64_t channels, window; } Tensor;
typedef struct { int type, convolutions, rank; int64_t bytes, workspace, transposed; Tensor tensor, x, w; } Descriptor;

static int is_convolution(cudnnBackendDescriptorType_t type) {
  return type == CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR ||
         type == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR ||
         type == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR;
}

/* What a convolution needs where its workspace is set to "transposed": copies of its three tensors. In half precision
 * cuDNN uses tensor cores, whose kernels want channels last, and turns what isn't ("NCHW-to-NHWC transformations",
 * docs.nvidia.com/deeplearning/cudnn/developer/legacy-api.html). A 1 x 1 forward is a matrix product as it lies, and one
 * channel at a time needs none. Held against GPUs in docs/ground-truth.md. */
static int64_t transposed_bytes(const Descriptor *operation) {
  const Tensor *x = &operation->x, *w = &operation->w;
  int forward = operation->type == CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR;
  int by_channel = w->channels == 1 && x->channels > 1;
  return x->element == 2 && !x->channels_last && !by_channel && !(forward && w->window == 1) ? operation->bytes : 0;
}

static int size_of(cudnnDataType_t type) {
  switch (type) {
    case CUDNN_DATA_DOUBLE: case CUDNN_DATA_INT64: return 8;
    case CUDNN_DATA_HALF: case CUDNN_DATA_BFLOAT16: return 2;
    case CUDNN_DATA_INT8: case CUDNN_DATA_UINT8: case CUDNN_DATA_BOOLEAN: return 1;
    case CUDNN_DATA_FP8_E4M3: case CUDNN_DATA_FP8_E5M2: return 1;
    default: return 4;
  }
}

API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *made) {
  Descriptor *d = calloc(1, sizeof *d);
  d->type = type;
  d->convolutions = is_convolution(type);
  return *made = d, CUDNN_STATUS_SUCCESS;
}
DNN(cudnnBackendDestroyDescriptor, (cudnnBackendDescriptor_t d), free(d))
DNN(cudnnBackendFinalize, (cudnnBackendDescriptor_t d), (void)d)
/* Where engines are timed (cudnn.benchmark), the first one is the fastest. */
API cudnnStatus_t cudnnBackendExecute(cudnnHandle_t h, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
  int rank = ((Descriptor *)plan)->rank;
  if (rank) nanosleep(&(struct timespec){.tv_nsec = rank * 200000}, NULL);
  return launch(NULL), CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                           cudnnBackendAttributeType_t type, int64_t count, const void *values) {
  Descriptor *d = descriptor;
  if (name == CUDNN_ATTR_TENSOR_DATA_TYPE) {
    d->tensor.element = size_of(*(cudnnDataType_t *)values);
  } else if (name == CUDNN_ATTR_TENSOR_DIMENSIONS) {
    const int64_t *sizes = values;
    d->bytes = d->tensor.window = 1;
    d->tensor.channels = count > 1 ? sizes[1] : 1;
    for (int64_t i = 0; i < count; i++) {
      d->bytes *= sizes[i];
      if (i > 1) d->tensor.window *= sizes[i];
    }
  } else if (name == CUDNN_ATTR_TENSOR_STRIDES) {
    d->tensor.channels_last = count > 1 && ((int64_t *)values)[1] == 1;
  } else if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    while (count-- > 0) {
      Descriptor *under = ((Descriptor **)values)[count];
      if (!under) continue;
      d->bytes += under->bytes * (under->type == CUDNN_BACKEND_TENSOR_DESCRIPTOR ? under->tensor.element : 1);
      if (name == CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X || name == CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX ||
          name == CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X)
        d->x = under->tensor;
      if (name == CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W || name == CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W ||
          name == CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW)
        d->w = under->tensor;
      d->transposed += is_convolution(under->type) ? transposed_bytes(under) : under->transposed;
      d->workspace += under->workspace;
      d->convolutions += under->convolutions;
      d->rank += under->rank;
    }
  }
  return CUDNN_STATUS_SUCCESS;
}

/* The engines that the heuristic finds; how many, where `room` is 0. */
static int64_t engines(const Descriptor *d, int64_t room, Descriptor **found) {
  int64_t workspace = d->convolutions ? settings.workspace + (int64_t)(settings.workspace_factor * d->bytes) : 0;
  if (settings.workspace_transposed) workspace = d->transposed;
  int64_t count = workspace && settings.fallback ? 2 : 1, trial = d->convolutions && settings.trial ? count++ : 0;
  if (!found || room <= 0) return count;
  found[0]->workspace = workspace;
  if (trial && trial < room) found[trial]->workspace = settings.trial;
  for (int64_t i = 0; i < room && i < count; i++) found[i]->rank = i;
  return room < count ? room : count;
}
API cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor,
                                           cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                           int64_t room, int64_t *count, void *values) {
  const Descriptor *d = descriptor;
  int64_t found = 0; /* of notes and knobs there are none */
  switch (name) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS: found = engines(d, room, values); break;
    case CUDNN_ATTR_ENGINECFG_ENGINE:
    case CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG: found = 1; break;
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
      found = 1;
      if (values) *(int64_t *)values = 0;
      break;
#if CUDNN_VERSION >= 90200
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
      found = 1;
      if (values) *(int32_t *)values = 0;
      break;
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
#endif
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
      found = 1;
      if (values) *(int64_t *)values = d->workspace;
      break;
    default: break;
  }
  if (count) *count = found;
  return CUDNN_STATUS_SUCCESS;
}

/* Batch norm ------------------------------------------------------------
 * It goes through the older API, with the descriptors that this needs; neither workspace nor reserve space. */

#define DNN_OBJECT(Name)                                                                             \
  DNN(cudnnCreate##Name##Descriptor, (cudnn##Name##Descriptor_t * made), *made = calloc(1, 64))      \
  DNN(cudnnDestroy##Name##Descriptor, (cudnn##Name##Descriptor_t made), free(made))
DNN_OBJECT(Tensor)
DNN_OBJECT(Filter)
DNN_OBJECT(Activation)
DNN(cudnnSetTensorNdDescriptor,
    (cudnnTensorDescriptor_t d, cudnnDataType_t type, int count, const int sizes[], const int strides[]), (void)d)
DNN(cudnnSetFilterNdDescriptor,
    (cudnnFilterDescriptor_t d, cudnnDataType_t type, cudnnTensorFormat_t format, int count,
     const int sizes[]), (void)d)
DNN(cudnnSetActivationDescriptor,
    (cudnnActivationDescriptor_t d, cudnnActivationMode_t mode, cudnnNanPropagation_t nan, double ceiling), (void)d)
DNN(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize,
    (cudnnHandle_t h, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x,
     const cudnnTensorDescriptor_t z, const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t parameters,
     const cudnnActivationDescriptor_t activation, size_t *bytes), *bytes = 0)
DNN(cudnnGetBatchNormalizationBackwardExWorkspaceSize,
    (cudnnHandle_t h, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x,
     const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz,
     const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t parameters,
     const cudnnActivationDescriptor_t activation, size_t *bytes), *bytes = 0)
DNN(cudnnGetBatchNormalizationTrainingExReserveSpaceSize,
    (cudnnHandle_t h, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnActivationDescriptor_t activation,
     const cudnnTensorDescriptor_t x, size_t *bytes), *bytes = 0)
