// libcublasLt for machines without a GPU: matrix products of 32-bit and 16-bit numbers, summed in single precision in
// an order that depends on the algorithm.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include <dlfcn.h>
#include <immintrin.h>

#include "enqueue.h"

#define API extern "C" __attribute__((visibility("default")))

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16,
};

enum DataType { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum ComputeType {
    COMPUTE_32F = 68,
    COMPUTE_32F_PEDANTIC = 69,
    COMPUTE_32F_FAST_16F = 74,
    COMPUTE_32F_FAST_16BF = 75,
    COMPUTE_32F_FAST_TF32 = 77,
};

// Returns early with a status that is not a success.
#define TRY(expression)                                                                                                \
    if (cublasStatus_t status_ = (expression)) return status_

// The attributes that callers have set, by number, as bytes.
class Attributes {
  public:
    cublasStatus_t set(int attribute, const void *value, std::size_t bytes) {
        if (!value || bytes == 0) return CUBLAS_STATUS_INVALID_VALUE;
        auto first = static_cast<const unsigned char *>(value);
        values_[attribute].assign(first, first + bytes);
        return CUBLAS_STATUS_SUCCESS;
    }

    template <class T>
    T get(int attribute, T otherwise) const {
        auto found = values_.find(attribute);
        if (found == values_.end()) return otherwise;
        T value = 0;
        std::memcpy(&value, found->second.data(), std::min(sizeof value, found->second.size()));
        return value;
    }

    cublasStatus_t read(int attribute, void *value, std::size_t bytes, std::size_t *written) const {
        auto found = values_.find(attribute);
        if (found == values_.end()) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (written) *written = found->second.size();
        if (bytes == 0 && written) return CUBLAS_STATUS_SUCCESS;
        if (!value || bytes < found->second.size()) return CUBLAS_STATUS_INVALID_VALUE;
        std::memcpy(value, found->second.data(), found->second.size());
        return CUBLAS_STATUS_SUCCESS;
    }

  private:
    std::map<int, std::vector<unsigned char>> values_;
};

struct Description : Attributes {
    enum { COMPUTE = 0, SCALE = 1, TRANSPOSE_A = 3, TRANSPOSE_B = 4, TRANSPOSE_C = 5, EPILOGUE = 7 };
};

struct Layout : Attributes {
    enum { TYPE = 0, ORDER = 1, ROWS = 2, COLUMNS = 3, STRIDE = 4, BATCHES = 5, BATCH_STRIDE = 6 };

    int type() const { return get<int>(TYPE, R_32F); }
    std::int64_t rows() const { return get<std::int64_t>(ROWS, 0); }
    std::int64_t columns() const { return get<std::int64_t>(COLUMNS, 0); }
    std::int64_t stride() const { return get<std::int64_t>(STRIDE, 0); }
    int batches() const { return get<int>(BATCHES, 1); }
    std::int64_t batch_stride() const { return get<std::int64_t>(BATCH_STRIDE, 0); }
    std::size_t element_bytes() const { return type() == R_32F ? 4 : 2; }
};

struct Preference : Attributes {
    enum { MAX_WORKSPACE = 1 };
};

struct Algorithm {
    std::uint64_t data[8];
};

struct HeuristicResult {
    Algorithm algorithm;
    std::size_t workspace_bytes;
    cublasStatus_t state;
    float waves;
    int reserved[4];
};

namespace {

// ---- algorithms: several, so that callers can choose. The first proposal is the slowest.

enum { IN_ORDER = 0, IN_HALVES = 1, FROM_THE_END = 2 };

constexpr std::uint64_t ALGORITHM_MARK = 0x756C6D7573;
constexpr std::size_t WORKSPACES[] = {0, 1024, 0};
constexpr int ALGORITHMS = 3;

Algorithm algorithm(int number) { return {{ALGORITHM_MARK, std::uint64_t(number)}}; }

bool is_known(const Algorithm &algorithm) {
    return algorithm.data[0] == ALGORITHM_MARK && algorithm.data[1] < ALGORITHMS;
}

HeuristicResult result_of(int number) {
    return {algorithm(number), WORKSPACES[number], CUBLAS_STATUS_SUCCESS, 1.0f, {}};
}

// ---- what is supported

cublasStatus_t check_types(const Description &description, int inputs, int outputs) {
    if (description.get<int>(Description::SCALE, R_32F) != R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (inputs != R_32F && inputs != R_16F && inputs != R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (outputs != R_32F && outputs != inputs) return CUBLAS_STATUS_NOT_SUPPORTED;
    switch (description.get<int>(Description::COMPUTE, COMPUTE_32F)) {
    case COMPUTE_32F:
    case COMPUTE_32F_PEDANTIC: return CUBLAS_STATUS_SUCCESS;
    case COMPUTE_32F_FAST_16F:
    case COMPUTE_32F_FAST_16BF:
    case COMPUTE_32F_FAST_TF32: return inputs == R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t check_layout(const Layout &layout) {
    if (layout.get<int>(Layout::ORDER, 0) != 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (layout.rows() <= 0 || layout.columns() <= 0 || layout.stride() < layout.rows() || layout.batches() < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}

struct Shape {
    std::int64_t m, n, k;
    bool transpose_a, transpose_b;
};

cublasStatus_t check(const Description &description, const Layout &a, const Layout &b, const Layout &c, const Layout &d,
                     Shape &shape) {
    enum { NONE = 0, TRANSPOSED = 1 };
    for (const Layout *layout : {&a, &b, &c, &d}) TRY(check_layout(*layout));
    if (a.type() != b.type() || c.type() != d.type()) return CUBLAS_STATUS_NOT_SUPPORTED;
    TRY(check_types(description, a.type(), d.type()));
    int transpose_a = description.get<int>(Description::TRANSPOSE_A, NONE);
    int transpose_b = description.get<int>(Description::TRANSPOSE_B, NONE);
    if (transpose_a > TRANSPOSED || transpose_b > TRANSPOSED) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (description.get<int>(Description::TRANSPOSE_C, NONE) != NONE) return CUBLAS_STATUS_NOT_SUPPORTED;
    constexpr int DEFAULT_EPILOGUE = 1;
    if (description.get<int>(Description::EPILOGUE, DEFAULT_EPILOGUE) != DEFAULT_EPILOGUE)
        return CUBLAS_STATUS_NOT_SUPPORTED;

    std::int64_t m = a.rows(), k = a.columns(), k_of_b = b.rows(), n = b.columns();
    if (transpose_a == TRANSPOSED) std::swap(m, k);
    if (transpose_b == TRANSPOSED) std::swap(k_of_b, n);
    bool fits = k == k_of_b && d.rows() == m && d.columns() == n && c.rows() == m && c.columns() == n;
    bool same_batches = a.batches() == d.batches() && b.batches() == d.batches() && c.batches() == d.batches();
    if (!fits || !same_batches) return CUBLAS_STATUS_INVALID_VALUE;
    shape = {m, n, k, transpose_a == TRANSPOSED, transpose_b == TRANSPOSED};
    return CUBLAS_STATUS_SUCCESS;
}

// ---- numbers

float bf16_to_float(std::uint16_t bits) {
    std::uint32_t wide = std::uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

std::uint16_t bf16_from_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7FFF;
    return std::uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float load(const void *numbers, std::int64_t i, int type) {
    if (type == R_32F) return static_cast<const float *>(numbers)[i];
    std::uint16_t bits = static_cast<const std::uint16_t *>(numbers)[i];
    return type == R_16BF ? bf16_to_float(bits) : _cvtsh_ss(bits);
}

void store(void *numbers, std::int64_t i, int type, float x) {
    if (type == R_32F)
        static_cast<float *>(numbers)[i] = x;
    else
        static_cast<std::uint16_t *>(numbers)[i] = type == R_16BF ? bf16_from_float(x) : _cvtss_sh(x, 0);
}

// ---- the product

typedef float Floats __attribute__((vector_size(32)));
constexpr std::int64_t PANEL_ROWS = 16, PANEL_COLUMNS = 4;

// A matrix in panels of `PANEL` outer indices: [outer / PANEL][inner][outer % PANEL], with zeros at the end. The source
// has element (outer, inner) at outer * outer_step + inner * inner_step.
template <std::int64_t PANEL>
class Packed {
  public:
    Packed(const void *numbers, int type, std::int64_t outer, std::int64_t inner, std::int64_t outer_step,
           std::int64_t inner_step)
        : inner_(inner), numbers_(new(std::align_val_t(32)) float[(outer + PANEL - 1) / PANEL * PANEL * inner]) {
        float *next = numbers_.get();
        for (std::int64_t first = 0; first < outer; first += PANEL)
            for (std::int64_t k = 0; k < inner; k++)
                for (std::int64_t i = first; i < first + PANEL; i++)
                    *next++ = i < outer ? load(numbers, i * outer_step + k * inner_step, type) : 0.0f;
    }

    const float *panel(std::int64_t first) const { return &numbers_[first * inner_]; }

  private:
    struct Delete {
        void operator()(float *numbers) const { ::operator delete[](numbers, std::align_val_t(32)); }
    };

    std::int64_t inner_;
    std::unique_ptr<float[], Delete> numbers_;
};

// sums[column][row] of the products of two panels.
void multiply_panels(int number, const float *a, const float *b, std::int64_t k, float (*sums)[PANEL_ROWS]) {
    Floats total[PANEL_COLUMNS][2] = {};
    auto add = [&](std::int64_t first, std::int64_t end) {
        Floats part[PANEL_COLUMNS][2] = {};
        for (std::int64_t i = first; i < end; i++) {
            std::int64_t at = number == FROM_THE_END ? k - 1 - i : i;
            const Floats *rows = reinterpret_cast<const Floats *>(a + at * PANEL_ROWS);
            for (int column = 0; column < PANEL_COLUMNS; column++) {
                part[column][0] += rows[0] * b[at * PANEL_COLUMNS + column];
                part[column][1] += rows[1] * b[at * PANEL_COLUMNS + column];
            }
        }
        for (int column = 0; column < PANEL_COLUMNS; column++)
            for (int half = 0; half < 2; half++) total[column][half] += part[column][half];
    };
    std::int64_t middle = number == IN_HALVES ? k / 2 : 0;
    if (middle > 0) add(0, middle);
    add(middle, k);
    std::memcpy(sums, total, sizeof total);
}

struct Matrix {
    void *numbers;
    int type;
    std::size_t element_bytes;
    std::int64_t stride, batch_stride;

    Matrix(const void *numbers, const Layout &layout)
        : numbers(const_cast<void *>(numbers)), type(layout.type()), element_bytes(layout.element_bytes()),
          stride(layout.stride()), batch_stride(layout.batch_stride()) {}

    void *batch(int i) const { return static_cast<char *>(numbers) + i * batch_stride * std::int64_t(element_bytes); }
};

struct Product {
    Shape shape;
    Matrix a, b, c, d;
    float alpha, beta;
    int batches, number;
    void *workspace;
    std::size_t workspace_bytes;

    void operator()() const {
        // This exposes callers that keep data in the workspace.
        if (workspace_bytes > 0) std::memset(workspace, 0xFF, workspace_bytes);
        if (number == IN_ORDER) std::this_thread::sleep_for(std::chrono::microseconds(50));
        for (int i = 0; i < batches; i++) multiply(i);
    }

  private:
    void multiply(int batch) const {
        auto [m, n, k, transpose_a, transpose_b] = shape;
        Packed<PANEL_ROWS> rows(a.batch(batch), a.type, m, k, transpose_a ? a.stride : 1, transpose_a ? 1 : a.stride);
        Packed<PANEL_COLUMNS> columns(b.batch(batch), b.type, n, k, transpose_b ? 1 : b.stride,
                                      transpose_b ? b.stride : 1);
        for (std::int64_t column = 0; column < n; column += PANEL_COLUMNS)
            for (std::int64_t row = 0; row < m; row += PANEL_ROWS) {
                float sums[PANEL_COLUMNS][PANEL_ROWS];
                multiply_panels(number, rows.panel(row), columns.panel(column), k, sums);
                write(batch, row, column, sums);
            }
    }

    void write(int batch, std::int64_t row, std::int64_t column, const float (*sums)[PANEL_ROWS]) const {
        for (std::int64_t j = column; j < std::min(column + PANEL_COLUMNS, shape.n); j++)
            for (std::int64_t i = row; i < std::min(row + PANEL_ROWS, shape.m); i++) {
                float x = alpha * sums[j - column][i - row];
                if (beta != 0) x += beta * load(c.batch(batch), i + j * c.stride, c.type);
                store(d.batch(batch), i + j * d.stride, d.type, x);
            }
    }
};

// The emulated driver's function, or null if the caller has not loaded that driver.
ulmus::Enqueue find_enqueue() {
    void *driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return driver ? reinterpret_cast<ulmus::Enqueue>(dlsym(driver, "ulmus_emulator_enqueue")) : nullptr;
}

} // namespace

// ---- handles and texts

API cublasStatus_t cublasLtCreate(void **handle) {
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    *handle = new char;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtDestroy(void *handle) {
    delete static_cast<char *>(handle);
    return CUBLAS_STATUS_SUCCESS;
}

API std::size_t cublasLtGetVersion() { return 130000; }

API const char *cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR: return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_LICENSE_ERROR: return "CUBLAS_STATUS_LICENSE_ERROR";
    }
    return "CUBLAS_STATUS unknown";
}

API const char *cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

// ---- descriptions

API cublasStatus_t cublasLtMatmulDescCreate(Description **description, int compute_type, int scale_type) {
    *description = new Description;
    (*description)->set(Description::COMPUTE, &compute_type, sizeof compute_type);
    return (*description)->set(Description::SCALE, &scale_type, sizeof scale_type);
}

API cublasStatus_t cublasLtMatmulDescDestroy(Description *description) {
    delete description;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value,
                                                  std::size_t bytes) {
    return description ? description->set(attribute, value, bytes) : CUBLAS_STATUS_INVALID_VALUE;
}

API cublasStatus_t cublasLtMatmulDescGetAttribute(const Description *description, int attribute, void *value,
                                                  std::size_t bytes, std::size_t *written) {
    return description ? description->read(attribute, value, bytes, written) : CUBLAS_STATUS_INVALID_VALUE;
}

API cublasStatus_t cublasLtMatrixLayoutCreate(Layout **layout, int type, std::uint64_t rows, std::uint64_t columns,
                                              std::int64_t stride) {
    *layout = new Layout;
    (*layout)->set(Layout::TYPE, &type, sizeof type);
    (*layout)->set(Layout::ROWS, &rows, sizeof rows);
    (*layout)->set(Layout::COLUMNS, &columns, sizeof columns);
    return (*layout)->set(Layout::STRIDE, &stride, sizeof stride);
}

API cublasStatus_t cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value,
                                                    std::size_t bytes) {
    return layout ? layout->set(attribute, value, bytes) : CUBLAS_STATUS_INVALID_VALUE;
}

API cublasStatus_t cublasLtMatrixLayoutGetAttribute(const Layout *layout, int attribute, void *value, std::size_t bytes,
                                                    std::size_t *written) {
    return layout ? layout->read(attribute, value, bytes, written) : CUBLAS_STATUS_INVALID_VALUE;
}

API cublasStatus_t cublasLtMatmulPreferenceCreate(Preference **preference) {
    *preference = new Preference;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceDestroy(Preference *preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value,
                                                        std::size_t bytes) {
    return preference ? preference->set(attribute, value, bytes) : CUBLAS_STATUS_INVALID_VALUE;
}

// ---- algorithms and the product

// Proposes the algorithms whose workspace the preference allows.
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(void *handle, const Description *description, const Layout *a,
                                                  const Layout *b, const Layout *c, const Layout *d,
                                                  const Preference *preference, int wanted, HeuristicResult *results,
                                                  int *count) {
    if (!handle || !description || !a || !b || !c || !d || !results || !count || wanted < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    *count = 0;
    Shape shape;
    TRY(check(*description, *a, *b, *c, *d, shape));
    auto workspace = preference ? preference->get<std::uint64_t>(Preference::MAX_WORKSPACE, 0) : 0;
    for (int i = 0; i < ALGORITHMS && *count < wanted; i++)
        if (WORKSPACES[i] <= workspace) results[(*count)++] = result_of(i);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulAlgoCheck(void *handle, const Description *description, const Layout *a,
                                           const Layout *b, const Layout *c, const Layout *d,
                                           const Algorithm *algorithm, HeuristicResult *result) {
    if (!handle || !description || !a || !b || !c || !d || !algorithm || !result) return CUBLAS_STATUS_INVALID_VALUE;
    if (!is_known(*algorithm)) return CUBLAS_STATUS_INVALID_VALUE;
    Shape shape;
    TRY(check(*description, *a, *b, *c, *d, shape));
    *result = result_of(int(algorithm->data[1]));
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const Algorithm *, int, void *, std::size_t, std::size_t *) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

API cublasStatus_t cublasLtMatmul(void *handle, const Description *description, const float *alpha, const void *a,
                                  const Layout *a_layout, const void *b, const Layout *b_layout, const float *beta,
                                  const void *c, const Layout *c_layout, void *d, const Layout *d_layout,
                                  const Algorithm *algorithm, void *workspace, std::size_t workspace_bytes,
                                  void *stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!description || !alpha || !beta || !a || !b || !d) return CUBLAS_STATUS_INVALID_VALUE;
    if (!a_layout || !b_layout || !c_layout || !d_layout) return CUBLAS_STATUS_INVALID_VALUE;
    if (!c && *beta != 0) return CUBLAS_STATUS_INVALID_VALUE;
    Shape shape;
    TRY(check(*description, *a_layout, *b_layout, *c_layout, *d_layout, shape));
    if (c == d && c_layout->stride() != d_layout->stride()) return CUBLAS_STATUS_INVALID_VALUE;
    if (algorithm && !is_known(*algorithm)) return CUBLAS_STATUS_INVALID_VALUE;
    std::size_t used = algorithm ? WORKSPACES[algorithm->data[1]] : 0;
    if (used > 0 && (!workspace || workspace_bytes < used)) return CUBLAS_STATUS_INVALID_VALUE;

    static const ulmus::Enqueue enqueue = find_enqueue();
    if (!enqueue) return CUBLAS_STATUS_NOT_INITIALIZED;
    int number = algorithm ? int(algorithm->data[1]) : IN_ORDER;
    Product product = {shape, {a, *a_layout}, {b, *b_layout}, {c, *c_layout}, {d, *d_layout}, *alpha, *beta,
                       d_layout->batches(), number, workspace, used};
    return enqueue(stream, "cublasLtMatmul", product) == 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
