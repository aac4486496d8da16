//! Loading our kernels and launching them.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchConfig, CUresult,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DeviceRepr};
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

    /// Clusters of so many blocks that the device holds at a time.
    ///
    /// # Errors
    /// `Tensor` if the driver does not say.
    pub fn resident_clusters(&self, threads: usize, cluster: usize) -> Result<usize> {
        let launch = Launch {
            grid: [cluster, 1, 1],
            threads,
            shared_bytes: self.shared_bytes as usize,
            cluster,
            overlapped: false,
        };
        let mut clusters = 0;
        launch.with_config(&self.stream, |config| {
            // SAFETY: the configuration is whole, and `clusters` is written.
            unsafe {
                sys::cuOccupancyMaxActiveClusters(
                    &raw mut clusters,
                    self.function.cu_function(),
                    config,
                )
            }
        })?;
        Ok((clusters as usize).max(1))
    }

    /// Queues the kernel with the shared memory it was loaded with, and returns without waiting for
    /// it.
    ///
    /// # Safety
    /// As [`Self::launch_with`].
    ///
    /// # Errors
    /// As [`Self::launch_with`].
    pub unsafe fn launch(
        &self,
        grid: [usize; 3],
        threads: usize,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let launch = Launch {
            grid,
            threads,
            shared_bytes: self.shared_bytes as usize,
            cluster: 0,
            overlapped: false,
        };
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(&launch, arguments) }
    }

    /// Queues the kernel and returns without waiting for it.
    ///
    /// # Safety
    /// `arguments` must be those of the kernel's signature, in order, and every address among
    /// them must hold what the kernel's comment says. An overlapped kernel must wait before it reads
    /// what earlier kernels write, and before it writes.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch, or an earlier kernel failed.
    pub unsafe fn launch_with(&self, launch: &Launch, arguments: &[&dyn Argument]) -> Result<()> {
        let mut pointers: Vec<_> = arguments.iter().map(|a| a.pointer()).collect();
        launch.with_config(&self.stream, |config| {
            // SAFETY: as promised by the caller; the driver copies the arguments before it returns.
            unsafe {
                sys::cuLaunchKernelEx(
                    config,
                    self.function.cu_function(),
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        })
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [usize; 3],
    pub threads: usize,
    /// Of dynamic shared memory, at most what the kernel was loaded with.
    pub shared_bytes: usize,
    /// Blocks of a cluster, along the grid's first dimension; 0 for what the kernel itself says.
    pub cluster: usize,
    /// Whether it may start while earlier kernels still run (from sm_90 on): it reads what they do
    /// not write, and then waits for their end itself (`griddepcontrol.wait`).
    pub overlapped: bool,
}

impl Launch {
    /// Calls the driver with this launch on `stream`.
    fn with_config(
        &self,
        stream: &CudaStream,
        call: impl FnOnce(*const CUlaunchConfig) -> CUresult,
    ) -> Result<()> {
        let mut attributes = Vec::new();
        // SAFETY: a plain C structure, of which zeros are a value.
        let attribute = || -> CUlaunchAttribute { unsafe { std::mem::zeroed() } };
        if self.overlapped {
            let mut overlap = attribute();
            overlap.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            overlap.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(overlap);
        }
        if self.cluster > 0 {
            let mut cluster = attribute();
            cluster.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            cluster.value.clusterDim.x = self.cluster as u32;
            cluster.value.clusterDim.y = 1;
            cluster.value.clusterDim.z = 1;
            attributes.push(cluster);
        }
        let [x, y, z] = self.grid.map(|blocks| blocks as u32);
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        call(&raw const config).result().w()?;
        Ok(())
    }
}
