//! Questions to the kernel's RDMA netlink (`rdma/rdma_netlink.h`, client NLDEV).
//!
//! Only reading commands are known here; none of them needs privileges.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NlasIterator,
};
use rustix::io::Errno;
use rustix::net::netlink::{RDMA, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The NLDEV client of RDMA netlink; message types are `client << 10 | command`.
const CLIENT_NLDEV: u16 = 5;
/// Netlink header: length, type, flags, sequence number, port.
const HEADER_LENGTH: usize = 16;
/// Larger than the pages in which the kernel fills a dump.
const RECEIVE_BUFFER_LENGTH: usize = 64 * 1024;
/// The kernel answers at once; this only bounds a lost answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump is asked again this often when objects came or went under it.
const DUMP_ATTEMPTS: u32 = 4;

/// Attribute numbers, `enum rdma_nldev_attr`.
pub(crate) mod attribute {
    pub(crate) const DEVICE_INDEX: u16 = 1;
    pub(crate) const DEVICE_NAME: u16 = 2;
    pub(crate) const QP_TABLE: u16 = 19;
    pub(crate) const LOCAL_QPN: u16 = 21;
    pub(crate) const STATE: u16 = 27;
    pub(crate) const PID: u16 = 28;
    pub(crate) const KERNEL_NAME: u16 = 29;
    pub(crate) const CM_ID_TABLE: u16 = 30;
    pub(crate) const SOURCE_ADDRESS: u16 = 33;
    pub(crate) const DESTINATION_ADDRESS: u16 = 34;
    pub(crate) const CQ_TABLE: u16 = 35;
    pub(crate) const MR_TABLE: u16 = 40;
    pub(crate) const PD_TABLE: u16 = 46;
    pub(crate) const PD_NUMBER: u16 = 60;
    pub(crate) const CQ_NUMBER: u16 = 61;
    pub(crate) const MR_NUMBER: u16 = 62;
    pub(crate) const CM_ID_NUMBER: u16 = 63;
    pub(crate) const CONTEXT_NUMBER: u16 = 64;
    pub(crate) const CHARDEV_TYPE: u16 = 69;
    pub(crate) const UVERBS_DRIVER_ID: u16 = 73;
    pub(crate) const CONTEXT_TABLE: u16 = 86;
    pub(crate) const SRQ_TABLE: u16 = 88;
    pub(crate) const SRQ_NUMBER: u16 = 90;
}

/// Reading commands, `enum rdma_nldev_command`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Command {
    DeviceGet = 1,
    QueuePairs = 10,
    ConnectionIds = 11,
    CompletionQueues = 12,
    MemoryRegions = 13,
    ProtectionDomains = 14,
    CharacterDevice = 15,
    Contexts = 22,
    SharedReceiveQueues = 23,
}

/// A socket to RDMA netlink, closed over exec.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No ib_core in this kernel.
    #[error(
        "this kernel has no RDMA netlink: the module ib_core is not loaded or does not exist \
         (load the driver of the RDMA device, or run where there is one)"
    )]
    NoRdma,
    /// The socket could not be made or used.
    #[error("cannot {action} the RDMA netlink socket")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// What the system call answered.
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("the kernel refused RDMA netlink command {command}")]
    Refused {
        /// The number in `enum rdma_nldev_command`.
        command: u16,
        /// The error in the answer.
        source: io::Error,
    },
    /// The answer is not one that the protocol allows.
    #[error("the kernel's answer to RDMA netlink command {command} is malformed: {problem}")]
    Malformed {
        /// The number in `enum rdma_nldev_command`.
        command: u16,
        /// What is wrong.
        problem: String,
    },
    /// Objects came and went faster than they could be listed.
    #[error(
        "RDMA objects change faster than the kernel can list them (command {command}); try again"
    )]
    Inconsistent {
        /// The number in `enum rdma_nldev_command`.
        command: u16,
    },
}

/// The body of one answer.
#[derive(Debug)]
pub(crate) struct Answer(Vec<u8>);

/// Attributes side by side, at one level of nesting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a>(&'a [u8]);

impl Connection {
    /// Opens a socket to the kernel of this network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::NoRdma`] where the kernel has no RDMA core.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |action| {
            move |error: Errno| NetlinkError::Socket {
                action,
                source: io::Error::from(error),
            }
        };
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(RDMA),
        )
        .map_err(|error| match error {
            Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => NetlinkError::NoRdma,
            other => failed("open")(other),
        })?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))
            .map_err(failed("set a time limit on"))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0)).map_err(failed("bind"))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER_LENGTH],
        })
    }

    /// Lists all objects of a kind, on one device or (for devices themselves) everywhere.
    pub(crate) fn dump(
        &mut self,
        command: Command,
        device_index: Option<u32>,
    ) -> Result<Vec<Answer>, NetlinkError> {
        let mut attributes = Vec::new();
        if let Some(index) = device_index {
            push_attribute(
                &mut attributes,
                attribute::DEVICE_INDEX,
                &index.to_ne_bytes(),
            );
        }
        for _ in 0..DUMP_ATTEMPTS {
            self.send(command, NLM_F_DUMP, &attributes)?;
            if let Some(answers) = self.receive(command)? {
                return Ok(answers);
            }
        }
        Err(NetlinkError::Inconsistent {
            command: command as u16,
        })
    }

    /// Asks for the char device of kind `kind` that belongs to a device.
    pub(crate) fn character_device(
        &mut self,
        device_index: u32,
        kind: &str,
    ) -> Result<Answer, NetlinkError> {
        let command = Command::CharacterDevice;
        let mut attributes = Vec::new();
        let mut kind_with_end = kind.as_bytes().to_vec();
        kind_with_end.push(0);
        push_attribute(&mut attributes, attribute::CHARDEV_TYPE, &kind_with_end);
        push_attribute(
            &mut attributes,
            attribute::DEVICE_INDEX,
            &device_index.to_ne_bytes(),
        );
        // With NLM_F_ACK the answer is followed by a message that ends it, as in a dump.
        self.send(command, NLM_F_ACK, &attributes)?;
        self.receive(command)?
            .and_then(|answers| answers.into_iter().next())
            .ok_or_else(|| malformed(command, "it has no body"))
    }

    fn send(
        &mut self,
        command: Command,
        flags: u16,
        attributes: &[u8],
    ) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER_LENGTH + attributes.len();
        let mut message = vec![0; HEADER_LENGTH];
        let mut header = NetlinkBuffer::new(&mut message[..]);
        // Requests are a few dozen bytes.
        header.set_length(length as u32);
        header.set_message_type(message_type(command));
        header.set_flags(NLM_F_REQUEST | flags);
        header.set_sequence_number(self.sequence);
        message.extend_from_slice(attributes);
        let failed = |error: Errno| NetlinkError::Socket {
            action: "write to",
            source: io::Error::from(error),
        };
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &message, SendFlags::empty()))
            .map_err(failed)?;
        Ok(())
    }

    /// Collects the answers to the last request; `None` if the list changed while it was made.
    fn receive(&mut self, command: Command) -> Result<Option<Vec<Answer>>, NetlinkError> {
        let mut answers = Vec::new();
        let mut consistent = true;
        loop {
            let socket = &self.socket;
            let buffer = &mut self.buffer;
            let (received, full_length) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(socket, &mut buffer[..], RecvFlags::TRUNC)
            })
            .map_err(|error| NetlinkError::Socket {
                action: "read from",
                source: io::Error::from(error),
            })?;
            if full_length > received {
                return Err(malformed(command, "it is longer than the buffer"));
            }
            let mut rest = &self.buffer[..received];
            while !rest.is_empty() {
                let message =
                    NetlinkBuffer::new_checked(rest).map_err(|error| malformed(command, error))?;
                let padded = (message.length() as usize).next_multiple_of(4);
                rest = rest.get(padded..).unwrap_or_default();
                // Left over from a request that was given up on.
                if message.sequence_number() != self.sequence {
                    continue;
                }
                consistent &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match status(message.payload()) {
                            0 => Ok(consistent.then_some(answers)),
                            code => Err(NetlinkError::Refused {
                                command: command as u16,
                                source: io::Error::from_raw_os_error(code.saturating_neg()),
                            }),
                        };
                    }
                    kind if kind == message_type(command) => {
                        answers.push(Answer(message.payload().to_vec()));
                    }
                    other => {
                        return Err(malformed(command, format!("it is of type {other}")));
                    }
                }
            }
        }
    }
}

impl Answer {
    pub(crate) fn attributes(&self) -> Attributes<'_> {
        Attributes(&self.0)
    }
}

impl<'a> Attributes<'a> {
    /// Number and value of each attribute, as far as they are well formed.
    pub(crate) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        NlasIterator::new(self.0)
            .map_while(Result::ok)
            .map(|found| {
                let (number, length) = (found.kind(), usize::from(found.length()));
                // The iterator has checked that the length lies within the buffer.
                (number, &found.into_inner()[4..length])
            })
    }

    /// All tables `entry` inside the table `table`.
    pub(crate) fn entries(self) -> impl Iterator<Item = Attributes<'a>> {
        self.iter().map(|(_, value)| Attributes(value))
    }

    pub(crate) fn bytes(self, number: u16) -> Option<&'a [u8]> {
        self.iter()
            .find(|(found, _)| *found == number)
            .map(|(_, value)| value)
    }

    pub(crate) fn nested(self, number: u16) -> Option<Attributes<'a>> {
        self.bytes(number).map(Attributes)
    }

    pub(crate) fn u8(self, number: u16) -> Option<u8> {
        self.bytes(number)?.first().copied()
    }

    pub(crate) fn u32(self, number: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(
            self.bytes(number)?.get(..4)?.try_into().ok()?,
        ))
    }

    pub(crate) fn text(self, number: u16) -> Option<String> {
        let bytes = self.bytes(number)?;
        let end = bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

fn message_type(command: Command) -> u16 {
    CLIENT_NLDEV << 10 | command as u16
}

fn malformed(command: Command, problem: impl ToString) -> NetlinkError {
    NetlinkError::Malformed {
        command: command as u16,
        problem: problem.to_string(),
    }
}

/// The status in front of an end message: 0 or a negative errno.
fn status(payload: &[u8]) -> i32 {
    payload
        .get(..4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, i32::from_ne_bytes)
}

fn push_attribute(buffer: &mut Vec<u8>, number: u16, value: &[u8]) {
    // Values are numbers and short fixed names.
    let length = (4 + value.len()) as u16;
    buffer.extend_from_slice(&length.to_ne_bytes());
    buffer.extend_from_slice(&number.to_ne_bytes());
    buffer.extend_from_slice(value);
    buffer.resize(buffer.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut buffer = Vec::new();
        push_attribute(&mut buffer, attribute::DEVICE_NAME, b"rxe0\0");
        push_attribute(&mut buffer, attribute::DEVICE_INDEX, &7u32.to_ne_bytes());
        assert_eq!(buffer.len(), 12 + 8);
        let attributes = Attributes(&buffer);
        assert_eq!(
            attributes.text(attribute::DEVICE_NAME).as_deref(),
            Some("rxe0")
        );
        assert_eq!(attributes.u32(attribute::DEVICE_INDEX), Some(7));
        assert_eq!(attributes.u32(attribute::PID), None);
    }

    #[test]
    fn nested_tables_are_walked() {
        let mut inner = Vec::new();
        push_attribute(&mut inner, attribute::PID, &99u32.to_ne_bytes());
        let mut table = Vec::new();
        push_attribute(&mut table, 31, &inner);
        push_attribute(&mut table, 31, &inner);
        let mut outer = Vec::new();
        push_attribute(&mut outer, 30, &table);
        let pids: Vec<_> = Attributes(&outer)
            .nested(30)
            .into_iter()
            .flat_map(Attributes::entries)
            .map(|entry| entry.u32(attribute::PID))
            .collect();
        assert_eq!(pids, [Some(99), Some(99)]);
    }

    #[test]
    fn truncated_attributes_end_the_walk() {
        let mut buffer = Vec::new();
        push_attribute(&mut buffer, attribute::DEVICE_INDEX, &7u32.to_ne_bytes());
        push_attribute(&mut buffer, attribute::PID, &8u32.to_ne_bytes());
        for length in 0..buffer.len() {
            assert!(
                Attributes(&buffer[..length]).iter().count() <= 1,
                "length {length}"
            );
        }
    }

    /// Values of an enumeration in a C header, by name.
    fn enumeration(header: &str, name: &str) -> HashMap<String, u16> {
        let start = header.find(&format!("enum {name} {{")).expect(name);
        let body = &header[start..];
        let body = &body[body.find('{').unwrap() + 1..body.find("};").unwrap()];
        let mut values = HashMap::new();
        let mut next = 0;
        // Comments hold no code; what stands before one ends with a comma.
        let code: String = body
            .split("/*")
            .map(|part| part.rsplit("*/").next().unwrap())
            .collect();
        for item in code
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
        {
            let (name, value) = match item.split_once('=') {
                None => (item, next),
                Some((name, value)) => {
                    let value = value.trim();
                    (name.trim(), value.parse().unwrap_or_else(|_| values[value]))
                }
            };
            values.insert(name.to_owned(), value);
            next = value + 1;
        }
        values
    }

    #[test]
    fn numbers_are_those_of_the_installed_header() {
        const HEADER: &str = "/usr/include/rdma/rdma_netlink.h";
        let Ok(header) = std::fs::read_to_string(HEADER) else {
            eprintln!("skipped: no {HEADER} (package linux-libc-dev)");
            return;
        };
        let attributes = enumeration(&header, "rdma_nldev_attr");
        for (name, number) in [
            ("DEV_INDEX", attribute::DEVICE_INDEX),
            ("DEV_NAME", attribute::DEVICE_NAME),
            ("RES_QP", attribute::QP_TABLE),
            ("RES_LQPN", attribute::LOCAL_QPN),
            ("RES_STATE", attribute::STATE),
            ("RES_PID", attribute::PID),
            ("RES_KERN_NAME", attribute::KERNEL_NAME),
            ("RES_CM_ID", attribute::CM_ID_TABLE),
            ("RES_SRC_ADDR", attribute::SOURCE_ADDRESS),
            ("RES_DST_ADDR", attribute::DESTINATION_ADDRESS),
            ("RES_CQ", attribute::CQ_TABLE),
            ("RES_MR", attribute::MR_TABLE),
            ("RES_PD", attribute::PD_TABLE),
            ("RES_PDN", attribute::PD_NUMBER),
            ("RES_CQN", attribute::CQ_NUMBER),
            ("RES_MRN", attribute::MR_NUMBER),
            ("RES_CM_IDN", attribute::CM_ID_NUMBER),
            ("RES_CTXN", attribute::CONTEXT_NUMBER),
            ("CHARDEV_TYPE", attribute::CHARDEV_TYPE),
            ("UVERBS_DRIVER_ID", attribute::UVERBS_DRIVER_ID),
            ("RES_CTX", attribute::CONTEXT_TABLE),
            ("RES_SRQ", attribute::SRQ_TABLE),
            ("RES_SRQN", attribute::SRQ_NUMBER),
        ] {
            assert_eq!(
                attributes[&format!("RDMA_NLDEV_ATTR_{name}")],
                number,
                "{name}"
            );
        }
        let commands = enumeration(&header, "rdma_nldev_command");
        for (name, command) in [
            ("GET", Command::DeviceGet),
            ("RES_QP_GET", Command::QueuePairs),
            ("RES_CM_ID_GET", Command::ConnectionIds),
            ("RES_CQ_GET", Command::CompletionQueues),
            ("RES_MR_GET", Command::MemoryRegions),
            ("RES_PD_GET", Command::ProtectionDomains),
            ("GET_CHARDEV", Command::CharacterDevice),
            ("RES_CTX_GET", Command::Contexts),
            ("RES_SRQ_GET", Command::SharedReceiveQueues),
        ] {
            assert_eq!(
                commands[&format!("RDMA_NLDEV_CMD_{name}")],
                command as u16,
                "{name}"
            );
        }
    }

    #[test]
    fn status_of_an_end_message() {
        assert_eq!(status(&(-22i32).to_ne_bytes()), -22);
        assert_eq!(status(&[]), 0);
    }
}
