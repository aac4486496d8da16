//! The memory estimate against every byte that the candle operations really allocate: they are
//! what runs on CUDA, here they run on the CPU under an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::{DType, Device, Tensor};
use titanbit::model::{Activation, BitNetConfig, BitNetTransformer, MemoryEstimate};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, SeqCst) + bytes;
    PEAK.fetch_max(live, SeqCst);
}

// SAFETY: every call goes to the system allocator unchanged; only counters are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes allocated at the peak of a forward and backward pass, beyond the weights. The first
/// pass also allocates the scratch that matrix products keep; the second is the one measured.
fn measured_peak(config: &BitNetConfig, batch: usize, seq: usize) -> usize {
    let model = BitNetTransformer::new(config, 1, &Device::Cpu).unwrap();
    let ids = Tensor::zeros((batch, seq), DType::U32, &Device::Cpu).unwrap();
    let pass = || {
        let before = LIVE.load(SeqCst);
        PEAK.store(before, SeqCst);
        let loss = model.forward(&ids, Some(&ids)).unwrap().loss.unwrap();
        let _gradients = loss.backward().unwrap();
        PEAK.load(SeqCst) - before
    };
    pass();
    pass()
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn estimates_are_what_is_allocated() {
    candle_operations();
    explicit_passes();
}

/// The estimate of the CPU's passes refuses runs: it must not exceed what they take, nor be far
/// below it.
fn explicit_passes() {
    let config = BitNetConfig {
        vocab_size: 2048,
        hidden_size: 256,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 768,
        max_seq_len: 256,
        ..BitNetConfig::default()
    };
    let model = BitNetTransformer::new(&config, 1, &Device::Cpu).unwrap();
    let ids = Tensor::zeros((8, 256), DType::U32, &Device::Cpu).unwrap();
    let pass = || {
        let before = LIVE.load(SeqCst);
        PEAK.store(before, SeqCst);
        let _gradients = model.loss_and_gradients(&ids, &ids, 1.0).unwrap();
        PEAK.load(SeqCst) - before
    };
    pass();
    let measured = pass() as f64;
    // Weights and optimizer are not allocated here.
    let others = 12.0 * config.parameter_count().total() as f64;
    let estimated = MemoryEstimate::cpu_training(&config, 8, 256) as f64 - others;
    let share = estimated / measured;
    assert!(
        (0.75..=1.0).contains(&share),
        "{estimated} estimated, {measured} measured"
    );
}

/// The shapes move the peak to each of the places where it can be.
fn candle_operations() {
    let base = BitNetConfig {
        vocab_size: 64,
        hidden_size: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 256,
        max_seq_len: 512,
        ..BitNetConfig::default()
    };
    for (what, config, batch, seq) in [
        ("scores", base.clone(), 1, 512),
        (
            "logits",
            BitNetConfig {
                vocab_size: 8192,
                layers: 1,
                ..base.clone()
            },
            2,
            128,
        ),
        (
            "LM head",
            BitNetConfig {
                vocab_size: 32768,
                ..base.clone()
            },
            2,
            16,
        ),
        (
            "embedding, tied",
            BitNetConfig {
                vocab_size: 8192,
                layers: 6,
                tie_embeddings: true,
                ..base.clone()
            },
            1,
            32,
        ),
        (
            "feed-forward",
            BitNetConfig {
                intermediate_size: 2048,
                activation: Activation::Relu2,
                ..base.clone()
            },
            16,
            16,
        ),
        (
            "weights",
            BitNetConfig {
                hidden_size: 256,
                layers: 8,
                heads: 2,
                ..base.clone()
            },
            1,
            8,
        ),
        (
            "everything, kv heads as many as heads",
            BitNetConfig {
                vocab_size: 4096,
                layers: 3,
                kv_heads: 4,
                ..base
            },
            2,
            256,
        ),
    ] {
        let measured = measured_peak(&config, batch, seq) as f64;
        let estimate = MemoryEstimate::of_training(&config, batch, seq, 1);
        let estimated = (estimate.gradients + estimate.activations) as f64;
        let off = estimated / measured - 1.0;
        assert!(
            off.abs() < 0.01,
            "{what}: {estimated} estimated, {measured} measured"
        );
    }
}
