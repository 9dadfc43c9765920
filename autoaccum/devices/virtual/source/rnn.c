/* cuDNN's recurrent nets: shapes of weights, and how much memory PyTorch is asked to allocate.
 *
 * NVIDIA publishes no formula. These give four sizes that people printed, of cuDNN 6 and 7, and no less than a fifth:
 *   reserve space   LSTM 736000000, GRU 864000000: 4 layers of 320, 25000 steps in all (pytorch/pytorch#2895);
 *                   GRU 801177600: one layer of 800 in two directions, 326 steps of 64 (deepspeech.pytorch#172)
 *   workspace       GRU 313344000, 315801600: the same net, inputs of 672 and 800 (there);
 *                   21496576: two layers of 512, padded, where these give 26214400 (tensorflow/tensorflow#30889)
 * What newer versions ask for, or in half precision and by persistent kernels, isn't published. */
#include "gpu.h"
#include <cudnn.h>

#define DNN(name, arguments, doing) \
  API cudnnStatus_t name arguments { return doing, CUDNN_STATUS_SUCCESS; }

struct cudnnRNNStruct {
  cudnnRNNMode_t mode;
  int64_t directions, element, input, hidden, output, layers;
  int projects, padded;
};
struct cudnnRNNDataStruct { int64_t batch, steps; }; /* steps: of all sequences, padding included where it is kept */
struct cudnnTensorStruct { int count, sizes[3]; };   /* only those of weights are read */

DNN(cudnnCreateRNNDescriptor, (cudnnRNNDescriptor_t *made), *made = calloc(1, sizeof **made))
DNN(cudnnDestroyRNNDescriptor, (cudnnRNNDescriptor_t made), free(made))
DNN(cudnnCreateRNNDataDescriptor, (cudnnRNNDataDescriptor_t *made), *made = calloc(1, sizeof **made))
DNN(cudnnDestroyRNNDataDescriptor, (cudnnRNNDataDescriptor_t made), free(made))

static int64_t size_of(cudnnDataType_t type) {
  return type == CUDNN_DATA_DOUBLE ? 8 : type == CUDNN_DATA_HALF || type == CUDNN_DATA_BFLOAT16 ? 2 : 4;
}

API cudnnStatus_t cudnnSetRNNDescriptor_v8(cudnnRNNDescriptor_t net, cudnnRNNAlgo_t algorithm, cudnnRNNMode_t mode,
                                           cudnnRNNBiasMode_t biases, cudnnDirectionMode_t direction,
                                           cudnnRNNInputMode_t input_mode, cudnnDataType_t type,
                                           cudnnDataType_t computed, cudnnMathType_t math, int32_t input,
                                           int32_t hidden, int32_t projected, int32_t layers,
                                           cudnnDropoutDescriptor_t dropout, uint32_t flags) {
  *net = (struct cudnnRNNStruct){mode, direction == CUDNN_BIDIRECTIONAL ? 2 : 1, size_of(type), input, hidden,
                                 projected, layers, projected != hidden, flags & CUDNN_RNN_PADDED_IO_ENABLED};
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnSetRNNDataDescriptor(cudnnRNNDataDescriptor_t data, cudnnDataType_t type,
                                            cudnnRNNDataLayout_t layout, int longest, int batch, int width,
                                            const int lengths[], void *fill) {
  *data = (struct cudnnRNNDataStruct){.batch = batch};
  for (int i = 0; i < batch; i++)
    data->steps += layout == CUDNN_RNN_DATA_LAYOUT_SEQ_MAJOR_PACKED ? lengths[i] : longest;
  return CUDNN_STATUS_SUCCESS;
}

/* Weights ---------------------------------------------------------------
 * For each layer and direction: a matrix of the input and one of the hidden state for each gate, perhaps a projection;
 * then the biases. PyTorch makes views of them, and checks that those of one kind lie side by side. */

static int64_t gates(const struct cudnnRNNStruct *net) {
  return net->mode == CUDNN_LSTM ? 4 : net->mode == CUDNN_GRU ? 3 : 1;
}
static int64_t columns(const struct cudnnRNNStruct *net, int64_t layer, int64_t matrix) {
  if (matrix == 2 * gates(net)) return net->hidden; /* the projection's */
  if (matrix >= gates(net)) return net->output;
  return layer < net->directions ? net->input : net->output * net->directions;
}
static int64_t rows(const struct cudnnRNNStruct *net, int64_t matrix) {
  return matrix == 2 * gates(net) ? net->output : net->hidden;
}
/* How many numbers lie before a matrix of a layer; of all, after the last layer. */
static int64_t matrices_before(const struct cudnnRNNStruct *net, int64_t layer, int64_t matrix) {
  int64_t count = 0;
  for (int64_t l = 0; l <= layer; l++)
    for (int64_t m = 0; m < (l < layer ? 2 * gates(net) + net->projects : matrix); m++)
      count += rows(net, m) * columns(net, l, m);
  return count;
}
static int64_t all_matrices(const struct cudnnRNNStruct *net) {
  return matrices_before(net, net->layers * net->directions, 0);
}

DNN(cudnnGetRNNWeightSpaceSize, (cudnnHandle_t h, cudnnRNNDescriptor_t net, size_t *bytes),
    *bytes = net->element * (all_matrices(net) + net->layers * net->directions * 2 * gates(net) * net->hidden))

API cudnnStatus_t cudnnGetRNNWeightParams(cudnnHandle_t h, cudnnRNNDescriptor_t net, int32_t layer, size_t bytes,
                                          const void *weights, int32_t which, cudnnTensorDescriptor_t matrix,
                                          void **at, cudnnTensorDescriptor_t bias, void **bias_at) {
  int64_t before = all_matrices(net) + (layer * 2 * gates(net) + which) * net->hidden;
  if (matrix) {
    *matrix = (struct cudnnTensorStruct){3, {1, rows(net, which), columns(net, layer, which)}};
    *at = (char *)weights + net->element * matrices_before(net, layer, which);
  }
  if (bias) {
    *bias = (struct cudnnTensorStruct){3, {1, net->hidden, 1}};
    *bias_at = (char *)weights + net->element * before;
  }
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnGetTensorNdDescriptor(cudnnTensorDescriptor_t tensor, int room, cudnnDataType_t *type,
                                             int *count, int sizes[], int strides[]) {
  *count = tensor->count < room ? tensor->count : room;
  memcpy(sizes, tensor->sizes, *count * sizeof *sizes);
  return CUDNN_STATUS_SUCCESS;
}

/* What PyTorch allocates for a call -------------------------------------- */

/* Kept for the backward pass: what each gate made and the cell's state; between layers, their outputs. */
static int64_t reserve_of(const struct cudnnRNNStruct *net, int64_t steps) {
  int64_t kept = net->mode == CUDNN_LSTM ? 5 : net->mode == CUDNN_GRU ? 6 : 1;
  return steps * net->hidden * net->directions * (net->layers * kept + net->layers - 1);
}
/* For the call alone: the weights, a little of a step's size, outputs of two directions and their gradients, and
 * where padding is taken out, inputs and outputs without it and their gradients. */
static int64_t workspace_of(const struct cudnnRNNStruct *net, const struct cudnnRNNDataStruct *data) {
  int64_t both = net->directions > 1 || net->padded ? 2 * data->steps * net->hidden * net->directions : 0;
  int64_t inputs = net->padded ? 2 * data->steps * net->input : 0;
  return all_matrices(net) + 88 * data->batch * net->hidden + both + inputs;
}
API cudnnStatus_t cudnnGetRNNTempSpaceSizes(cudnnHandle_t h, cudnnRNNDescriptor_t net, cudnnForwardMode_t mode,
                                            cudnnRNNDataDescriptor_t data, size_t *workspace, size_t *reserve) {
  if (workspace) *workspace = net->element * workspace_of(net, data);
  if (reserve) *reserve = mode == CUDNN_FWD_MODE_TRAINING ? net->element * reserve_of(net, data->steps) : 0;
  return CUDNN_STATUS_SUCCESS;
}

/* Dropout between layers ------------------------------------------------
 * The state of a random generator for each thread that can run at once: curandState has 48 bytes. */

DNN(cudnnCreateDropoutDescriptor, (cudnnDropoutDescriptor_t *made), *made = calloc(1, 64))
DNN(cudnnDestroyDropoutDescriptor, (cudnnDropoutDescriptor_t made), free(made))
DNN(cudnnSetDropoutDescriptor, (cudnnDropoutDescriptor_t dropout, cudnnHandle_t h, float part, void *states,
                                size_t bytes, unsigned long long seed), (void)h)
DNN(cudnnRestoreDropoutDescriptor, (cudnnDropoutDescriptor_t dropout, cudnnHandle_t h, float part, void *states,
                                    size_t bytes, unsigned long long seed), (void)h)
DNN(cudnnDropoutGetStatesSize, (cudnnHandle_t h, size_t *bytes),
    *bytes = 48ull * attribute(cudaDevAttrMaxThreadsPerMultiProcessor, 0) * settings.multiprocessors)
