//! GEMM, `y (+)= x · Wᵀ`, through cuBLASLt. Plans are made once a shape and kept; during the warm-up, every algorithm that
//! the library offers for a shape is timed.

mod choices;

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys,
};

use super::{
    BACKEND,
    device::{Device, DeviceBuf, Stream},
    ffi,
};
use crate::{DType, Error, Result};
use choices::{Choices, Clock};

pub(super) use choices::classes;

/// Of `cublasOperation_t`, which the bindings of cuBLASLt leave out.
const CUBLAS_OP_T: i32 = 1;
/// NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms of a shape that are timed.
const CANDIDATES: usize = 16;

fn failed(e: CublasError) -> Error {
    Error::Device { op: "linear", library: "cuBLASLt", code: e.0 as i32 }
}

/// `y[rows, outputs] (+)= x[rows, inputs] · w[outputs, inputs]ᵀ`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// From one row of y to the next.
    pub(super) stride: usize,
    /// Whether y is f32.
    pub(super) wide: bool,
    /// Whether the product is added to what y holds.
    pub(super) add: bool,
}

/// Device addresses of the three matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) y: u64,
}

/// Descriptors of one shape. cuBLASLt is column-major: it computes
/// `yᵀ [outputs, rows] = (Wᵀ)ᵀ · xᵀ`, all with their rows as columns.
struct Layouts {
    description: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
}

impl Drop for Layouts {
    fn drop(&mut self) {
        // SAFETY: made by `Gemm::layouts`, destroyed once. A failure leaks a few bytes at the end of the process.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in [self.w, self.x, self.y] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// Layouts and the algorithm chosen for them.
struct Plan {
    layouts: Layouts,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// What is known of products.
#[derive(Default)]
struct Known {
    plans: HashMap<Shape, Plan>,
    choices: Choices,
    /// During the warm-up.
    clock: Option<Clock>,
}

/// cuBLASLt with its workspace and plans.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuf,
    dtype: DType,
    device: Arc<Device>,
    known: Mutex<Known>,
}

// SAFETY: the handle may be used from any thread; plans are behind a lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(super) fn new(device: &Arc<Device>, dtype: DType) -> Result<Gemm> {
        // SAFETY: opening the library runs its initializers only.
        if !unsafe { sys::is_culib_present() } {
            let missing = "the library cublasLt is not installed, or not in the loader's path".into();
            return Err(Error::Unavailable { backend: BACKEND, missing });
        }
        let workspace = DeviceBuf::new(device, WORKSPACE, "the cuBLASLt workspace")?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Gemm { handle, workspace, dtype, device: device.clone(), known: Mutex::default() })
    }

    /// The library's version.
    pub(super) fn version() -> usize {
        // SAFETY: takes nothing and touches nothing.
        unsafe { sys::cublasLtGetVersion() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, shapes that `text` and what was learnt before say nothing of are timed at their first launch.
    pub(super) fn learn(&self, text: &str) -> Result<()> {
        let clock = Clock::new(&self.device)?;
        let known = &mut *self.known();
        known.choices.add_text(text);
        known.plans.clear();
        known.clock = Some(clock);
        Ok(())
    }

    /// Ends that, and returns all that is known.
    pub(super) fn learnt(&self) -> String {
        let known = &mut *self.known();
        known.clock = None;
        known.choices.to_text()
    }

    /// Whether shapes are timed now.
    pub(super) fn is_learning(&self) -> bool {
        self.known().clock.is_some()
    }

    /// Launches the product.
    pub(super) fn run(&self, stream: &Stream, shape: Shape, operands: Operands) -> Result<()> {
        let Known { plans, choices, clock } = &mut *self.known();
        let plan = match plans.entry(shape) {
            Entry::Occupied(planned) => planned.into_mut(),
            Entry::Vacant(new) => {
                let layouts = self.layouts(shape)?;
                let kept = choices.get(shape).filter(|algorithm| self.can_run(&layouts, algorithm));
                let algorithm = match (kept, clock) {
                    (Some(algorithm), _) => algorithm,
                    (None, None) => self.offered::<1>(&layouts)?[0],
                    (None, Some(clock)) => {
                        let offered = self.offered::<CANDIDATES>(&layouts)?;
                        let launch = |algorithm| self.launch(stream, (&layouts, &algorithm), shape, operands);
                        let fastest = clock.fastest(stream, &offered, launch)?.unwrap_or(offered[0]);
                        choices.insert(shape, fastest);
                        fastest
                    }
                };
                new.insert(Plan { layouts, algorithm })
            }
        };
        self.launch(stream, (&plan.layouts, &plan.algorithm), shape, operands)
    }

    fn launch(
        &self,
        stream: &Stream,
        (layouts, algorithm): (&Layouts, &sys::cublasLtMatmulAlgo_t),
        shape: Shape,
        operands: Operands,
    ) -> Result<()> {
        let (one, before) = (1.0_f32, f32::from(u8::from(shape.add)));
        let y = ffi::pointer(operands.y);
        // SAFETY: the layouts are those of the operands, which the caller of `run` sized by the shape; the scalars are
        // read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                layouts.description,
                (&raw const one).cast(),
                (&raw const before).cast(),
                ffi::pointer(operands.w),
                layouts.w,
                ffi::pointer(operands.x),
                layouts.x,
                y,
                layouts.y,
                y,
                layouts.y,
                algorithm,
                ffi::pointer(self.workspace.at()),
                self.workspace.bytes(),
                stream.raw().cast(),
            )
        }
        .map_err(failed)
    }

    fn layouts(&self, shape: Shape) -> Result<Layouts> {
        let half = match self.dtype {
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            _ => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let layout = |data_type, rows: usize, cols: usize| {
            result::create_matrix_layout(data_type, rows as u64, cols as u64, rows as i64).map_err(failed)
        };
        let y_type = if shape.wide { float } else { half };
        let (inputs, outputs, rows) = (shape.inputs, shape.outputs, shape.rows);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let layouts = Layouts {
            description: result::create_matmul_desc(compute, float).map_err(failed)?,
            w: layout(half, inputs, outputs)?,
            x: layout(half, inputs, rows)?,
            y: result::create_matrix_layout(y_type, outputs as u64, rows as u64, shape.stride as i64)
                .map_err(failed)?,
        };
        let transposed = CUBLAS_OP_T;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let value = (&raw const transposed).cast::<c_void>();
        // SAFETY: the attribute is of that type.
        unsafe {
            result::set_matmul_desc_attribute(layouts.description, attribute, value, size_of_val(&transposed))
        }
        .map_err(failed)?;
        Ok(layouts)
    }

    /// Whether an algorithm, kept from another shape or run, fits these layouts and the workspace.
    fn can_run(&self, layouts: &Layouts, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        let Layouts { description, w, x, y } = *layouts;
        let mut needs = no_result();
        // SAFETY: all descriptors live.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(self.handle, description, w, x, y, y, algorithm, &raw mut needs)
        };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && needs.workspaceSize <= WORKSPACE
    }

    /// Up to N algorithms, at least one, in the order of their expected speed.
    fn offered<const N: usize>(&self, layouts: &Layouts) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let Layouts { description, w, x, y } = *layouts;
        let preference = result::create_matmul_pref().map_err(failed)?;
        let (mut found, mut count) = ([no_result(); N], 0);
        // SAFETY: all descriptors live, and there is room for N results.
        let asked = unsafe {
            let asked = prefer(preference).and_then(|()| {
                let (handle, found) = (self.handle, found.as_mut_ptr());
                let count = &raw mut count;
                sys::cublasLtMatmulAlgoGetHeuristic(
                    handle,
                    description,
                    w,
                    x,
                    y,
                    y,
                    preference,
                    N as i32,
                    found,
                    count,
                )
                .result()
            });
            let _ = result::destroy_matmul_pref(preference);
            asked
        };
        asked.map_err(failed)?;
        if count == 0 {
            return Err(failed(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(found[..count as usize].iter().map(|result| result.algo).collect())
    }
}

fn no_result() -> sys::cublasLtMatmulHeuristicResult_t {
    // SAFETY: plain numbers.
    unsafe { std::mem::zeroed() }
}

/// Limits the workspace, and has parts of a sum that several blocks share added in f32. By default they may be added in
/// the type of the result, each rounded to it.
fn prefer(preference: sys::cublasLtMatmulPreference_t) -> std::result::Result<(), CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let bytes = WORKSPACE as u64;
    let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    let (bytes_at, schemes_at) = ((&raw const bytes).cast(), (&raw const schemes).cast());
    // SAFETY: the preference lives; the attributes are a u64 and a u32, which are copied.
    unsafe {
        let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        result::set_matmul_pref_attribute(preference, attribute, bytes_at, size_of_val(&bytes))?;
        let attribute = Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        result::set_matmul_pref_attribute(preference, attribute, schemes_at, size_of_val(&schemes))
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.known.get_mut().unwrap_or_else(PoisonError::into_inner).plans.clear();
        // SAFETY: created by `new`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
