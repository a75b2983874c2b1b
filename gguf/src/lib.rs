//! Reader of GGUF files: metadata, tensor index, dequantization.
