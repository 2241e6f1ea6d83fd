//! Products of large matrices by cublasLt. Sums are in f32, in an order that depends only on the algorithm.
//!
//! For each shape the library proposes algorithms, beginning with the one that it expects to be the fastest. By default
//! the first proposal is used, which is always the same for the same device and library. Between
//! [`Matmul::begin_choosing`] and [`Matmul::end_choosing`], the fastest proposal is measured, or an earlier choice is
//! used. Since measurements vary and algorithms sum in different orders, the caller has to keep the choice.

use std::collections::BTreeMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;
use serde::{Deserialize, Serialize};

use super::handle::{Address, Timer, lost};
use super::program::Format;

/// Size of the library's workspace in bytes.
const WORKSPACE: usize = 32 << 20;
/// Alignment of all allocations on a device.
const ALIGNMENT: u64 = 256;
/// Number of proposals that are measured for a product.
const PROPOSALS: usize = 8;
/// Number of measurements of each proposal, after a run that is not measured.
const TRIALS: usize = 3;
/// Number of products per measurement.
const TOGETHER: usize = 4;
/// An earlier proposal is preferred if no later one is faster by more than this factor.
const AS_GOOD: f32 = 1.02;

/// Which operands of a product are transposed. All matrices are row-major, and `out` is [m, n].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
    /// Distance from one row to the next, in elements.
    pub stride: usize,
}

impl Operand {
    /// The alignment of the address, at most [`ALIGNMENT`], as a power of two.
    fn alignment(self) -> u32 {
        (self.address.0 | ALIGNMENT).trailing_zeros().min(ALIGNMENT.trailing_zeros())
    }
}

/// Everything that the algorithm for a product depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
struct Shape {
    form: Form,
    size: [usize; 3],
    formats: [Format; 2],
    strides: [usize; 3],
    /// Alignments as powers of two.
    alignments: [u32; 3],
    accumulate: bool,
}

/// Algorithms by the shape of the product, in the library's own encoding.
type Choices = BTreeMap<Shape, [u64; 8]>;

/// The source of algorithms.
enum Source {
    /// The library's first proposal.
    Library,
    /// The fastest proposal is measured, and recorded here.
    Measured(Choices),
    /// An earlier choice.
    Known(Choices),
}

/// The library's handles for a product, and its algorithm.
#[derive(Clone, Copy)]
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
    products: BTreeMap<Shape, Product>,
    source: Source,
    choices: usize,
}

// SAFETY: the library's handles may be used from any thread, one at a time, which `&mut` and the lock around this
// ensure.
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
        // SAFETY: the function only checks whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            let found = "libcublasLt is not found; install CUDA 13's cuBLAS or set LD_LIBRARY_PATH to it";
            return Err(found.to_owned());
        }
        let handle =
            result::create_handle().map_err(|error| format!("cublasLt does not start: {error:?}"))?;
        // SAFETY: the caller has bound the context.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE) }
            .map_err(|error| format!("there is no memory for cublasLt's workspace: {error:?}"))?;
        Ok(Self { handle, stream, workspace, products: BTreeMap::new(), source: Source::Library, choices: 0 })
    }

    /// `out = a · b`, or `out += a · b` with `accumulate`.
    ///
    /// # Panics
    /// If the library has no algorithm for the product, or fails.
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
        assert_eq!(a.format, b.format, "both operands have the same format");
        let shape = Shape {
            form,
            size,
            formats: [a.format, out.format],
            strides: [a, b, out].map(|operand| operand.stride),
            alignments: [a, b, out].map(Operand::alignment),
            accumulate,
        };
        let product = self.product(shape, [a, b], out);
        self.call(&product, &product.algorithm, [a, b], out, accumulate)
            .unwrap_or_else(|error| lost("multiply matrices", format_args!("{error:?} at {shape:?}")));
    }

    fn product(&mut self, shape: Shape, operands: [Operand; 2], out: Operand) -> Product {
        if let Some(product) = self.products.get(&shape) {
            return *product;
        }
        let product = self
            .new_product(shape, operands, out)
            .unwrap_or_else(|error| lost("choose an algorithm", format_args!("{error:?} for {shape:?}")));
        self.products.insert(shape, product);
        product
    }

    fn new_product(
        &mut self,
        shape: Shape,
        operands: [Operand; 2],
        out: Operand,
    ) -> Result<Product, CublasError> {
        let mut product = Product::new(self.handle, shape)?;
        match &self.source {
            Source::Library => {}
            Source::Known(choices) => {
                if let Some(data) = choices.get(&shape) {
                    product.algorithm.data = *data;
                    product.check(self.handle)?;
                }
            }
            Source::Measured(choices) => {
                // Measuring would add to the output again and again, so the product without accumulation is measured.
                let twin = Shape { accumulate: false, ..shape };
                if let Some(data) = choices.get(&twin) {
                    product.algorithm.data = *data;
                } else if !shape.accumulate {
                    product.algorithm = self.fastest(&product, shape, operands, out)?;
                }
            }
        }
        if let Source::Measured(choices) = &mut self.source {
            choices.insert(shape, product.algorithm.data);
        }
        Ok(product)
    }

    /// Measures the library's proposals with these operands, and returns the fastest one. `out` is overwritten.
    fn fastest(
        &self,
        product: &Product,
        shape: Shape,
        operands: [Operand; 2],
        out: Operand,
    ) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let Product { descriptor, layouts, .. } = *product;
        let proposals = propose(self.handle, descriptor, layouts, shape.alignments, PROPOSALS)?;
        let timer = Timer::new();
        let time = |algorithm| -> Result<f32, CublasError> {
            let run = || self.call(product, algorithm, operands, out, false);
            run()?;
            let mut best = f32::INFINITY;
            for _ in 0..TRIALS {
                timer.start(self.stream);
                (0..TOGETHER).try_for_each(|_| run())?;
                best = best.min(timer.stop(self.stream));
            }
            Ok(best)
        };
        // A proposal that does not work counts as infinitely slow.
        let times: Vec<f32> =
            proposals.iter().map(|proposal| time(proposal).unwrap_or(f32::INFINITY)).collect();
        let best = times.iter().copied().fold(f32::INFINITY, f32::min);
        let chosen = times.iter().position(|time| *time <= best * AS_GOOD).unwrap_or(0);
        tracing::debug!(?shape, ?times, chosen, "algorithm of a product");
        Ok(proposals[chosen])
    }

    fn call(
        &self,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [a, b]: [Operand; 2],
        out: Operand,
        accumulate: bool,
    ) -> Result<(), CublasError> {
        let Product { descriptor, layouts, .. } = product;
        let (one, addend) = (1.0_f32, f32::from(u8::from(accumulate)));
        let pointer = |address: u64| address as *mut c_void;
        // The library is column-major, so its first matrix is our second one, and all are transposed. SAFETY: the
        // descriptors are alive, the scalars are read before the call returns, and the addresses are those of views
        // that the caller borrows.
        unsafe {
            result::matmul(
                self.handle,
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
                algorithm,
                pointer(self.workspace),
                WORKSPACE,
                self.stream.cast(),
            )
        }
    }

    /// From now on, products use the algorithms in `known`, a result of [`Matmul::end_choosing`]; without it, the
    /// fastest ones. All earlier choices are forgotten.
    ///
    /// # Errors
    /// If `known` is not such a result.
    pub(super) fn begin_choosing(&mut self, known: Option<&str>) -> Result<(), serde_json::Error> {
        self.source = match known {
            None => Source::Measured(Choices::new()),
            Some(text) => {
                let choices: Vec<(Shape, [u64; 8])> = serde_json::from_str(text)?;
                Source::Known(choices.into_iter().collect())
            }
        };
        for (_, product) in std::mem::take(&mut self.products) {
            product.destroy();
        }
        self.choices += 1;
        Ok(())
    }

    /// How often [`Matmul::begin_choosing`] was called. Graphs that were captured before that are outdated.
    pub(super) fn choices(&self) -> usize {
        self.choices
    }

    /// Returns the chosen algorithms. From now on, new products use the library's first proposal.
    pub(super) fn end_choosing(&mut self) -> String {
        let choices = match std::mem::replace(&mut self.source, Source::Library) {
            Source::Library => Choices::new(),
            Source::Measured(choices) | Source::Known(choices) => choices,
        };
        let choices: Vec<_> = choices.into_iter().collect();
        serde_json::to_string(&choices).expect("numbers and variant names can be written as JSON")
    }
}

/// Version of the library, which must be loaded: there must be a [`Matmul`].
pub(super) fn version() -> [usize; 3] {
    // SAFETY: the function takes no arguments, and the library is loaded.
    let version = unsafe { sys::cublasLtGetVersion() };
    [version / 10_000, version / 100 % 100, version % 100]
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: each resource was created once, and is destroyed only here. If that fails, it is freed with the
        // process.
        unsafe {
            for (_, product) in std::mem::take(&mut self.products) {
                product.destroy();
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
        // In column-major order: which operand is transposed, and how many rows and columns each has.
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
            // These are the values of CUBLAS_OP_N and CUBLAS_OP_T.
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
        let algorithm = propose(handle, descriptor, layouts, shape.alignments, 1)?[0];
        Ok(Self { descriptor, layouts, algorithm })
    }

    /// Checks that the library can compute the product with its algorithm, within the workspace.
    fn check(&self, handle: sys::cublasLtHandle_t) -> Result<(), CublasError> {
        let [first, second, out] = self.layouts;
        // SAFETY: the type consists of numbers, for which zero is valid.
        let mut found = unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() };
        // SAFETY: all handles are alive, and the pointers are to values that live through the call.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle,
                self.descriptor,
                first,
                second,
                out,
                out,
                &raw const self.algorithm,
                &raw mut found,
            )
            .result()?;
        }
        if found.workspaceSize <= WORKSPACE {
            Ok(())
        } else {
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))
        }
    }

    fn destroy(self) {
        // SAFETY: each handle was created once and is not used again. If this fails, it is freed with the process.
        unsafe {
            for layout in self.layouts {
                result::destroy_matrix_layout(layout).ok();
            }
            result::destroy_matmul_desc(self.descriptor).ok();
        }
    }
}

/// The library's proposals, at least one and at most `count`, in the order of their expected speed. They are always the
/// same for the same device and library.
fn propose(
    handle: sys::cublasLtHandle_t,
    descriptor: sys::cublasLtMatmulDesc_t,
    [first, second, out]: [sys::cublasLtMatrixLayout_t; 3],
    [a, b, c]: [u32; 3],
    count: usize,
) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
    let preferences = result::create_matmul_pref()?;
    let workspace = WORKSPACE as u64;
    // If a sum is split into parts, they are added in f32 and in order.
    let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    let words = [
        (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 1 << b),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 1 << a),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 1 << c),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 1 << c),
    ];
    // SAFETY: the type consists of numbers, for which zero is valid.
    let empty = unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() };
    let (mut found, mut number) = (vec![empty; count], 0);
    // SAFETY: the first attribute has 8 bytes and the others 4, all handles are alive, and there is room for `count`
    // results.
    let done = unsafe {
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
        let done = sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            descriptor,
            first,
            second,
            out,
            out,
            preferences,
            count as i32,
            found.as_mut_ptr(),
            &raw mut number,
        )
        .result();
        result::destroy_matmul_pref(preferences)?;
        done
    };
    done?;
    let usable = found.iter().take(number as usize).filter(|found| found.state.result().is_ok());
    let proposals: Vec<_> = usable.map(|found| found.algo).collect();
    if proposals.is_empty() {
        return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
    }
    Ok(proposals)
}
