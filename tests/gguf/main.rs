//! GGUF files: read back, refused, and in the hands of the programs that they are for. The last
//! needs Python with `gguf`, `llama_cpp` and `tokenizers`; set TITANBIT_PYTHON to one that has
//! them.

#[path = "../common/mod.rs"]
mod common;
mod files;
mod llama_cpp;
mod python;
mod random_weights;
mod tokenizers;
mod vocabularies;
