//! The Soft-RoCE devices of a test machine.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, anyhow};

/// A Soft-RoCE device of the guest, named after an address that makes its GID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    name: String,
    address: String,
}

impl Device {
    /// The address, without the length of its prefix.
    pub fn ip(&self) -> &str {
        let (ip, _) = self.address.split_once('/').unwrap_or((&self.address, ""));
        ip
    }
}

/// `NAME@ADDRESS/PREFIX`: the RDMA name and the IPv4 address that makes its GID.
impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        let wrong = || anyhow!("`{text}` is not NAME@ADDRESS/PREFIX, as in rxe0@10.77.0.1/24");
        let (name, address) = text.split_once('@').ok_or_else(wrong)?;
        let (ip, prefix) = address.split_once('/').ok_or_else(wrong)?;
        let plain = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let known = ip.parse::<std::net::Ipv4Addr>().is_ok()
            && prefix.parse::<u8>().is_ok_and(|bits| bits <= 32);
        if name.is_empty() || !plain || !known {
            return Err(wrong());
        }
        Ok(Device {
            name: name.to_owned(),
            address: address.to_owned(),
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}@{}", self.name, self.address)
    }
}

/// The devices that a machine has unless told otherwise.
pub fn defaults() -> Vec<Device> {
    [("rxe0", "10.77.0.1/24"), ("rxe1", "10.78.0.1/24")]
        .map(|(name, address)| Device {
            name: name.to_owned(),
            address: address.to_owned(),
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_refused() {
        let device: Device = "rdma9@10.99.0.1/24".parse().expect("a device");
        assert_eq!(device.to_string(), "rdma9@10.99.0.1/24");
        assert_eq!(device.ip(), "10.99.0.1");
        for wrong in [
            "",
            "rxe0",
            "@10.0.0.1/8",
            "rxe0@10.0.0/8",
            "rxe0@10.0.0.1",
            "r x@10.0.0.1/8",
            "rxe0@10.0.0.1/33",
        ] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
    }
}
