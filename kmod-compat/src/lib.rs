//! Everything about the kernel side of RDMA.
