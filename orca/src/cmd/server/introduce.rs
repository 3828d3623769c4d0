//! What whoever founds a cluster is told, once.

use std::io::{self, IsTerminal as _};

use orca_control::{Founded, Layout};
use orca_wire::identity::file as private;
use zeroize::Zeroizing;

use super::Server;
use crate::context::{Credential, write_founded};
use crate::output::Output;

/// What whoever founded the cluster must know: the token, once, and what to keep safe.
pub fn introduce(server: &Server, founded: &Founded, output: &Output) {
    let name = founded.name.as_str();
    output.complain(&format!("cluster `{name}` founded in {}\n", server.data.display()));
    match write_founded(name, vec![server.address()], Credential::Identity(&founded.user)) {
        Ok(contexts) => output.complain(&format!("  this user's access is in {}\n", contexts.display())),
        // A service may have no home. The cluster is there all the same, and the token below opens it.
        Err(failure) => output.complain(&format!("  this user's access could not be kept: {}\n", failure.message)),
    }
    if let Some(key) = &founded.unseal_key {
        output
            .complain(&format!("  keep a copy of {}: without it a backup's secrets cannot be opened\n", key.display()));
    }
    if io::stderr().is_terminal() {
        output.complain(&format!("  administrator's token, shown this once: {}\n", *founded.token));
        return;
    }
    // Nobody may be reading: it would stay in a journal, or wherever this goes, for more than its owner to find.
    let file = Layout::new(&server.data).admin().join("token");
    let text = Zeroizing::new(format!("{}\n", *founded.token));
    match private::replace(&file, text.as_bytes()) {
        Ok(()) => output.complain(&format!("  administrator's token: in {}\n", file.display())),
        Err(error) => output.complain(&format!("  administrator's token could not be kept: {error}\n")),
    }
}
