//! Decoder models with LoRA adapters over a backend.
