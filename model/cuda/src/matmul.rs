//! Products of large matrices by cublasLt. Sums are in f32, in an order that depends on the algorithm alone.
//!
//! For each shape the library proposes algorithms, the one first that it takes for the fastest. That is what is used, and
//! is the same wherever device and library are; or, while [`Matmul::begin_choosing`] is in force, the one that *is* the
//! fastest, or the one that somebody has found so before. As that may be another one the next time, and sums in another
//! order, it is for whoever asks for it to keep what was chosen.

use std::collections::BTreeMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;
use serde::{Deserialize, Serialize};

use super::driver::{Address, Timer, lost};
use super::program::Format;

/// Bytes that the library may use for a product.
const WORKSPACE: usize = 32 << 20;
/// Alignment that all memory of a device has.
const ALIGNMENT: u64 = 256;
/// Proposals that are tried for a product.
const PROPOSALS: usize = 8;
/// Times that each is timed, after one that is not.
const TRIALS: usize = 3;
/// Products that are timed together.
const TOGETHER: usize = 4;
/// An earlier proposal is as good as one that is faster by less than this.
const AS_GOOD: f32 = 1.02;

/// What is multiplied, row-major: `out` is [m, n].
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
struct Shape {
    form: Form,
    size: [usize; 3],
    formats: [Format; 2],
    strides: [usize; 3],
    /// As powers of two.
    alignments: [u32; 3],
    accumulate: bool,
}

/// Algorithms by the shape of the product, in the library's own words for them.
type Choices = BTreeMap<Shape, [u64; 8]>;

/// Where algorithms come from.
enum Source {
    /// The library's first proposal.
    Library,
    /// What was the fastest is taken, and written down.
    Measured(Choices),
    /// What somebody has written down.
    Known(Choices),
}

/// What the library needs for a product.
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
        Ok(Self { handle, stream, workspace, products: BTreeMap::new(), source: Source::Library, choices: 0 })
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
                // To try it would add to what is there; without adding it is the same product.
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

    /// The fastest of the library's proposals, with these operands; `out` is overwritten.
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
        // One that does not work is the slowest.
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
        // The library counts by columns: its first matrix is our second, and all are transposed.
        // SAFETY: descriptors are alive, the scalars are read before the call returns, and addresses are of views that
        // the caller borrows.
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

    /// From now on products have the algorithm that `known` names, which is what [`Matmul::end_choosing`] gave; without it,
    /// the fastest. What was chosen before, for whatever purpose, is forgotten.
    ///
    /// # Errors
    /// If `known` is nothing of that kind.
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

    /// How often [`Matmul::begin_choosing`] was called: products that were recorded before are others now.
    pub(super) fn choices(&self) -> usize {
        self.choices
    }

    /// Products that are new from now on have the library's first proposal; says what was chosen.
    pub(super) fn end_choosing(&mut self) -> String {
        let choices = match std::mem::replace(&mut self.source, Source::Library) {
            Source::Library => Choices::new(),
            Source::Measured(choices) | Source::Known(choices) => choices,
        };
        let choices: Vec<_> = choices.into_iter().collect();
        serde_json::to_string(&choices).expect("numbers and names of variants are JSON")
    }
}

/// Version of the library, for whoever has a [`Matmul`].
pub(super) fn version() -> [usize; 3] {
    // SAFETY: a function without arguments of a library that is loaded.
    let version = unsafe { sys::cublasLtGetVersion() };
    [version / 10_000, version / 100 % 100, version % 100]
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: each was created once; what cannot be given back goes with the process.
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
        let algorithm = propose(handle, descriptor, layouts, shape.alignments, 1)?[0];
        Ok(Self { descriptor, layouts, algorithm })
    }

    /// Whether the library can do it by its algorithm, in the workspace that there is.
    fn check(&self, handle: sys::cublasLtHandle_t) -> Result<(), CublasError> {
        let [first, second, out] = self.layouts;
        // SAFETY: numbers alone.
        let mut found = unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() };
        // SAFETY: everything given is alive, and the result is written.
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
        // SAFETY: each was created once, and is not used again; what cannot be given back goes with the process.
        unsafe {
            for layout in self.layouts {
                result::destroy_matrix_layout(layout).ok();
            }
            result::destroy_matmul_desc(self.descriptor).ok();
        }
    }
}

/// The library's proposals, at least one and at most `count`, the one first that it takes for the fastest. They are the
/// same wherever device and library are.
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
    // Parts of a sum are joined in f32 and in order, if at all.
    let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    let words = [
        (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 1 << b),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 1 << a),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 1 << c),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 1 << c),
    ];
    // SAFETY: numbers alone.
    let empty = unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() };
    let (mut found, mut number) = (vec![empty; count], 0);
    // SAFETY: the first attribute is 8 bytes wide and the others 4; everything given is alive, and there are as many
    // results as are asked for.
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
