/*
 * Prints the layout facts of one rdma-core release that the provider depends on, one `key=value` a line.
 * Compiled by check-against-sources.sh against that release's own headers.
 */
#include <config.h>
#include <infiniband/driver.h>
#include <stdio.h>
#include <stddef.h>

#define SIZE(type) printf("size.%s=%zu\n", #type, sizeof(struct type))
#define OFFSET(type, member) printf("offset.%s.%s=%zu\n", #type, #member, offsetof(struct type, member))
#define PROTOTYPE(function, type)                                                                                     \
	_Static_assert(__builtin_types_compatible_p(typeof(&function), type), "prototype of " #function " changed")

/* What the provider calls. */
PROTOTYPE(verbs_register_driver, void (*)(const struct verbs_device_ops *));
PROTOTYPE(_verbs_init_and_alloc_context,
	  void *(*)(struct ibv_device *, int, size_t, struct verbs_context *, uint32_t));
PROTOTYPE(verbs_set_ops, void (*)(struct verbs_context *, const struct verbs_context_ops *));
PROTOTYPE(verbs_uninit_context, void (*)(struct verbs_context *));

int main(void)
{
	SIZE(verbs_context_ops);

	SIZE(verbs_context);
	OFFSET(verbs_context, priv);
	OFFSET(verbs_context, sz);
	OFFSET(verbs_context, context);

	SIZE(verbs_qp);
	OFFSET(verbs_qp, comp_mask);
	OFFSET(verbs_qp, xrcd);
	SIZE(ibv_qp_ex);
	OFFSET(ibv_qp_ex, wr_id);

	SIZE(verbs_device);
	OFFSET(verbs_device, device);
	OFFSET(verbs_device, ops);
	OFFSET(verbs_device, refcount);
	OFFSET(verbs_device, entry);
	OFFSET(verbs_device, sysfs);
	OFFSET(verbs_device, core_support);

	SIZE(verbs_device_ops);
	OFFSET(verbs_device_ops, name);
	OFFSET(verbs_device_ops, match_min_abi_version);
	OFFSET(verbs_device_ops, match_max_abi_version);
	OFFSET(verbs_device_ops, match_table);
	OFFSET(verbs_device_ops, static_providers);
	OFFSET(verbs_device_ops, match_device);
	OFFSET(verbs_device_ops, alloc_context);
	OFFSET(verbs_device_ops, import_context);
	OFFSET(verbs_device_ops, alloc_device);
	OFFSET(verbs_device_ops, uninit_device);

	SIZE(verbs_match_ent);
	OFFSET(verbs_match_ent, driver_data);
	OFFSET(verbs_match_ent, u);
	OFFSET(verbs_match_ent, vendor);
	OFFSET(verbs_match_ent, device);
	OFFSET(verbs_match_ent, kind);
	printf("value.VERBS_MATCH_SENTINEL=%d\n", VERBS_MATCH_SENTINEL);
	printf("value.VERBS_MATCH_MODALIAS=%d\n", VERBS_MATCH_MODALIAS);
	printf("value.VERBS_MATCH_DRIVER_ID=%d\n", VERBS_MATCH_DRIVER_ID);

	SIZE(verbs_sysfs_dev);
	OFFSET(verbs_sysfs_dev, entry);
	OFFSET(verbs_sysfs_dev, provider_data);
	OFFSET(verbs_sysfs_dev, match);
	OFFSET(verbs_sysfs_dev, flags);
	OFFSET(verbs_sysfs_dev, sysfs_name);
	OFFSET(verbs_sysfs_dev, sysfs_cdev);
	OFFSET(verbs_sysfs_dev, ibdev_name);
	OFFSET(verbs_sysfs_dev, ibdev_path);
	OFFSET(verbs_sysfs_dev, modalias);
	OFFSET(verbs_sysfs_dev, node_guid);
	OFFSET(verbs_sysfs_dev, driver_id);
	OFFSET(verbs_sysfs_dev, node_type);
	OFFSET(verbs_sysfs_dev, ibdev_idx);
	OFFSET(verbs_sysfs_dev, num_ports);
	OFFSET(verbs_sysfs_dev, abi_ver);

	SIZE(verbs_srq);
	OFFSET(verbs_srq, srq_type);
	OFFSET(verbs_srq, xrcd);
	OFFSET(verbs_srq, cq);
	OFFSET(verbs_srq, srq_num);
	SIZE(verbs_mr);
	OFFSET(verbs_mr, mr_type);
	OFFSET(verbs_mr, access);
	SIZE(verbs_cq);
	SIZE(verbs_xrcd);
	OFFSET(verbs_xrcd, comp_mask);
	OFFSET(verbs_xrcd, handle);
	printf("value.VERBS_QP_XRCD=%d\n", VERBS_QP_XRCD);
	printf("value.VERBS_QP_EX=%d\n", VERBS_QP_EX);
	printf("value.IBV_MR_TYPE_MR=%d\n", IBV_MR_TYPE_MR);

	/* Public types that travel through the slots. */
	SIZE(ibv_ah);
	SIZE(ibv_ah_attr);
	SIZE(ibv_async_event);
	SIZE(ibv_comp_channel);
	SIZE(ibv_context);
	OFFSET(ibv_context, ops);
	OFFSET(ibv_context, cmd_fd);
	OFFSET(ibv_context, async_fd);
	OFFSET(ibv_context, num_comp_vectors);
	OFFSET(ibv_context, mutex);
	OFFSET(ibv_context, abi_compat);
	SIZE(ibv_cq);
	SIZE(ibv_cq_ex);
	SIZE(ibv_cq_init_attr_ex);
	SIZE(ibv_device);
	SIZE(ibv_device_attr);
	SIZE(ibv_device_attr_ex);
	SIZE(ibv_ece);
	SIZE(ibv_modify_cq_attr);
	SIZE(ibv_mr);
	SIZE(ibv_mw);
	SIZE(ibv_mw_bind);
	SIZE(ibv_parent_domain_init_attr);
	SIZE(ibv_pd);
	SIZE(ibv_port_attr);
	SIZE(ibv_qp);
	SIZE(ibv_qp_attr);
	SIZE(ibv_qp_init_attr);
	SIZE(ibv_qp_init_attr_ex);
	SIZE(ibv_recv_wr);
	SIZE(ibv_send_wr);
	SIZE(ibv_sge);
	SIZE(ibv_srq);
	SIZE(ibv_srq_attr);
	SIZE(ibv_srq_init_attr);
	SIZE(ibv_srq_init_attr_ex);
	SIZE(ibv_td_init_attr);
	SIZE(ibv_wc);
	return 0;
}
