#![no_main]

// libFuzzer's hook would end the process on panics of libraries that the server turns into errors. Those that it does
// not catch end it all the same.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))), |bytes: &[u8]| {
    fuzz_targets::tokenizer::run(bytes);
});
