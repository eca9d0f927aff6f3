//! The members of `struct verbs_context_ops` by release.
//!
//! rdma-core keeps that structure sorted by name and has only ever added to it, so a release's list is the older one with
//! the new names merged in.

/// Releases 36 to 58.
pub(super) const SLOTS_36: [&str; 76] = [
    "advise_mr",
    "alloc_dm",
    "alloc_mw",
    "alloc_null_mr",
    "alloc_parent_domain",
    "alloc_pd",
    "alloc_td",
    "async_event",
    "attach_counters_point_flow",
    "attach_mcast",
    "bind_mw",
    "close_xrcd",
    "cq_event",
    "create_ah",
    "create_counters",
    "create_cq",
    "create_cq_ex",
    "create_flow",
    "create_flow_action_esp",
    "create_qp",
    "create_qp_ex",
    "create_rwq_ind_table",
    "create_srq",
    "create_srq_ex",
    "create_wq",
    "dealloc_mw",
    "dealloc_pd",
    "dealloc_td",
    "dereg_mr",
    "destroy_ah",
    "destroy_counters",
    "destroy_cq",
    "destroy_flow",
    "destroy_flow_action",
    "destroy_qp",
    "destroy_rwq_ind_table",
    "destroy_srq",
    "destroy_wq",
    "detach_mcast",
    "free_context",
    "free_dm",
    "get_srq_num",
    "import_dm",
    "import_mr",
    "import_pd",
    "modify_cq",
    "modify_flow_action_esp",
    "modify_qp",
    "modify_qp_rate_limit",
    "modify_srq",
    "modify_wq",
    "open_qp",
    "open_xrcd",
    "poll_cq",
    "post_recv",
    "post_send",
    "post_srq_ops",
    "post_srq_recv",
    "query_device_ex",
    "query_ece",
    "query_port",
    "query_qp",
    "query_qp_data_in_order",
    "query_rt_values",
    "query_srq",
    "read_counters",
    "reg_dm_mr",
    "reg_dmabuf_mr",
    "reg_mr",
    "req_notify_cq",
    "rereg_mr",
    "resize_cq",
    "set_ece",
    "unimport_dm",
    "unimport_mr",
    "unimport_pd",
];

/// Releases 59 to 61: DMA handles.
pub(super) const SLOTS_59: [&str; 79] =
    merged(&SLOTS_36, &["alloc_dmah", "dealloc_dmah", "reg_mr_ex"]);

/// Releases 62 and 63: device memory as DMA-buf, port speed.
pub(super) const SLOTS_62: [&str; 81] =
    merged(&SLOTS_59, &["dm_export_dmabuf_fd", "query_port_speed"]);

/// Release 64: buffers.
pub(super) const SLOTS_64: [&str; 83] = merged(&SLOTS_62, &["alloc_buf", "free_buf"]);

/// Release 65: completion counters.
pub(super) const SLOTS_65: [&str; 93] = merged(
    &SLOTS_64,
    &[
        "create_comp_cntr",
        "destroy_comp_cntr",
        "inc_comp_cntr",
        "inc_err_comp_cntr",
        "qp_attach_comp_cntr",
        "query_comp_cntr_caps",
        "read_comp_cntr",
        "read_err_comp_cntr",
        "set_comp_cntr",
        "set_err_comp_cntr",
    ],
);

/// Two sorted lists as one sorted list.
const fn merged<const OLD: usize, const ADDED: usize, const ALL: usize>(
    old: &[&'static str; OLD],
    added: &[&'static str; ADDED],
) -> [&'static str; ALL] {
    assert!(OLD + ADDED == ALL);
    let mut all = [""; ALL];
    let (mut from_old, mut from_added) = (0, 0);
    while from_old + from_added < ALL {
        let take_added =
            from_old == OLD || (from_added < ADDED && precedes(added[from_added], old[from_old]));
        let next = from_old + from_added;
        if take_added {
            all[next] = added[from_added];
            from_added += 1;
        } else {
            all[next] = old[from_old];
            from_old += 1;
        }
    }
    all
}

/// Byte order, which is how rdma-core sorts (`str`'s own comparison is not const).
const fn precedes(left: &str, right: &str) -> bool {
    let (left, right) = (left.as_bytes(), right.as_bytes());
    let mut index = 0;
    while index < left.len() && index < right.len() {
        if left[index] != right[index] {
            return left[index] < right[index];
        }
        index += 1;
    }
    left.len() < right.len()
}
