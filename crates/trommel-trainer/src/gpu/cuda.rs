//! The operations on an NVIDIA GPU: the kernels of `kernels.cu`, and cuBLAS for products.
//!
//! Everything runs on the stream of the thread that calls, in the order of the calls, so a buffer may be read, written and freed
//! without waiting; a model is not `Send`, and so stays on its thread. Only [`Kernels::squares`] waits, for its number.
#![expect(unsafe_code, reason = "kernels and cuBLAS are called with addresses")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::OnceLock;

use candle_core::cuda_backend::cudarc::cublas::{result as cublas, sys};
use candle_core::cuda_backend::cudarc::driver::{self, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Device, Result, Storage, Tensor};
use trommel_kernels::adamw::Factors;

use super::ops::{ByToken, Factor, Heads, Kernels, Normed, QUERIES, Spot, as_is, dims};
use crate::model::Activation;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks that go on over all numbers.
const MOST_BLOCKS: usize = 4096;
/// Blocks that share the rows of a sum over rows, so that its order does not depend on the GPU.
const SUM_BLOCKS: usize = 512;

/// A GPU, with the kernels compiled.
pub(super) struct Cuda {
    device: CudaDevice,
    code: &'static str,
    functions: RefCell<HashMap<String, driver::CudaFunction>>,
    memory: usize, // bytes
}

/// The kernels as PTX, compiled once.
fn code() -> Result<&'static str> {
    static CODE: OnceLock<String> = OnceLock::new();
    if let Some(code) = CODE.get() {
        return Ok(code);
    }
    let code = compile_ptx(include_str!("kernels.cu")).map_err(candle_core::Error::wrap)?;
    Ok(CODE.get_or_init(|| code.to_src()))
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.device.fmt(f)
    }
}

/// What a kernel is called with.
#[derive(Clone, Copy)]
enum Argument {
    Address(u64),
    Int(i32),
    Size(usize),
    Float(f32),
}
use Argument::{Address, Float, Int, Size};

const NONE: Argument = Address(0);

/// How many threads a kernel gets.
#[derive(Clone, Copy)]
enum Threads {
    /// One block for each row.
    Rows(usize),
    /// One warp for each row.
    Warps(usize),
    /// A thread for each number, or pack of numbers.
    Numbers(usize),
    /// Blocks of 32 columns by 16 rows.
    Columns(usize),
    /// This many blocks, with so many bytes of shared memory.
    Blocks(usize, usize),
    /// Blocks for this many numbers, in so many rows of blocks.
    Parts(usize, usize),
}

impl Threads {
    fn config(self) -> LaunchConfig {
        let (mut rows, threads) = (1, THREADS as usize);
        let (blocks, block_dim, shared_mem_bytes) = match self {
            Threads::Rows(rows) => (rows, (THREADS, 1, 1), 0),
            Threads::Warps(rows) => (rows.div_ceil(threads / 32), (THREADS, 1, 1), 0),
            Threads::Numbers(numbers) => (numbers.div_ceil(threads), (THREADS, 1, 1), 0),
            Threads::Columns(columns) => (columns.div_ceil(32), (32, 16, 1), 0),
            Threads::Blocks(blocks, bytes) => (blocks, (THREADS, 1, 1), bytes as u32),
            Threads::Parts(numbers, parts) => {
                rows = parts;
                (numbers.div_ceil(threads).min(MOST_BLOCKS), (THREADS, 1, 1), 0)
            }
        };
        LaunchConfig { grid_dim: (blocks as u32, rows as u32, 1), block_dim, shared_mem_bytes }
    }
}

/// Where a product goes: matrices with these distances of rows and of matrices.
struct Out {
    at: Argument,
    dtype: DType,
    row: usize,
    matrix: usize,
    add: bool,
}

/// Distances of the matrices and of the rows of a factor.
fn strides(tensor: &Tensor) -> Result<[usize; 2]> {
    match *tensor.stride() {
        [row, 1] => Ok([0, row]),
        [matrix, row, 1] => Ok([matrix, row]),
        _ => candle_core::bail!("a product needs the numbers of a row side by side"),
    }
}

/// Where the numbers of a tensor, which lie side by side, begin on the device.
fn address(tensor: &Tensor) -> Result<Argument> {
    if !tensor.is_contiguous() {
        candle_core::bail!("a kernel needs its numbers side by side");
    }
    first_number(tensor)
}

/// Where a tensor's first number lies on the device.
fn first_number(tensor: &Tensor) -> Result<Argument> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { candle_core::bail!("a tensor is not on the GPU") };
    let stream = storage.device.cuda_stream();
    let first = match tensor.dtype() {
        DType::F32 => driver::DevicePtr::device_ptr(storage.as_cuda_slice::<f32>()?, &stream).0,
        DType::BF16 => driver::DevicePtr::device_ptr(storage.as_cuda_slice::<half::bf16>()?, &stream).0,
        DType::U32 => driver::DevicePtr::device_ptr(storage.as_cuda_slice::<u32>()?, &stream).0,
        other => candle_core::bail!("no kernel reads {other:?}"),
    };
    Ok(Address(first + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64))
}

fn spot(spot: &Spot) -> Result<Argument> {
    address(&spot.buffer.narrow(0, spot.start, spot.len)?)
}

/// Experts whose MLPs one call mixes, in the registers of a thread; `kernels.cu` says the same.
const MIXED: usize = 16;
/// Numbers that a thread takes at once, if they lie that way.
const PACK: usize = 4;

impl Cuda {
    /// Compiles the kernels for `device`, and lets it keep the memory that tensors give back.
    pub(super) fn new(device: &CudaDevice) -> Result<Cuda> {
        let context = device.cuda_stream().context().clone();
        context.bind_to_thread().w()?;
        let memory = driver::result::mem_get_info().w()?.1;
        // SAFETY: the device exists, and so does its pool; the attribute is a 64-bit number, which outlives the call. One stream
        // does all the work, so nothing waits for events.
        unsafe {
            let pool = driver::result::device::get_default_mem_pool(context.cu_device()).w()?;
            let mut keep = u64::MAX;
            let attribute = driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            driver::sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut keep).cast::<c_void>()).result().w()?;
            device.disable_event_tracking();
        }
        Ok(Cuda { device: device.clone(), code: code()?, functions: RefCell::default(), memory })
    }

    fn upload(&self, numbers: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(numbers, numbers.len(), &Device::Cuda(self.device.clone()))
    }

    /// A kernel by its name, looked up once.
    fn function(&self, kernel: &str) -> Result<driver::CudaFunction> {
        let mut functions = self.functions.borrow_mut();
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let function = self.device.get_or_load_custom_func(kernel, "trommel", self.code)?.into_cuda_function();
        functions.insert(kernel.to_owned(), function.clone());
        Ok(function)
    }

    fn call(&self, kernel: &str, threads: Threads, arguments: &[Argument]) -> Result<()> {
        let config = threads.config();
        if config.grid_dim.0 == 0 {
            return Ok(());
        }
        let function = self.function(kernel)?;
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        for argument in arguments {
            match argument {
                Address(address) => builder.arg(address),
                Int(number) => builder.arg(number),
                Size(number) => builder.arg(number),
                Float(number) => builder.arg(number),
            };
        }
        // SAFETY: the arguments are those of the kernel's declaration; their addresses are those of tensors of the sizes that the
        // kernel derives from the other arguments, which live at least until the stream has passed the call.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    /// Calls the form of a kernel for rows of this type: by packs, if `inner` numbers of every row lie together in whole packs.
    fn call_on_rows(&self, kernel: &str, dtype: DType, inner: usize, threads: Threads, arguments: &[Argument]) -> Result<()> {
        let name = match dtype {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            other => candle_core::bail!("no kernel works on rows of {other:?}"),
        };
        let aligned = |argument: &Argument| !matches!(argument, Address(address) if address % 16 != 0);
        let pack = if inner.is_multiple_of(PACK) && arguments.iter().all(aligned) { PACK } else { 1 };
        let threads = match threads {
            Threads::Numbers(numbers) => Threads::Numbers(numbers / pack),
            Threads::Parts(numbers, parts) => Threads::Parts(numbers / pack, parts),
            other => other,
        };
        self.call(&format!("{kernel}_{name}_{pack}"), threads, arguments)
    }

    /// `out = a b`, or `out += a b`.
    fn product(&self, a: Factor<'_>, b: Factor<'_>, out: Out) -> Result<()> {
        let ((batch, rows, inner), (b_batch, b_inner, columns)) = (dims(a)?, dims(b)?);
        if (batch, inner) != (b_batch, b_inner) || a.tensor.dtype() != b.tensor.dtype() {
            candle_core::bail!("a product of {:?} and {:?}", a.tensor, b.tensor);
        }
        let (Address(a_at), Address(b_at), Address(to)) = (first_number(a.tensor)?, first_number(b.tensor)?, out.at) else {
            candle_core::bail!("a product of what is no tensor")
        };
        let kind = |dtype| match dtype {
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            _ => sys::cudaDataType_t::CUDA_R_32F,
        };
        let operation = |factor: Factor<'_>| match factor.transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let ([a_matrix, a_row], [b_matrix, b_row]) = (strides(a.tensor)?, strides(b.tensor)?);
        let (alpha, beta) = (1f32, if out.add { 1f32 } else { 0f32 });
        self.device.cuda_stream().context().bind_to_thread().w()?;
        // SAFETY: the addresses are those of matrices of these dimensions and strides. cuBLAS counts by columns: to it each of
        // them is transposed, and so is the product.
        unsafe {
            cublas::gemm_strided_batched_ex(
                *self.device.cublas_handle().handle(),
                operation(b),
                operation(a),
                columns as i32,
                rows as i32,
                inner as i32,
                (&raw const alpha).cast(),
                b_at as *const c_void,
                kind(b.tensor.dtype()),
                b_row as i32,
                b_matrix as i64,
                a_at as *const c_void,
                kind(a.tensor.dtype()),
                a_row as i32,
                a_matrix as i64,
                (&raw const beta).cast(),
                to as *mut c_void,
                kind(out.dtype),
                out.row as i32,
                out.matrix as i64,
                batch as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()?;
        Ok(())
    }
}

impl Kernels for Cuda {
    fn memory(&self) -> usize {
        self.memory
    }

    fn multiply(&self, a: Factor<'_>, b: Factor<'_>, dtype: DType) -> Result<Tensor> {
        let ((batch, rows, _), (_, _, columns)) = (dims(a)?, dims(b)?);
        let shape = [batch, rows, columns];
        let out = self.room(if a.tensor.rank() == 2 { &shape[1..] } else { &shape }, dtype)?;
        self.product(a, b, Out { at: address(&out)?, dtype, row: columns, matrix: rows * columns, add: false })?;
        Ok(out)
    }

    fn multiply_into(&self, a: Factor<'_>, b: Factor<'_>, out: &Tensor, row: usize) -> Result<()> {
        let (_, rows, columns) = dims(as_is(out))?;
        let Address(first) = address(out)? else { candle_core::bail!("no tensor") };
        let at = Address(first + (row * columns * out.dtype().size_in_bytes()) as u64);
        self.product(a, b, Out { at, dtype: out.dtype(), row: columns, matrix: rows * columns, add: false })
    }

    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        // SAFETY: the numbers are plain, and every kernel here writes all of its results before anything reads them.
        unsafe { Tensor::empty(shape, dtype, &Device::Cuda(self.device.clone())) }
    }

    fn mix(&self, alpha: &Tensor, basis: &Tensor, dtype: DType) -> Result<Tensor> {
        let ((experts, capacity), numbers) = (alpha.dims2()?, basis.dim(1)?);
        let out = self.room(&[experts, numbers], dtype)?;
        for first in (0..experts).step_by(MIXED) {
            let some = MIXED.min(experts - first);
            let (alpha, out) = (alpha.narrow(0, first, some)?, out.narrow(0, first, some)?);
            let arguments =
                [address(&alpha)?, address(basis)?, Int(some as i32), Int(capacity as i32), Size(numbers), address(&out)?];
            self.call_on_rows("mix", dtype, numbers, Threads::Numbers(numbers), &arguments)?;
        }
        Ok(out)
    }

    fn add_product(&self, a: Factor<'_>, b: Factor<'_>, sum: &Spot) -> Result<()> {
        let columns = dims(b)?.2;
        self.product(a, b, Out { at: spot(sum)?, dtype: DType::F32, row: columns, matrix: sum.len, add: !sum.fresh })
    }

    fn norm(&self, x: &Tensor, branch: Option<&Tensor>, gain: &Tensor, epsilon: f64, dtype: DType) -> Result<Normed> {
        let (rows, width) = x.dims2()?;
        let stream = self.room(x.dims(), DType::F32)?;
        let normed = Normed { rows: self.room(x.dims(), dtype)?, inverse: self.room(&[rows], DType::F32)?, stream };
        self.call_on_rows(
            "norm",
            dtype,
            width,
            Threads::Rows(rows),
            &[
                address(x)?,
                branch.map_or(Ok(NONE), address)?,
                address(gain)?,
                Float(epsilon as f32),
                Int(width as i32),
                address(&normed.stream)?,
                address(&normed.rows)?,
                address(&normed.inverse)?,
            ],
        )?;
        Ok(normed)
    }

    fn norm_backward(
        &self,
        normed: &Normed,
        gain: &Tensor,
        gradient: &Tensor,
        stream: Option<Tensor>,
        gain_gradient: &Spot,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, width) = gradient.dims2()?;
        let first = stream.is_none();
        let stream = stream.map_or_else(|| self.room(gradient.dims(), DType::F32), Ok)?;
        let stream_rows = self.room(gradient.dims(), gradient.dtype())?;
        let blocks = rows.min(SUM_BLOCKS);
        let parts = self.room(&[blocks, width], DType::F32)?;
        self.call_on_rows(
            "norm_backward",
            gradient.dtype(),
            width,
            Threads::Blocks(blocks, width * size_of::<f32>()),
            &[
                address(&normed.stream)?,
                address(&normed.inverse)?,
                address(gain)?,
                address(gradient)?,
                Int(width as i32),
                Int(rows as i32),
                Int(i32::from(first)),
                address(&stream)?,
                address(&stream_rows)?,
                address(&parts)?,
            ],
        )?;
        let total = spot(gain_gradient)?;
        self.call("add_columns", Threads::Columns(width), &[address(&parts)?, Int(blocks as i32), Int(width as i32), total])?;
        Ok((stream, stream_rows))
    }

    fn split_heads(&self, qkv: &Tensor, heads: Heads, turns: &[Tensor; 2]) -> Result<[Tensor; 3]> {
        let shape = [3, heads.sequences * heads.heads, heads.time, heads.head];
        let out = self.room(&shape, qkv.dtype())?;
        let pairs = out.elem_count() / 2;
        let [cosines, sines] = turns;
        let mut arguments = vec![address(qkv)?, address(cosines)?, address(sines)?];
        arguments.extend([heads.sequences, heads.time, heads.heads, heads.head / 2].map(|size| Int(size as i32)));
        arguments.push(address(&out)?);
        self.call_on_rows("split_heads", qkv.dtype(), heads.head / 2, Threads::Numbers(pairs), &arguments)?;
        Ok([out.get(0)?, out.get(1)?, out.get(2)?])
    }

    fn join_heads(&self, parts: [&Tensor; 3], heads: Heads, turns: &[Tensor; 2]) -> Result<Tensor> {
        let [q, k, v] = parts;
        let out = self.room(&[heads.rows(), 3 * heads.heads * heads.head], q.dtype())?;
        let [cosines, sines] = turns;
        let mut arguments = vec![address(q)?, address(k)?, address(v)?, address(cosines)?, address(sines)?];
        arguments.extend([heads.sequences, heads.time, heads.heads, heads.head / 2].map(|size| Int(size as i32)));
        arguments.push(address(&out)?);
        self.call_on_rows("join_heads", q.dtype(), heads.head / 2, Threads::Numbers(out.elem_count() / 2), &arguments)?;
        Ok(out)
    }

    fn swap(&self, x: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
        let out = self.room(&[x.elem_count()], x.dtype())?;
        let [outer, a, b, inner] = dims;
        let arguments = [address(x)?, Size(outer), Int(a as i32), Int(b as i32), Int(inner as i32), address(&out)?];
        self.call_on_rows("swap", x.dtype(), inner, Threads::Numbers(x.elem_count()), &arguments)?;
        Ok(out)
    }

    fn softmax(&self, scores: &Tensor, starts: &Tensor, heads: Heads, dtype: DType) -> Result<Tensor> {
        let out = self.room(scores.dims(), dtype)?;
        let sizes = [heads.rows() * heads.heads, heads.time, heads.heads, QUERIES].map(|size| Int(size as i32));
        let arguments = [&[address(scores)?, address(starts)?, Float(heads.scale())], &sizes[..], &[address(&out)?]].concat();
        self.call_on_rows("softmax", dtype, heads.time, Threads::Warps(heads.rows() * heads.heads), &arguments)?;
        Ok(out)
    }

    fn softmax_backward(&self, shares: &Tensor, gradient: &Tensor, starts: &Tensor, heads: Heads) -> Result<Tensor> {
        let out = self.room(shares.dims(), shares.dtype())?;
        let sizes = [heads.rows() * heads.heads, heads.time, heads.heads, QUERIES].map(|size| Int(size as i32));
        let from = [address(shares)?, address(gradient)?, address(starts)?, Float(heads.scale())];
        let arguments = [&from[..], &sizes, &[address(&out)?]].concat();
        let threads = Threads::Warps(heads.rows() * heads.heads);
        self.call_on_rows("softmax_backward", shares.dtype(), heads.time, threads, &arguments)?;
        Ok(out)
    }

    fn activate(&self, packed: &Tensor, activation: Activation) -> Result<Tensor> {
        let (rows, mlp) = (packed.dim(0)?, packed.dim(1)? / activation.packed());
        let out = self.room(&[rows, mlp], packed.dtype())?;
        let gated = Int(i32::from(activation == Activation::SwiGlu));
        let arguments = [address(packed)?, gated, Size(rows), Int(mlp as i32), address(&out)?];
        self.call_on_rows("activate", packed.dtype(), mlp, Threads::Numbers(rows * mlp), &arguments)?;
        Ok(out)
    }

    fn activate_backward(&self, packed: &Tensor, gradient: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
        let (rows, mlp) = gradient.dims2()?;
        let out = (self.room(&[rows, mlp], packed.dtype())?, self.room(packed.dims(), packed.dtype())?);
        let gated = Int(i32::from(activation == Activation::SwiGlu));
        let sizes = [gated, Size(rows), Int(mlp as i32)];
        let arguments = [&[address(packed)?, address(gradient)?], &sizes[..], &[address(&out.0)?, address(&out.1)?]].concat();
        self.call_on_rows("activate_backward", packed.dtype(), mlp, Threads::Numbers(rows * mlp), &arguments)?;
        Ok(out)
    }

    fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        scale: Option<f32>,
        dtype: DType,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, vocab) = logits.dims2()?;
        let losses = self.room(&[rows], DType::F32)?;
        let gradient = scale.map(|_| self.room(logits.dims(), dtype)).transpose()?;
        let arguments = [
            address(logits)?,
            address(targets)?,
            Float(scale.unwrap_or(0.0)),
            Int(vocab as i32),
            address(&losses)?,
            gradient.as_ref().map_or(Ok(NONE), address)?,
        ];
        self.call_on_rows("cross_entropy", dtype, vocab, Threads::Rows(rows), &arguments)?;
        Ok((losses, gradient))
    }

    fn add_rows(&self, rows: &Tensor, by_token: &ByToken, table: &Spot) -> Result<()> {
        let [tokens, bounds, order] = [&by_token.tokens, &by_token.bounds, &by_token.order].map(|list| self.upload(list));
        let (tokens, bounds, order) = (tokens?, bounds?, order?);
        let width = Int(rows.dim(1)? as i32);
        let arguments = [address(rows)?, address(&tokens)?, address(&bounds)?, address(&order)?, width, spot(table)?];
        self.call("add_rows", Threads::Rows(by_token.tokens.len()), &arguments)
    }

    fn squares(&self, parts: &[Spot]) -> Result<f64> {
        let sums = self.room(&[parts.len(), SUM_BLOCKS], DType::F32)?;
        for (i, part) in parts.iter().enumerate() {
            let arguments = [spot(part)?, Size(part.len), address(&sums.get(i)?)?];
            self.call_on_rows("squares", DType::F32, part.len, Threads::Blocks(SUM_BLOCKS, 0), &arguments)?;
        }
        Ok(sums.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
    }

    fn adamw(
        &self,
        parameters: &Spot,
        gradient: &Spot,
        moments: [&Spot; 2],
        factors: Factors,
        rates: Option<&[f32]>,
    ) -> Result<()> {
        let f = factors;
        let device = Device::Cuda(self.device.clone());
        let rates = rates.map(|rates| Tensor::from_slice(rates, rates.len(), &device)).transpose()?;
        let parts = rates.as_ref().map_or(1, Tensor::elem_count);
        let part = parameters.len / parts;
        let mut arguments = vec![spot(parameters)?, spot(gradient)?, spot(moments[0])?, spot(moments[1])?, Size(part)];
        let numbers = [f.learning_rate, f.decay, f.beta1, f.beta2, f.epsilon, f.correction1, f.correction2, f.gradient_scale];
        arguments.extend(numbers.map(Float));
        arguments.push(rates.as_ref().map_or(Ok(NONE), address)?);
        self.call_on_rows("adamw", DType::F32, part, Threads::Parts(part, parts), &arguments)
    }
}
