//! Upper bounds of histograms. A histogram of the server's own has all bounds of the sets of names that are made of it.

/// Durations in seconds: from a step of a small model to the longest answer.
pub(super) const SECONDS: [f64; 50] = [
    0.000_5, 0.001, 0.002, 0.004, 0.005, 0.008, 0.01, 0.015, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1,
    0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 0.8, 1.0, 1.5, 2.0, 2.5, 4.0, 5.0, 7.5, 8.0, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 80.0, 120.0, 160.0, 240.0, 300.0, 480.0, 640.0, 960.0, 1920.0, 2560.0, 7680.0,
];

/// Numbers of tokens and of rows: powers of two, and 1, 2 and 5 of each power of ten.
pub(super) const TOKENS: [f64; 35] = [
    1.0, 2.0, 4.0, 5.0, 8.0, 10.0, 16.0, 20.0, 32.0, 50.0, 64.0, 100.0, 128.0, 200.0, 256.0, 500.0, 512.0,
    1000.0, 1024.0, 2000.0, 2048.0, 4096.0, 5000.0, 8192.0, 10000.0, 16384.0, 20000.0, 32768.0, 50000.0,
    65536.0, 100000.0, 131072.0, 200000.0, 500000.0, 1000000.0,
];

/// vLLM's bounds of the time to the first token.
pub(super) const VLLM_FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];

/// vLLM's bounds of the time between tokens.
pub(super) const VLLM_TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// vLLM's bounds of the times of requests.
pub(super) const VLLM_REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// vLLM's bounds of the tokens of a step.
pub(super) const VLLM_STEP: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// vLLM's bounds of the tokens of a request, of which it has those up to the longest request.
pub(super) fn is_vllm_tokens(bound: f64, max_tokens: usize) -> bool {
    let mantissa = bound / 10f64.powf(bound.log10().floor());
    bound <= max_tokens as f64 && [1.0, 2.0, 5.0].iter().any(|known| (mantissa - known).abs() < 1e-9)
}
