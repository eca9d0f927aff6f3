//! `reverbs fits`: does a device offer what the objects of a job ask of theirs?
//!
//! The node part of a restart asks in a process of its own, since libibverbs loads the vendors' libraries into it, and not ours.

use std::ffi::{CStr, CString, c_void};
use std::process::ExitCode;

use anyhow::{Context, Result};
use libloading::Library;
use rdma_core_sys::{
    IBV_ATOMIC_NONE, IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, ibv_context, ibv_device_attr, ibv_qp_cap,
    ibv_qp_init_attr,
};
use reverbs::control::needs::{Needs, QueuePairNeeds};
use reverbs::device::{self, Verbs};
use reverbs::errno::Errno;

/// Another library in the place of libibverbs, as in the provider.
const LIBRARY: &str = "REVERBS_LIBIBVERBS";

/// Reads a list of [`Needs`] from standard input, and writes the list of what `device` lacks, in words.
///
/// # Errors
/// It cannot be found out.
#[expect(clippy::print_stdout)]
pub(crate) fn fits(device: &str) -> Result<ExitCode> {
    let needs: Vec<Needs> = serde_json::from_reader(std::io::stdin().lock())?;
    let verbs = load()?;
    let name = CString::new(device)?;
    let context = verbs
        .open(&name)
        .with_context(|| format!("cannot open device {device}"))?;
    let mut lacks = Vec::new();
    let limits = Limits::of(context)?;
    for needs in &needs {
        lacks.extend(limits.shortfalls(needs));
        if lacks.is_empty() {
            // Not all limits can be asked for.
            lacks.extend(try_queue_pairs(&verbs, context, needs)?);
        }
    }
    lacks.dedup();
    println!("{}", serde_json::to_string(&lacks)?);
    Ok(ExitCode::SUCCESS)
}

fn load() -> Result<Verbs> {
    let name = std::env::var_os(LIBRARY).unwrap_or_else(|| "libibverbs.so.1".into());
    // SAFETY: its constructors are those of libibverbs.
    let library = unsafe { Library::new(&name) }.context("this node has no libibverbs")?;
    let library: &'static Library = Box::leak(Box::new(library));
    let find = |name: &CStr| {
        // SAFETY: only the address is taken.
        let found = unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) };
        found.ok().map(|address| *address)
    };
    // SAFETY: names resolve to the verbs they name; the library is never closed.
    unsafe { Verbs::load(find, libc::__errno_location) }
        .map_err(|missing| anyhow::anyhow!("the libibverbs of this node has no {missing}"))
}

/// What a device says of itself.
struct Limits {
    device: ibv_device_attr,
    /// Bytes of the largest packet, by port from 1.
    mtus: Vec<u32>,
}

impl Limits {
    fn of(context: *mut ibv_context) -> Result<Self> {
        // SAFETY: the context is open.
        let device = unsafe { device::attributes(context) }
            .context("ibv_query_device")?
            .orig_attr;
        let mut mtus = Vec::new();
        for number in 1..=device.phys_port_cnt {
            // SAFETY: as above.
            let port = unsafe { device::port_attributes(context, number) };
            mtus.push(1 << device::mtu_bits(&port.context("ibv_query_port")?));
        }
        Ok(Self { device, mtus })
    }

    /// What is asked for beyond the limits.
    fn shortfalls(&self, needs: &Needs) -> Vec<String> {
        let device = &self.device;
        let most = |of: fn(&QueuePairNeeds) -> u32| {
            let asked = needs.queue_pairs.iter().map(of);
            u64::from(asked.max().unwrap_or(0))
        };
        let number = |limit: i32| u64::try_from(limit).unwrap_or(0);
        let requests = most(|pair| pair.send_requests.max(pair.receive_requests));
        let elements = most(|pair| pair.send_elements.max(pair.receive_elements));
        let asked = most(|pair| pair.reads_asked.into());
        let answered = most(|pair| pair.reads_answered.into());
        let wanted = [
            (
                "requests in a queue",
                "max_qp_wr",
                requests,
                number(device.max_qp_wr),
            ),
            (
                "elements in a request",
                "max_sge",
                elements,
                number(device.max_sge),
            ),
            (
                "entries in a completion queue",
                "max_cqe",
                needs.completions.into(),
                number(device.max_cqe),
            ),
            (
                "requests in a shared receive queue",
                "max_srq_wr",
                needs.shared_requests.into(),
                number(device.max_srq_wr),
            ),
            (
                "elements in a request of a shared receive queue",
                "max_srq_sge",
                needs.shared_elements.into(),
                number(device.max_srq_sge),
            ),
            (
                "bytes in a memory region",
                "max_mr_size",
                needs.region_bytes,
                device.max_mr_size,
            ),
            (
                "reads and atomics under way from a queue pair",
                "max_qp_init_rd_atom",
                asked,
                number(device.max_qp_init_rd_atom),
            ),
            (
                "reads and atomics under way to a queue pair",
                "max_qp_rd_atom",
                answered,
                number(device.max_qp_rd_atom),
            ),
        ];
        let mut lacks: Vec<String> = wanted
            .into_iter()
            .filter(|(_, _, wanted, limit)| wanted > limit)
            .map(|(what, name, wanted, limit)| format!("{wanted} {what} ({name} is {limit})"))
            .collect();
        if needs.atomics && device.atomic_cap == IBV_ATOMIC_NONE {
            lacks.push("atomics (atomic_cap is none)".to_owned());
        }
        let mut ports: Vec<u32> = needs.sources.iter().map(|source| source.port).collect();
        ports.dedup();
        if ports.is_empty() {
            ports.push(1);
        }
        for port in ports {
            match self.mtus.get(port.saturating_sub(1) as usize) {
                None => lacks.push(format!("a port {port}")),
                Some(mtu) if *mtu < needs.datagram_bytes => lacks.push(format!(
                    "datagrams of {} bytes (active_mtu of port {port} is {mtu})",
                    needs.datagram_bytes
                )),
                Some(_) => {}
            }
        }
        lacks
    }
}

/// Makes one queue pair of each kind.
fn try_queue_pairs(
    verbs: &Verbs,
    context: *mut ibv_context,
    needs: &Needs,
) -> Result<Option<String>> {
    // SAFETY: everything is made here, of an open context, and is given back in the opposite order.
    unsafe {
        let domain = verbs.pointer((verbs.ibv_alloc_pd)(context));
        let domain = domain.context("ibv_alloc_pd")?;
        let null = std::ptr::null_mut();
        let queue = verbs.pointer((verbs.ibv_create_cq)(context, 1, null, null.cast(), 0));
        let queue = queue.context("ibv_create_cq")?;
        let mut lacks = None;
        for pair in &needs.queue_pairs {
            let mut init: ibv_qp_init_attr = std::mem::zeroed();
            (init.send_cq, init.recv_cq) = (queue, queue);
            init.qp_type = match &*pair.transport {
                "RC" => IBV_QPT_RC,
                "UC" => IBV_QPT_UC,
                _ => IBV_QPT_UD,
            };
            init.cap = capacity(pair);
            match verbs.pointer((verbs.ibv_create_qp)(domain, &raw mut init)) {
                Ok(made) => {
                    (verbs.ibv_destroy_qp)(made);
                    if init.cap.max_inline_data >= pair.inline_bytes {
                        continue;
                    }
                    lacks = Some(lacks_pair(pair, &Errno::NOT_SUPPORTED));
                }
                Err(error) => lacks = Some(lacks_pair(pair, &error)),
            }
            break;
        }
        (verbs.ibv_destroy_cq)(queue);
        (verbs.ibv_dealloc_pd)(domain);
        Ok(lacks)
    }
}

fn capacity(pair: &QueuePairNeeds) -> ibv_qp_cap {
    ibv_qp_cap {
        max_send_wr: pair.send_requests,
        max_recv_wr: pair.receive_requests,
        max_send_sge: pair.send_elements,
        max_recv_sge: pair.receive_elements,
        max_inline_data: pair.inline_bytes,
    }
}

fn lacks_pair(pair: &QueuePairNeeds, error: &Errno) -> String {
    format!(
        "{} queue pairs for {} and {} requests of {} and {} elements, {} bytes inline ({error})",
        pair.transport,
        pair.send_requests,
        pair.receive_requests,
        pair.send_elements,
        pair.receive_elements,
        pair.inline_bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        // SAFETY: plain numbers.
        let mut device: ibv_device_attr = unsafe { std::mem::zeroed() };
        (device.max_qp_wr, device.max_sge, device.max_cqe) = (1024, 4, 4096);
        (device.max_srq_wr, device.max_srq_sge) = (512, 2);
        (device.max_qp_init_rd_atom, device.max_qp_rd_atom) = (8, 16);
        (device.max_mr_size, device.atomic_cap) = (1 << 30, IBV_ATOMIC_NONE);
        Limits {
            device,
            mtus: vec![1024],
        }
    }

    fn needs() -> Needs {
        Needs {
            queue_pairs: vec![QueuePairNeeds {
                transport: "RC".into(),
                send_requests: 1024,
                receive_requests: 1,
                send_elements: 1,
                receive_elements: 4,
                inline_bytes: 1 << 20,
                reads_asked: 8,
                reads_answered: 16,
            }],
            completions: 4096,
            shared_requests: 512,
            shared_elements: 2,
            region_bytes: 1 << 30,
            atomics: false,
            datagram_bytes: 1024,
            sources: vec![],
        }
    }

    #[test]
    fn what_is_just_enough_is_enough() {
        assert_eq!(limits().shortfalls(&needs()), [""; 0]);
    }

    #[test]
    fn each_limit_is_named_with_what_is_asked() {
        let mut more = needs();
        (
            more.queue_pairs[0].send_requests,
            more.queue_pairs[0].receive_elements,
        ) = (1025, 5);
        (
            more.queue_pairs[0].reads_asked,
            more.queue_pairs[0].reads_answered,
        ) = (9, 17);
        (more.completions, more.shared_requests, more.shared_elements) = (4097, 513, 3);
        (more.region_bytes, more.atomics, more.datagram_bytes) = ((1 << 30) + 1, true, 4096);
        let said = limits().shortfalls(&more).join("; ");
        for part in [
            "1025 requests in a queue (max_qp_wr is 1024)",
            "max_sge is 4",
            "max_qp_init_rd_atom is 8",
            "max_qp_rd_atom is 16",
            "max_cqe is 4096",
            "max_srq_wr is 512",
            "max_srq_sge is 2",
            "max_mr_size is 1073741824",
            "atomic_cap is none",
            "datagrams of 4096 bytes (active_mtu of port 1 is 1024)",
        ] {
            assert!(said.contains(part), "no \"{part}\" in: {said}");
        }
    }
}
