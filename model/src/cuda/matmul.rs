//! Products of large matrices by cublasLt. Sums are in f32, in an order that shapes, device and library decide.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;

use super::driver::{Address, lost};
use super::program::Format;

/// Bytes that the library may use for a product.
const WORKSPACE: usize = 32 << 20;
/// Alignment that all memory of a device has.
const ALIGNMENT: u64 = 256;

/// What is multiplied, row-major: `out` is [m, n].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// `a [m, k] · b [n, k]ᵀ`
    ByRows,
    /// `a [m, k] · b [k, n]`
    Plain,
    /// `a [k, m]ᵀ · b [k, n]`
    ByColumns,
}

/// A row-major matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub address: Address,
    pub format: Format,
    /// Elements from a row to the next.
    pub stride: usize,
}

impl Operand {
    /// Bytes that its address is a multiple of, at most [`ALIGNMENT`].
    fn alignment(self) -> u32 {
        (self.address.0 | ALIGNMENT).trailing_zeros().min(ALIGNMENT.trailing_zeros())
    }
}

/// All that decides the algorithm of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    form: Form,
    size: [usize; 3],
    formats: [Format; 2],
    strides: [usize; 3],
    /// As powers of two.
    alignments: [u32; 3],
    accumulate: bool,
}

/// What the library needs for a product.
struct Product {
    descriptor: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library, for one stream.
pub(super) struct Matmul {
    handle: sys::cublasLtHandle_t,
    stream: CUstream,
    workspace: u64,
    products: HashMap<Shape, Product>,
}

// SAFETY: handles may be used from any thread, one at a time, which the lock around this sees to.
unsafe impl Send for Matmul {}

fn kind(format: Format) -> sys::cudaDataType {
    match format {
        Format::F32 => sys::cudaDataType::CUDA_R_32F,
        Format::F16 => sys::cudaDataType::CUDA_R_16F,
        Format::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

impl Matmul {
    pub(super) fn new(stream: CUstream) -> Result<Self, String> {
        // SAFETY: only looks whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            let found = "libcublasLt is not found; install CUDA 13's cuBLAS or set LD_LIBRARY_PATH to it";
            return Err(found.to_owned());
        }
        let handle =
            result::create_handle().map_err(|error| format!("cublasLt does not start: {error:?}"))?;
        // SAFETY: the caller has bound the context.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE) }
            .map_err(|error| format!("there is no room for cublasLt's workspace: {error:?}"))?;
        Ok(Self { handle, stream, workspace, products: HashMap::new() })
    }

    /// `out = a · b`, or added to `out`.
    ///
    /// # Panics
    /// If the library has no algorithm for it, or fails.
    pub(super) fn multiply(
        &mut self,
        form: Form,
        size: [usize; 3],
        [a, b]: [Operand; 2],
        out: Operand,
        accumulate: bool,
    ) {
        if size.contains(&0) {
            return;
        }
        assert_eq!(a.format, b.format, "both sides of a product have one format");
        let shape = Shape {
            form,
            size,
            formats: [a.format, out.format],
            strides: [a, b, out].map(|operand| operand.stride),
            alignments: [a, b, out].map(Operand::alignment),
            accumulate,
        };
        let handle = self.handle;
        let Product { descriptor, layouts, algorithm } = self.products.entry(shape).or_insert_with(|| {
            Product::new(handle, shape)
                .unwrap_or_else(|error| lost("choose an algorithm", format_args!("{error:?} for {shape:?}")))
        });
        let (one, addend) = (1.0_f32, f32::from(u8::from(accumulate)));
        let pointer = |address: u64| address as *mut c_void;
        // The library counts by columns: its first matrix is our second, and all are transposed.
        // SAFETY: descriptors are alive, the scalars are read before the call returns, and addresses are of views that
        // the caller borrows.
        let done = unsafe {
            result::matmul(
                handle,
                *descriptor,
                (&raw const one).cast(),
                (&raw const addend).cast(),
                pointer(b.address.0),
                layouts[0],
                pointer(a.address.0),
                layouts[1],
                pointer(out.address.0),
                layouts[2],
                pointer(out.address.0),
                layouts[2],
                &raw const *algorithm,
                pointer(self.workspace),
                WORKSPACE,
                self.stream.cast(),
            )
        };
        done.unwrap_or_else(|error| lost("multiply matrices", format_args!("{error:?} at {shape:?}")));
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: each was created once; what cannot be given back goes with the process.
        unsafe {
            for product in self.products.values() {
                for layout in product.layouts {
                    result::destroy_matrix_layout(layout).ok();
                }
                result::destroy_matmul_desc(product.descriptor).ok();
            }
            driver::free_sync(self.workspace).ok();
            result::destroy_handle(self.handle).ok();
        }
    }
}

impl Product {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Self, CublasError> {
        let [m, n, k] = shape.size.map(|size| size as u64);
        let [a_stride, b_stride, out_stride] = shape.strides.map(|stride| stride as i64);
        let [input, output] = shape.formats.map(kind);
        // By columns: which of the two is transposed, and how many rows and columns each has.
        let (transposed, a, b) = match shape.form {
            Form::ByRows => ([true, false], [k, m], [k, n]),
            Form::Plain => ([false, false], [k, m], [n, k]),
            Form::ByColumns => ([false, true], [m, k], [n, k]),
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let descriptor = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let attributes = [
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
        ];
        for (attribute, transposed) in attributes.into_iter().zip(transposed) {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(transposed);
            // SAFETY: the attribute is an `int`.
            unsafe {
                result::set_matmul_desc_attribute(
                    descriptor,
                    attribute,
                    (&raw const operation).cast(),
                    size_of::<i32>(),
                )?;
            }
        }
        let layouts = [
            result::create_matrix_layout(input, b[0], b[1], b_stride)?,
            result::create_matrix_layout(input, a[0], a[1], a_stride)?,
            result::create_matrix_layout(output, n, m, out_stride)?,
        ];
        let algorithm = choose(handle, descriptor, layouts, shape.alignments)?;
        Ok(Self { descriptor, layouts, algorithm })
    }
}

/// The library's first choice, which is the same wherever device and library are.
fn choose(
    handle: sys::cublasLtHandle_t,
    descriptor: sys::cublasLtMatmulDesc_t,
    [first, second, out]: [sys::cublasLtMatrixLayout_t; 3],
    [a, b, c]: [u32; 3],
) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
    let preferences = result::create_matmul_pref()?;
    let workspace = WORKSPACE as u64;
    // Parts of a sum are joined in f32 and in order, if at all.
    let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    let words = [
        (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 1 << b),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 1 << a),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 1 << c),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 1 << c),
    ];
    // SAFETY: the first attribute is 8 bytes wide and the others 4; everything given is alive.
    let found = unsafe {
        result::set_matmul_pref_attribute(
            preferences,
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<u64>(),
        )?;
        for (attribute, word) in words {
            result::set_matmul_pref_attribute(
                preferences,
                attribute,
                (&raw const word).cast(),
                size_of::<u32>(),
            )?;
        }
        let found =
            result::get_matmul_algo_heuristic(handle, descriptor, first, second, out, out, preferences);
        result::destroy_matmul_pref(preferences)?;
        found
    };
    Ok(found?.algo)
}
