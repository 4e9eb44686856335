//! Prints the examples of `docs/formats.md` as the code writes them, name and hexadecimal bytes, for whoever edits that
//! page: `cargo run -p onequote-evidence --example format_examples`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for the page's author")]

#[path = "../tests/formats_doc/examples.rs"]
mod examples;

fn main() {
    for (name, bytes) in examples::written().into_iter().chain(examples::maps()) {
        println!("{name} {}", hex::encode(bytes));
    }
}
