//! One process per device: weights, KV memory, adapters, steps.
