//! An empty hub on this machine, to which the official client can upload with the token `mine`. It prints its address,
//! and ends when its input is closed: `cargo run -p sources --example hub`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "an example prints and fails by panicking")]

#[path = "../tests/fake/mod.rs"]
mod fake;

use std::io::Read;

fn main() {
    let hub = fake::Server::start();
    hub.know("mine");
    println!("{}", hub.url);
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}
