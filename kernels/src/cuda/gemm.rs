//! `y = x · Wᵀ` through cuBLASLt. Plans are made once a shape and kept.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
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

/// Of `cublasOperation_t`, which the bindings of cuBLASLt leave out.
const CUBLAS_OP_T: i32 = 1;
/// NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;

fn failed(e: CublasError) -> Error {
    Error::Device { op: "linear", library: "cuBLASLt", code: e.0 as i32 }
}

/// `y[rows, outputs] = x[rows, inputs] · w[outputs, inputs]ᵀ`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Whether y is f32.
    pub(super) wide: bool,
}

/// Device addresses of the three matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) y: u64,
}

/// Descriptors of one shape and the algorithm chosen for it. cuBLASLt is column-major: it computes
/// `yᵀ [outputs, rows] = (Wᵀ)ᵀ · xᵀ`, all with their rows as columns.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `Gemm::plan`, destroyed once. A failure leaks a few bytes at the end of the process.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in [self.w, self.x, self.y] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// cuBLASLt with its workspace and plans.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuf,
    dtype: DType,
    plans: Mutex<HashMap<Shape, Plan>>,
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
        Ok(Gemm { handle, workspace, dtype, plans: Mutex::default() })
    }

    /// Launches the product.
    pub(super) fn run(&self, stream: &Stream, shape: Shape, operands: Operands) -> Result<()> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(self.plan(shape)?),
        };
        let (one, zero) = (1.0_f32, 0.0_f32);
        let y = ffi::pointer(operands.y);
        // SAFETY: the plan's layouts are those of the operands, which the caller sized by `shape`; the scalars are
        // read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                ffi::pointer(operands.w),
                plan.w,
                ffi::pointer(operands.x),
                plan.x,
                y,
                plan.y,
                y,
                plan.y,
                &plan.algorithm,
                ffi::pointer(self.workspace.at()),
                self.workspace.bytes(),
                stream.raw().cast(),
            )
        }
        .map_err(failed)
    }

    fn plan(&self, shape: Shape) -> Result<Plan> {
        let half = match self.dtype {
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            _ => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let layout = |data_type, rows: usize, cols: usize| {
            result::create_matrix_layout(data_type, rows as u64, cols as u64, rows as i64).map_err(failed)
        };
        let (inputs, outputs, rows) = (shape.inputs, shape.outputs, shape.rows);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut plan = Plan {
            description: result::create_matmul_desc(compute, float).map_err(failed)?,
            w: layout(half, inputs, outputs)?,
            x: layout(half, inputs, rows)?,
            y: layout(if shape.wide { float } else { half }, outputs, rows)?,
            // SAFETY: plain numbers, overwritten below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        let transposed = CUBLAS_OP_T;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let value = (&raw const transposed).cast::<c_void>();
        // SAFETY: the attribute is of that type.
        unsafe {
            result::set_matmul_desc_attribute(plan.description, attribute, value, size_of_val(&transposed))
        }
        .map_err(failed)?;
        plan.algorithm = self.best(&plan)?;
        Ok(plan)
    }

    /// The algorithm that cuBLASLt expects to be fastest.
    fn best(&self, plan: &Plan) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = result::create_matmul_pref().map_err(failed)?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let value = (&raw const WORKSPACE_BYTES).cast::<c_void>();
        // SAFETY: the attribute is a u64, and all descriptors live.
        let found = unsafe {
            let set = result::set_matmul_pref_attribute(preference, attribute, value, size_of::<u64>());
            let found = set.and_then(|()| {
                result::get_matmul_algo_heuristic(
                    self.handle,
                    plan.description,
                    plan.w,
                    plan.x,
                    plan.y,
                    plan.y,
                    preference,
                )
            });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        Ok(found.map_err(failed)?.algo)
    }
}

static WORKSPACE_BYTES: u64 = WORKSPACE as u64;

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: created by `new`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
