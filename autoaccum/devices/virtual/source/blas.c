/* cuBLAS, cuBLASLt, cuSPARSE: only calls with results that the host reads. Of the others those that PyTorch imports
 * from cuBLAS are stubs that succeed, since they are kernels. PyTorch allocates cuBLAS's workspaces itself, through its
 * allocator, so they are counted. */
#include "gpu.h"
/* cuBLAS only names the half types; their own headers need the CUDA compiler's */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
typedef struct { unsigned short x; } __half, __nv_bfloat16;
typedef struct { unsigned short x, y; } __half2;
#include <cublasLt.h>
#include <cublas_v2.h>

/* Handles keep the modes that PyTorch sets and asks for again. */
typedef struct { cublasMath_t math; cublasPointerMode_t pointer; } Blas;
#define BLAS(name, arguments, doing) \
  API cublasStatus_t name arguments { return doing, CUBLAS_STATUS_SUCCESS; }
BLAS(cublasCreate_v2, (cublasHandle_t *h), *h = calloc(1, 64))
BLAS(cublasDestroy_v2, (cublasHandle_t h), free(h))
BLAS(cublasSetMathMode, (cublasHandle_t h, cublasMath_t mode), ((Blas *)h)->math = mode)
BLAS(cublasGetMathMode, (cublasHandle_t h, cublasMath_t *mode), *mode = ((Blas *)h)->math)
BLAS(cublasSetPointerMode_v2, (cublasHandle_t h, cublasPointerMode_t mode), ((Blas *)h)->pointer = mode)
BLAS(cublasGetPointerMode_v2, (cublasHandle_t h, cublasPointerMode_t *mode), *mode = ((Blas *)h)->pointer)
BLAS(cublasGetVersion_v2, (cublasHandle_t h, int *version), *version = CUBLAS_VERSION)
API size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
API size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }
API size_t cublasGetCudartVersion(void) { return CUDART_VERSION; }

#define LT_OBJECT(Name, arguments, type)                           \
  BLAS(cublasLt##Name##Create, arguments, *made = calloc(1, 64))  \
  BLAS(cublasLt##Name##Destroy, (type made), free((void *)made))
LT_OBJECT(MatmulDesc, (cublasLtMatmulDesc_t *made, cublasComputeType_t compute, cudaDataType_t scale),
          cublasLtMatmulDesc_t)
LT_OBJECT(MatrixLayout, (cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld),
          cublasLtMatrixLayout_t)
LT_OBJECT(MatmulPreference, (cublasLtMatmulPreference_t *made), cublasLtMatmulPreference_t)

/* One algorithm is found (status 0), which asks for no workspace. */
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t operation,
                                                  cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                  cublasLtMatmulPreference_t preference, int wanted,
                                                  cublasLtMatmulHeuristicResult_t *result, int *found) {
  memset(result, 0, sizeof *result);
  return *found = 1, CUBLAS_STATUS_SUCCESS;
}

/* What a failed call is called. These return text: a stub's number in its place would be read as an address. */
static const char *text_of(int status) {
  return status ? "not supported (not modelled by the virtual GPU)" : "success";
}
static const char *name_of(cublasStatus_t status) {
  return status ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_SUCCESS";
}
API const char *cublasGetStatusString(cublasStatus_t s) { return text_of(s); }
API const char *cublasGetStatusName(cublasStatus_t s) { return name_of(s); }
API const char *cublasLtGetStatusString(cublasStatus_t s) { return text_of(s); }
API const char *cublasLtGetStatusName(cublasStatus_t s) { return name_of(s); }
API const char *cusparseGetErrorString(int s) { return text_of(s); } /* cusparse.h needs the half types for real */
API const char *cusparseGetErrorName(int s) { return text_of(s); }
