//! Memory of the GPU between guards.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DeviceRepr};
use candle_core::{CudaDevice, Device};
use half::{bf16, f16};
use titanbit::cuda::DevicePtr;
use titanbit::cuda::kernels::address;

/// Values on either side of a buffer. A multiple of 16 bytes, which vector loads and TMA want.
const GUARD: usize = 256;

/// What kernels read and write.
pub trait Value: DeviceRepr + Copy + 'static {
    /// Stands where a kernel is to write, and where it must not.
    const POISON: Self;
    fn bits(self) -> u64;
}

macro_rules! value {
    ($type:ty, $poison:expr, $bits:expr) => {
        impl Value for $type {
            const POISON: Self = $poison;

            fn bits(self) -> u64 {
                let bits: fn(Self) -> _ = $bits;
                u64::from(bits(self))
            }
        }
    };
}

value!(f32, f32::from_bits(0x7fc0_0bad), f32::to_bits);
value!(f64, f64::from_bits(0x7ff8_0000_0000_0bad), f64::to_bits);
value!(bf16, bf16::from_bits(0x7fda), bf16::to_bits);
value!(f16, f16::from_bits(0x7eda), f16::to_bits);
// No kernel makes a code of -128.
value!(i8, i8::MIN, |x| x as u8);
value!(u8, 0xda, |x| x);
value!(u32, 0xdead_beef, |x| x);
value!(i32, i32::MIN, |x| x as u32);

pub struct Gpu {
    pub device: CudaDevice,
}

pub fn gpu() -> Option<Gpu> {
    match titanbit::device::select("cuda") {
        Ok(Device::Cuda(device)) => Some(Gpu { device }),
        Ok(_) => unreachable!("`cuda` selects a GPU or fails"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A GPU that runs the kernels made for Hopper, or any if they are not asked for.
pub fn gpu_with(hopper: bool) -> Option<Gpu> {
    let gpu = gpu()?;
    let capability = gpu.device.cuda_stream().context().compute_capability();
    let (major, _) = capability.unwrap();
    if hopper && major != 9 {
        eprintln!("skipped: sm_{major}x does not run kernels made for Hopper");
        return None;
    }
    Some(gpu)
}

impl Gpu {
    pub fn upload<T: Value>(&self, values: &[T]) -> Buffer<T> {
        let guard = &[T::POISON; GUARD][..];
        let all = [guard, values, guard].concat();
        Buffer {
            slice: self.device.clone_htod(&all).unwrap(),
            device: self.device.clone(),
        }
    }

    pub fn poisoned<T: Value>(&self, len: usize) -> Buffer<T> {
        self.upload(&vec![T::POISON; len])
    }
}

pub struct Buffer<T> {
    slice: CudaSlice<T>,
    device: CudaDevice,
}

impl<T: Value> Buffer<T> {
    pub fn ptr(&self) -> DevicePtr<T> {
        DevicePtr::new(address(&self.slice)).offset(GUARD)
    }

    pub fn view(&self) -> CudaView<'_, T> {
        self.slice.slice(GUARD..self.slice.len() - GUARD)
    }

    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        let end = self.slice.len() - GUARD;
        self.slice.slice_mut(GUARD..end)
    }

    pub fn address(&self) -> u64 {
        self.ptr().address()
    }

    pub fn write(&mut self, values: &[T]) {
        let mut place = self.slice.slice_mut(GUARD..GUARD + values.len());
        self.device.memcpy_htod(values, &mut place).unwrap();
    }

    /// What is there once all kernels are done, which must not have touched the guards.
    pub fn read(&self) -> Vec<T> {
        self.device.cuda_stream().synchronize().unwrap();
        let mut all = self.device.clone_dtoh(&self.slice).unwrap();
        let after = all.split_off(all.len() - GUARD);
        let values = all.split_off(GUARD);
        let whole = |guard: &[T]| guard.iter().all(|x| x.bits() == T::POISON.bits());
        assert!(whole(&all), "a kernel wrote before its buffer");
        assert!(whole(&after), "a kernel wrote behind its buffer");
        values
    }
}
