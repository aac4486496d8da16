//! Files to measure with, where what the weights are does not matter.

use std::path::PathBuf;

use candle_core::Device;
use titanbit::export::gguf::{self, TernaryType};
use titanbit::model::{BitNetConfig, BitNetTransformer};

#[test]
#[ignore = "no test: writes the model that TITANBIT_PRESET names to TITANBIT_GGUF"]
fn random_weights_with_a_tied_head() {
    let path = PathBuf::from(std::env::var("TITANBIT_GGUF").expect("the path to write to"));
    let preset = std::env::var("TITANBIT_PRESET").unwrap_or("125M".into());
    let config = BitNetConfig {
        tie_embeddings: true,
        ..BitNetConfig::preset(&preset).unwrap()
    };
    let model = BitNetTransformer::new(&config, 1, &Device::Cpu).unwrap();
    for note in gguf::write(&path, &model, None, TernaryType::Tq2_0, &preset).unwrap() {
        println!("{note}");
    }
}
