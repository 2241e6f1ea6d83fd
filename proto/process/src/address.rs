//! Hosts and ports as people write them in the flags of all programs.
//!
//! An IPv6 address contains colons. Followed by a port it must be in brackets; without a port the brackets are
//! optional.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// A host, by name or address, and optionally a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    host: String,
    port: Option<u16>,
}

impl HostPort {
    /// The host with this address, and a port.
    pub fn of_ip(address: IpAddr, port: u16) -> Self {
        Self { host: address.to_string(), port: Some(port) }
    }

    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, if there is one.
    pub const fn port(&self) -> Option<u16> {
        self.port
    }

    /// The same host with this port.
    #[must_use]
    pub fn with_port(self, port: u16) -> Self {
        Self { port: Some(port), ..self }
    }

    /// All addresses of the host, with port 0 if it has none. Blocks.
    ///
    /// # Errors
    /// When no host has this name.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<_> = (self.host.as_str(), self.port.unwrap_or(0)).to_socket_addrs()?.collect();
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
        }
        Ok(found)
    }

    /// Whether the host has only IPv6 addresses. `false` if its name cannot be resolved on this machine. Blocks.
    pub fn is_ipv6(&self) -> bool {
        self.resolve().is_ok_and(|found| found.iter().all(SocketAddr::is_ipv6))
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or("the bracket is not closed; write [IPV6]:PORT")?;
            if !is_ipv6(host) {
                return Err(format!(
                    "invalid IPv6 address {host:?} in brackets; write for instance [::1]:7070"
                ));
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => {
                    return Err(format!("invalid port {rest:?} after the bracket; write [{host}]:PORT"));
                }
            }
        } else if is_ipv6(text) {
            (text, None)
        } else {
            match text.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() {
            return Err(
                "the host is missing; write HOST:PORT, with 0.0.0.0 as HOST for all interfaces".to_owned()
            );
        }
        // A host that is not an IPv6 address must be a name or an IPv4 address.
        let is_name = host.chars().all(|c| c.is_alphanumeric() || "-._".contains(c));
        if !is_name && !is_ipv6(host) {
            return Err(format!(
                "invalid host {host:?}; write HOST or HOST:PORT, or [ADDRESS]:PORT for an IPv6 address with a port"
            ));
        }
        let port = port.map(|port| {
            let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
            let number = port.parse().ok().filter(|_| digits);
            number.ok_or_else(|| {
                format!("invalid port {port:?}; write HOST or HOST:PORT, with a port from 0 to 65535")
            })
        });
        Ok(Self { host: host.to_owned(), port: port.transpose()? })
    }
}

/// Whether `host` is an IPv6 address, possibly with a zone such as `%eth0`.
fn is_ipv6(host: &str) -> bool {
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    address.parse::<Ipv6Addr>().is_ok()
}

impl fmt::Display for HostPort {
    /// Writes the form that [`FromStr`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.host.contains(':')) {
            (Some(port), true) => write!(f, "[{}]:{port}", self.host),
            (Some(port), false) => write!(f, "{}:{port}", self.host),
            (None, _) => f.write_str(&self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_in_every_way_that_they_are_written() {
        for (text, host, port, shown) in [
            ("host", "host", None, "host"),
            ("host:7000", "host", Some(7000), "host:7000"),
            ("localhost:0", "localhost", Some(0), "localhost:0"),
            ("a-b.example.org.:1", "a-b.example.org.", Some(1), "a-b.example.org.:1"),
            ("10.0.0.7", "10.0.0.7", None, "10.0.0.7"),
            ("10.0.0.7:65535", "10.0.0.7", Some(65535), "10.0.0.7:65535"),
            ("::1", "::1", None, "::1"),
            ("[::1]", "::1", None, "::1"),
            ("[::1]:7000", "::1", Some(7000), "[::1]:7000"),
            ("[fe80::1]:0", "fe80::1", Some(0), "[fe80::1]:0"),
            ("[fe80::1%eth0]:7", "fe80::1%eth0", Some(7), "[fe80::1%eth0]:7"),
            ("::ffff:10.0.0.7", "::ffff:10.0.0.7", None, "::ffff:10.0.0.7"),
            // Without brackets, all of it is the address.
            ("::1:0", "::1:0", None, "::1:0"),
        ] {
            let read: HostPort = text.parse().unwrap();
            assert_eq!((read.host(), read.port()), (host, port), "{text}");
            assert_eq!(read.to_string(), shown);
            assert_eq!(shown.parse(), Ok(read));
        }
        let with_port = "[::1]".parse::<HostPort>().unwrap().with_port(9);
        assert_eq!(with_port.to_string(), "[::1]:9");
    }

    #[test]
    fn what_is_no_host_or_port_is_told_with_what_to_write() {
        for (text, words) in [
            ("", "host is missing"),
            (":7070", "0.0.0.0"),
            ("[::1", "not closed"),
            ("[host]:1", "invalid IPv6 address"),
            ("[]:1", "invalid IPv6 address"),
            ("[::1]7000", "write [::1]:PORT"),
            ("[::1]:x", "invalid port \"x\""),
            ("host:", "invalid port \"\""),
            ("host:x", "invalid port \"x\""),
            ("host:+1", "invalid port \"+1\""),
            ("host:65536", "0 to 65535"),
            ("host:1:2", "invalid host \"host:1\""),
            ("http://host:1", "invalid host"),
            ("a host:1", "invalid host"),
        ] {
            let error = text.parse::<HostPort>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn names_and_addresses_are_resolved() {
        let local = |text: &str| text.parse::<HostPort>().unwrap();
        assert!(local("localhost:7").resolve().unwrap().iter().all(|found| found.port() == 7));
        assert_eq!(local("[::1]:7").resolve().unwrap(), [SocketAddr::from((Ipv6Addr::LOCALHOST, 7))]);
        assert!(
            local("::1").is_ipv6() && !local("127.0.0.1").is_ipv6() && !local("no.such.invalid").is_ipv6()
        );
    }
}
