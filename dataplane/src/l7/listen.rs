//! Sockets to accept on. Each worker has its own for every address, bound with `SO_REUSEPORT`, and the kernel deals
//! connections out among them.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

/// Connections the kernel keeps for us until we accept them; it lowers this to its own limit.
const BACKLOG: i32 = 4096;

/// A client that says nothing for so long is asked by the kernel whether it is there: a phone that went out of reach with
/// a WebSocket open would hold it, and every drain, for ever.
const QUIET_MAX: Duration = Duration::from_secs(60);
/// Between two such questions.
const ASKED_EVERY: Duration = Duration::from_secs(15);
/// Without an answer to so many the connection is at its end.
const ASKED_MAX: u32 = 4;

/// Binds as many listeners to one address as there are workers. Port 0 is chosen once for all of them.
pub fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<TcpListener>> {
    let first = bind_one(address)?;
    let actual = first.local_addr()?;
    let mut all = vec![first];
    for _ in 1..workers {
        all.push(bind_one(actual)?);
    }
    Ok(all)
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // What is accepted inherits it.
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(QUIET_MAX).with_interval(ASKED_EVERY).with_retries(ASKED_MAX),
    )?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether somebody else listens on an address. `SO_REUSEPORT` lets a second process of the same user share a port in
/// silence; someone who starts a second server by mistake wants to hear of it.
pub fn is_taken(address: SocketAddr) -> io::Result<bool> {
    if address.port() == 0 {
        return Ok(false);
    }
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    let bound = socket.bind(&address.into()).and_then(|()| socket.listen(1));
    match bound {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::SockRef;
    use std::net::TcpStream;

    #[test]
    fn a_client_that_is_gone_without_a_word_is_found_out() {
        let listener = bind("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
        listener.set_nonblocking(false).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.keepalive().unwrap());
        let settings = (
            accepted.tcp_keepalive_time().unwrap(),
            accepted.tcp_keepalive_interval().unwrap(),
            accepted.tcp_keepalive_retries().unwrap(),
        );
        assert_eq!(settings, (QUIET_MAX, ASKED_EVERY, ASKED_MAX));
    }
}
