//! Loading our kernels and launching them.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchConfig,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DeviceRepr, result,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use crate::Result;
use crate::cuda::DevicePtr;

// SAFETY: an address, as kernels take it.
unsafe impl<T> DeviceRepr for DevicePtr<T> {}

/// The kernels of one `kernels/*.cu`.
pub struct Module {
    module: Arc<CudaModule>,
    stream: Arc<CudaStream>,
}

impl Module {
    /// Loads a fatbin into the context that candle uses, so that both share memory and streams.
    /// The driver picks the machine code of its GPU, or compiles the PTX.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses it.
    pub fn load(device: &CudaDevice, fatbin: &[u8]) -> Result<Self> {
        let stream = device.cuda_stream();
        let module = stream
            .context()
            .load_module(Ptx::from_binary(fatbin.to_vec()))
            .w()?;
        Ok(Self { module, stream })
    }

    /// One kernel, and the bytes of dynamic shared memory that its launches ask for.
    ///
    /// # Errors
    /// `Tensor` if there is no such kernel, or no such amount of shared memory.
    pub fn kernel(&self, name: &str, shared_bytes: usize) -> Result<Kernel> {
        let function = self.module.load_function(name).w()?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared_bytes as i32).w()?;
        Ok(Kernel {
            function,
            stream: Arc::clone(&self.stream),
            shared_bytes: shared_bytes as u32,
        })
    }
}

/// A kernel on the device's stream.
pub struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
    shared_bytes: u32,
}

/// Something a kernel takes by value.
pub trait Argument {
    fn pointer(&self) -> *mut c_void;
}

impl<T: DeviceRepr> Argument for T {
    fn pointer(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

impl Kernel {
    /// Blocks of so many threads that the device holds at a time.
    ///
    /// # Errors
    /// `Tensor` if the driver does not say.
    pub fn resident_blocks(&self, threads: usize) -> Result<usize> {
        let by_processor = self
            .function
            .occupancy_max_active_blocks_per_multiprocessor(
                threads as u32,
                self.shared_bytes as usize,
                None,
            )
            .w()?;
        Ok((by_processor as usize * self.processors()?).max(1))
    }

    /// The device's multiprocessors.
    ///
    /// # Errors
    /// `Tensor` if the driver does not say.
    pub fn processors(&self) -> Result<usize> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(self.stream.context().attribute(attribute).w()? as usize)
    }

    /// Queues the kernel and returns without waiting for it.
    ///
    /// # Safety
    /// `arguments` must be those of the kernel's signature, in order, and every address among
    /// them must hold what the kernel's comment says.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch, or an earlier kernel failed.
    pub unsafe fn launch(
        &self,
        grid: [usize; 3],
        threads: usize,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let mut pointers: Vec<_> = arguments.iter().map(|a| a.pointer()).collect();
        // SAFETY: as promised by the caller; the driver copies the arguments before it returns.
        unsafe {
            result::launch_kernel(
                self.function.cu_function(),
                grid.map(|blocks| blocks as u32).into(),
                (threads as u32, 1, 1),
                self.shared_bytes,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .w()?;
        Ok(())
    }

    /// As [`Self::launch`], with `shared_bytes` of dynamic shared memory. An `overlapped` kernel may
    /// start while earlier ones still run (from sm_90 on): it reads what they do not write, and then
    /// waits for their end itself (`griddepcontrol.wait`).
    ///
    /// # Safety
    /// As [`Self::launch`]; an overlapped kernel must wait before it reads what earlier kernels
    /// write, and before it writes.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub unsafe fn launch_with(
        &self,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        overlapped: bool,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let mut pointers: Vec<_> = arguments.iter().map(|a| a.pointer()).collect();
        // SAFETY: a plain C structure, of which zeros are a value.
        let mut overlap: CUlaunchAttribute = unsafe { std::mem::zeroed() };
        overlap.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let [x, y, z] = grid.map(|blocks| blocks as u32);
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(overlapped),
        };
        // SAFETY: as promised by the caller; the driver copies the arguments before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .w()?;
        Ok(())
    }
}
