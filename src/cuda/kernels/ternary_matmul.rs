//! Launchers of `kernels/ternary_matmul*.cu`: the exact product over packed ternary weights, by the
//! kernel that is fastest for the shape and the GPU.

mod hopper;
mod portable;
mod small;
mod split;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
};
use half::bf16;

use self::hopper::Hopper;
use self::portable::Portable;
use self::small::Small;
use super::ternary_tiles::CudaPackedTernary;
use super::{Argument, Kernel, Launch, Module};
use crate::config::Kernels;
use crate::quant::matmul;
use crate::{Error, Result};

/// Most tokens of the kernel for few: one fragment of a tensor core's operand.
const FEW_TOKENS: usize = 16;

/// What vector loads and bulk copies start on.
const ALIGNMENT: u64 = 16;

/// `y = x . w^T` on the GPU, exact: int8 `x` (M, K), packed ternary `w` (N, K), `y` (M, N). On the
/// CPU it is [`matmul::TernaryMatmul`].
pub struct TernaryMatmul {
    device: CudaDevice,
    small: Small,
    portable: Portable,
    hopper: Option<Hopper>,
    /// Launches may start while earlier kernels still run, and then bring weights meanwhile.
    overlapped: bool,
}

/// What a product is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// The sums.
    Int32,
    /// Sums times the scales of their row of w and of their token.
    F32,
    Bf16,
}

/// Types of scaled results.
pub trait Scaled: DeviceRepr {
    #[doc(hidden)]
    const IS_BF16: bool;
}

impl Scaled for f32 {
    const IS_BF16: bool = false;
}

impl Scaled for bf16 {
    const IS_BF16: bool = true;
}

/// A kernel for each output, of one name but for the ending.
struct ByOutput {
    int32: Kernel,
    f32: Kernel,
    bf16: Kernel,
}

impl ByOutput {
    fn load(module: &Module, name: &str, shared_bytes: usize) -> Result<Self> {
        let kernel = |ending| module.kernel(&format!("{name}_{ending}"), shared_bytes);
        Ok(Self {
            int32: kernel("i32")?,
            f32: kernel("f32")?,
            bf16: kernel("bf16")?,
        })
    }

    fn of(&self, output: Output) -> &Kernel {
        match output {
            Output::Int32 => &self.int32,
            Output::F32 => &self.f32,
            Output::Bf16 => &self.bf16,
        }
    }
}

/// A product's operands in device memory, and its sizes.
struct Product {
    x: u64,
    w: u64,
    x_scale: u64,
    w_scale: u64,
    y: u64,
    m: usize,
    n: usize,
    k: usize,
    output: Output,
    overlapped: bool,
}

impl Product {
    /// Launches `kernel` on this product. `x` and `w` are its first arguments: addresses or tensor
    /// maps.
    ///
    /// # Safety
    /// The operands must hold what the sizes say, and the launch be one that the kernel takes.
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        launch: &Launch,
        x: &dyn Argument,
        w: &dyn Argument,
    ) -> Result<()> {
        let [m, n, k] = [self.m, self.n, self.k].map(|size| size as i32);
        let arguments: [&dyn Argument; 8] =
            [x, w, &self.x_scale, &self.w_scale, &self.y, &m, &n, &k];
        // SAFETY: the arguments are those of the kernels' signatures, in order; the rest is the
        // caller's promise. Kernels that are launched overlapped wait before they read x.
        unsafe { kernel.launch_with(launch, &arguments) }
    }
}

impl TernaryMatmul {
    /// Loads the kernels: those made for the GPU at hand, or those for every one.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses them.
    pub fn load(device: &CudaDevice, kernels: Kernels) -> Result<Self> {
        let stream = device.cuda_stream();
        let (major, _) = stream.context().compute_capability().w()?;
        let is_hopper = major == 9 && kernels == Kernels::Auto;
        Ok(Self {
            device: device.clone(),
            small: Small::load(device)?,
            portable: Portable::load(device)?,
            hopper: is_hopper.then(|| Hopper::load(device)).transpose()?,
            overlapped: major >= 9,
        })
    }

    /// Lets each product start only when all before it has ended, which is slower, to measure it by
    /// itself.
    pub fn in_turn(self) -> Self {
        Self {
            overlapped: false,
            ..self
        }
    }

    /// The kernel that multiplies M tokens by N rows of K weights.
    pub fn kernel_name(&self, m: usize, n: usize, k: usize) -> String {
        match &self.hopper {
            _ if m <= FEW_TOKENS => "mma, few tokens".into(),
            Some(hopper) => hopper.name(m, n, k),
            None => format!("mma, tiles of {}", self.portable.tile_name(m, n)),
        }
    }

    /// The sums: queues the product on the device's stream and returns without waiting for it; `y`
    /// is overwritten whole. All operands must live on the device given to `load`.
    ///
    /// # Errors
    /// `Usage` on lengths that do not fit together, an x or y that does not start on 16 bytes, or
    /// more tokens than a CUDA grid counts; `Tensor` if the driver refuses.
    pub fn sums(
        &self,
        x: &CudaView<i8>,
        m: usize,
        w: &CudaPackedTernary,
        y: &mut CudaViewMut<i32>,
    ) -> Result<()> {
        self.multiply(x, None, m, w, y, Output::Int32)
    }

    /// As [`Self::sums`], with `y = (sum * scale of the row of w) * x_scale` in f32, rounded to bf16
    /// where y is that; `x_scale` (M,) is that of the tokens.
    ///
    /// # Errors
    /// As [`Self::sums`].
    pub fn scaled<T: Scaled>(
        &self,
        x: &CudaView<i8>,
        x_scale: &CudaView<f32>,
        m: usize,
        w: &CudaPackedTernary,
        y: &mut CudaViewMut<T>,
    ) -> Result<()> {
        let output = match T::IS_BF16 {
            true => Output::Bf16,
            false => Output::F32,
        };
        self.multiply(x, Some(x_scale), m, w, y, output)
    }

    fn multiply<T>(
        &self,
        x: &CudaView<i8>,
        x_scale: Option<&CudaView<f32>>,
        m: usize,
        w: &CudaPackedTernary,
        y: &mut CudaViewMut<T>,
        output: Output,
    ) -> Result<()> {
        let (n, k) = (w.rows(), w.cols());
        matmul::check_shapes(x.len(), m, k)?;
        if m.checked_mul(n) != Some(y.len()) {
            return Err(Error::usage(format!(
                "an output of {} values cannot hold a product of shape {m} x {n}",
                y.len()
            )));
        }
        if let Some(scales) = x_scale.filter(|scales| scales.len() != m) {
            return Err(Error::usage(format!(
                "{} token scales do not fit {m} tokens",
                scales.len()
            )));
        }
        if m > 1 << 30 || m.div_ceil(32) * n.div_ceil(32) > i32::MAX as usize {
            return Err(Error::usage(format!(
                "a product of shape {m} x {n} is larger than a CUDA grid: multiply fewer tokens at a time"
            )));
        }
        let stream = self.device.cuda_stream();
        let (x, _x) = x.device_ptr(&stream);
        let x_scale = x_scale.map(|scales| scales.device_ptr(&stream));
        let (y, _y) = y.device_ptr_mut(&stream);
        for (name, address) in [("activations", x), ("the output", y)] {
            if !address.is_multiple_of(ALIGNMENT) {
                return Err(Error::usage(format!(
                    "the ternary product wants {name} to start on a multiple of {ALIGNMENT} bytes"
                )));
            }
        }
        let product = Product {
            x,
            w: w.tiles(),
            x_scale: x_scale.as_ref().map_or(0, |(address, _)| *address),
            w_scale: w.scales(),
            y,
            m,
            n,
            k,
            output,
            overlapped: self.overlapped,
        };
        // SAFETY: the operands are alive, and of the sizes that were just checked.
        unsafe {
            match &self.hopper {
                _ if m <= FEW_TOKENS => self.small.launch(&product),
                Some(hopper) => hopper.launch(&product),
                None => self.portable.launch(&product),
            }
        }
    }
}
