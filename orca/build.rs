//! How the binary is linked: the same code that generics produce for many types is kept once, which makes it several
//! percent smaller. Rust promises nothing about addresses of functions, so nothing can tell. Only where rustc links with
//! its own LLD; other linkers do not know the option.

/// Where that is so by default, since Rust 1.90.
const LINKED_BY_LLD: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| std::env::var(name).unwrap_or_default();
    if variable("PROFILE") == "release" && variable("TARGET") == LINKED_BY_LLD {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}
