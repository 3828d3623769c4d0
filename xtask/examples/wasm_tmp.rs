#[path="../src/wasm.rs"] mod wasm;
fn main() -> anyhow::Result<()> { let root = std::env::current_dir()?; if std::env::args().nth(1).as_deref()==Some("verify") { wasm::verify(&root)?; } else { wasm::build(&root)?; } Ok(()) }
