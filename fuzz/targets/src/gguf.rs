//! GGUF files: the container, the model in it, and the tokenizer in it.

use std::fs;

use gguf::Gguf;
use lorax_router::tokenizer::ModelTokenizer;
use model::Model;

use crate::{Outcome, must, scratch::scratch, tokenizer};

/// Tensors of up to so many bytes are dequantized.
const MAX_TENSOR: usize = 1 << 16;

/// Opens the file, reads all that is in it, and loads it as a model and as a tokenizer.
pub fn run(bytes: &[u8]) -> Outcome {
    let folder = must(tempfile::tempdir());
    let path = folder.path().join("model.gguf");
    must(fs::write(&path, bytes));
    let opened = Gguf::open(&path);
    if let Ok(file) = &opened {
        for (key, value) in file.metadata() {
            let _ =
                (value.to_string(), file.get::<u32>(key), file.get::<Vec<i32>>(key), file.get::<&str>(key));
        }
        for tensor in file.tensors().iter().filter(|tensor| tensor.bytes() <= MAX_TENSOR) {
            let values = must(file.dequantize(&tensor.name));
            assert_eq!(values.len(), tensor.elements(), "{tensor:?}");
        }
        let _ = Model::load(&scratch().backend, &path, &mut |_| {});
        if let Ok(model) = ModelTokenizer::load(&path, None) {
            tokenizer::exercise(&model);
        }
    }
    Outcome::of(opened)
}
