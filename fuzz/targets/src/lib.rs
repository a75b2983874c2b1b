//! What fuzzing calls, one module for each kind of input that the server does not trust: bytes in, a value or a typed
//! error out. `cargo fuzz` makes inputs for hours (`make fuzz`), and `tests/corpus.rs` replays those that are kept.
//!
//! Each module has a function `run`, which panics where the server would. What it calls are the functions by which the
//! programs themselves read such inputs.

pub mod adapter_config;
pub mod chat_template;
pub mod gguf;
pub mod request_body;
pub mod safetensors;
mod scratch;
pub mod tokenizer;

/// What became of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A value was made of it.
    Read,
    /// It was refused with this message.
    Refused(String),
}

impl Outcome {
    fn of<T, E: std::fmt::Display>(result: Result<T, E>) -> Outcome {
        result.map_or_else(|error| Outcome::Refused(error.to_string()), |_| Outcome::Read)
    }
}

/// Takes apart what cannot fail in a correct setup, such as the writing of a temporary file.
fn must<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("the surroundings of the input are broken: {error}"))
}
