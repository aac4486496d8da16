//! The memory estimates: the CPU's under an allocator that counts, the GPU's against the table that
//! the configurations are made for. What a GPU really takes is in `benches/results/gpu.md`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::{DType, Device, Tensor};
use titanbit::config::{Config, Recompute};
use titanbit::model::{BitNetConfig, BitNetTransformer, MemoryEstimate};

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

/// One test, so that nothing else allocates meanwhile.
#[test]
fn estimates_are_what_is_allocated() {
    the_cpu_takes_what_is_estimated();
    the_gpu_layout_by_hand();
}

/// The estimate of the CPU's passes refuses runs: it must not exceed what they take, nor be far
/// below it.
fn the_cpu_takes_what_is_estimated() {
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

/// The layout's own count of a small model, by hand.
fn the_gpu_layout_by_hand() {
    let mut config = Config {
        model: BitNetConfig {
            vocab_size: 1000,
            hidden_size: 256,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            intermediate_size: 512,
            max_seq_len: 256,
            ..BitNetConfig::default()
        },
        ..Config::default()
    };
    config.train.micro_batch = 4;
    config.train.seq_len = 256;
    let of_layers = |recompute, layers| {
        let mut config = config.clone();
        config.train.recompute = recompute;
        config.train.recompute_layers = layers;
        MemoryEstimate::of_training(&config).activations
    };
    let activations = |recompute| of_layers(recompute, None);
    let (tokens, hidden, ffn, qkv) = (1024, 256, 512, 512);
    // bf16 x, attention and h; qkv; log-sum-exp of 4 heads; scale and rstd of 4 norms.
    let kept = tokens * (2 * 3 * hidden + 2 * qkv + 4 * 4 + 4 * 8);
    let gate_up = tokens * 2 * 2 * ffn;
    let none = activations(Recompute::None);
    assert_eq!(none - activations(Recompute::Selective), 2 * gate_up);
    // The layers that compute anew share one place.
    assert_eq!(none - of_layers(Recompute::Selective, Some(2)), gate_up);
    assert_eq!(none, of_layers(Recompute::Selective, Some(1)));
    assert_eq!(none, of_layers(Recompute::Selective, Some(0)));
    let (x, ffn_norm) = (tokens * 2 * hidden, tokens * 8);
    let full = activations(Recompute::Full);
    assert_eq!(none - full, 2 * (kept + gate_up - x - ffn_norm));
}

/// GB of an L20 that each size may take, 48 in all: the CUDA context and cuBLAS take about one.
#[test]
fn configurations_fit_the_l20() {
    for (name, gigabytes) in [
        ("125m", 4.0),
        ("350m", 8.0),
        ("700m", 14.0),
        ("default", 22.0),
        ("3b", 42.0),
    ] {
        let path = format!("configs/{name}.yaml");
        let config = Config::load(Path::new(&path), &[]).unwrap();
        let estimate = MemoryEstimate::of_training(&config).total() as f64 / 1e9;
        assert!(estimate + 1.0 < gigabytes, "{path} takes {estimate} GB");
        assert_eq!(config.train.seq_len, 2048, "{path}");
        assert_eq!(config.tokens_per_step(), 1 << 19, "{path}");
    }
}
