//! Typed addresses in device memory, and ranges of one allocation. Also compiled without CUDA
//! support, so that the memory a run takes can be told anywhere.

use std::marker::PhantomData;

/// Ranges start at multiples of this many bytes, as TMA and vector loads like it.
const ALIGNMENT: u64 = 256;

/// Address of values of type `T` on the GPU; null where there are none.
#[derive(Debug)]
#[repr(transparent)]
pub struct DevicePtr<T> {
    address: u64,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for DevicePtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DevicePtr<T> {}

impl<T> DevicePtr<T> {
    pub const NULL: Self = Self::new(0);

    pub const fn new(address: u64) -> Self {
        Self {
            address,
            of: PhantomData,
        }
    }

    pub fn address(self) -> u64 {
        self.address
    }

    pub fn is_null(self) -> bool {
        self.address == 0
    }

    /// The address `count` values further.
    pub fn offset(self, count: usize) -> Self {
        Self::new(self.address + (count * size_of::<T>()) as u64)
    }
}

/// Hands out consecutive ranges. At address 0 it measures how much there is to allocate.
pub struct Arena {
    start: u64,
    next: u64,
}

impl Arena {
    pub fn at(address: u64) -> Self {
        Self {
            start: address,
            next: address,
        }
    }

    pub fn take<T>(&mut self, count: usize) -> DevicePtr<T> {
        let range = DevicePtr::new(self.next);
        let bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
        self.next = (self.next.saturating_add(bytes))
            .checked_next_multiple_of(ALIGNMENT)
            .unwrap_or(u64::MAX);
        range
    }

    /// Bytes handed out so far.
    pub fn bytes(&self) -> u64 {
        self.next - self.start
    }
}
