/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "handles.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Everything that ibv_query_qp can be asked for. */
#define EVERY_ATTRIBUTE 0x1fffff

static void same(uint64_t now, uint64_t seen, const char *object, unsigned int index,
		 const char *field)
{
	if (now != seen)
		fail("%s %u: %s is 0x%" PRIx64 ", was first seen as 0x%" PRIx64, object, index,
		     field, now, seen);
}

static void same_bytes(const void *now, const void *seen, size_t length, const char *what)
{
	const unsigned char *a = now, *b = seen;

	for (size_t i = 0; i < length; i++)
		if (a[i] != b[i])
			fail("%s: byte %zu is 0x%02x, was first seen as 0x%02x", what, i, a[i],
			     b[i]);
}

/* The field of an object now, and as first seen. */
#define SAME(watched, name, index, field)                                                          \
	same((uintptr_t)(watched)->object->field, (uintptr_t)(watched)->seen.field, name, index,   \
	     #field)

/* Adds an object to its list. */
#define WATCH(list, count, pointer)                                                                \
	do {                                                                                       \
		if ((count) == WATCHED)                                                            \
			fail("more than %d objects of a kind to watch", WATCHED);                  \
		(list)[count].object = (pointer);                                                  \
		(list)[count].seen = *(pointer);                                                   \
		(count)++;                                                                         \
	} while (0)

static void ask_device(struct ibv_context *context, struct ibv_device_attr *attributes)
{
	memset(attributes, 0, sizeof(*attributes));
	if (ibv_query_device(context, attributes))
		fail("ibv_query_device: %s", strerror(errno));
}

static void ask_port(struct ibv_context *context, struct ibv_port_attr *attributes)
{
	memset(attributes, 0, sizeof(*attributes));
	if (ibv_query_port(context, 1, attributes))
		fail("ibv_query_port: %s", strerror(errno));
}

static void ask_addresses(struct handles *handles, union ibv_gid *gid, struct ibv_gid_entry *entry,
			  ssize_t *count, __be16 *pkey)
{
	struct ibv_gid_entry table[256];

	if (ibv_query_gid(handles->context, 1, handles->gid_index, gid))
		fail("ibv_query_gid: %s", strerror(errno));
	memset(entry, 0, sizeof(*entry));
	if (ibv_query_gid_ex(handles->context, 1, handles->gid_index, entry, 0))
		fail("ibv_query_gid_ex: %s", strerror(errno));
	*count = ibv_query_gid_table(handles->context, table, 256, 0);
	if (*count < 0)
		fail("ibv_query_gid_table: %zd", *count);
	if (ibv_query_pkey(handles->context, 1, 0, pkey))
		fail("ibv_query_pkey: %s", strerror(errno));
}

void watch_device(struct handles *handles, struct ibv_context *context, uint32_t gid_index)
{
	int flags = fcntl(context->async_fd, F_GETFL);

	handles->context = context;
	handles->context_seen = *context;
	handles->gid_index = gid_index;
	snprintf(handles->name, sizeof(handles->name), "%s", ibv_get_device_name(context->device));
	handles->guid = ibv_get_device_guid(context->device);
	ask_device(context, &handles->device);
	ask_port(context, &handles->port);
	ask_addresses(handles, &handles->gid, &handles->entry, &handles->gid_count,
		      &handles->pkey);
	if (flags < 0 || fcntl(context->async_fd, F_SETFL, flags | O_NONBLOCK))
		fail("async event fd %d: %s", context->async_fd, strerror(errno));
}

static void ask_qp(struct ibv_qp *qp, struct ibv_qp_attr *attributes, struct ibv_qp_init_attr *init)
{
	int result;

	memset(attributes, 0, sizeof(*attributes));
	memset(init, 0, sizeof(*init));
	result = ibv_query_qp(qp, attributes, EVERY_ATTRIBUTE, init);
	if (result)
		fail("ibv_query_qp of 0x%x: %s", qp->qp_num, strerror(result));
}

void watch_qp(struct handles *handles, struct ibv_qp *qp)
{
	WATCH(handles->qp, handles->qps, qp);
	ask_qp(qp, &handles->qp[handles->qps - 1].attributes, &handles->qp[handles->qps - 1].init);
}

void watch_mr(struct handles *handles, struct ibv_mr *mr)
{
	WATCH(handles->mr, handles->mrs, mr);
}

void watch_cq(struct handles *handles, struct ibv_cq *cq)
{
	WATCH(handles->cq, handles->cqs, cq);
}

void watch_srq(struct handles *handles, struct ibv_srq *srq)
{
	WATCH(handles->srq, handles->srqs, srq);
	if (ibv_query_srq(srq, &handles->srq[handles->srqs - 1].attributes))
		fail("ibv_query_srq: %s", strerror(errno));
}

void watch_ah(struct handles *handles, struct ibv_ah *ah)
{
	WATCH(handles->ah, handles->ahs, ah);
}

void watch_channel(struct handles *handles, struct ibv_comp_channel *channel)
{
	WATCH(handles->channel, handles->channels, channel);
}

void watch_pd(struct handles *handles, struct ibv_pd *pd)
{
	WATCH(handles->pd, handles->pds, pd);
}

static void check_device(struct handles *handles)
{
	struct ibv_context *context = handles->context;
	struct ibv_device_attr device;
	struct ibv_port_attr port;
	struct ibv_gid_entry entry;
	union ibv_gid gid;
	ssize_t gid_count;
	__be16 pkey;

	same((uintptr_t)context->device, (uintptr_t)handles->context_seen.device, "context", 0,
	     "device");
	same(context->cmd_fd, handles->context_seen.cmd_fd, "context", 0, "cmd_fd");
	same(context->async_fd, handles->context_seen.async_fd, "context", 0, "async_fd");
	same(context->num_comp_vectors, handles->context_seen.num_comp_vectors, "context", 0,
	     "num_comp_vectors");
	same(ibv_get_device_guid(context->device), handles->guid, "device", 0, "guid");
	if (strcmp(ibv_get_device_name(context->device), handles->name))
		fail("the device is called %s, was first seen as %s",
		     ibv_get_device_name(context->device), handles->name);
	ask_device(context, &device);
	same_bytes(&device, &handles->device, sizeof(device), "ibv_query_device");
	ask_port(context, &port);
	same_bytes(&port, &handles->port, sizeof(port), "ibv_query_port");
	ask_addresses(handles, &gid, &entry, &gid_count, &pkey);
	same_bytes(&gid, &handles->gid, sizeof(gid), "ibv_query_gid");
	same_bytes(&entry.gid, &handles->entry.gid, sizeof(entry.gid), "ibv_query_gid_ex");
	same(entry.gid_index, handles->entry.gid_index, "gid entry", 0, "gid_index");
	same(entry.gid_type, handles->entry.gid_type, "gid entry", 0, "gid_type");
	same(gid_count, handles->gid_count, "gid table", 0, "entries");
	same(pkey, handles->pkey, "pkey", 0, "value");
}

static void check_events(struct ibv_context *context)
{
	struct ibv_async_event event;

	if (ibv_get_async_event(context, &event) == 0)
		fail("asynchronous event %d (%s)", event.event_type,
		     ibv_event_type_str(event.event_type));
	if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
		fail("ibv_get_async_event: %s", strerror(errno));
}

/* An answer of ibv_query_qp now, and as first seen. The packet numbers are not compared: they move
 * with the traffic. */
#define SAME_ANSWER(field)                                                                         \
	same(now.field, watched->attributes.field, "ibv_query_qp of QP", index, #field)

static void check_qp(const struct watched_qp *watched, unsigned int index)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr now;

	SAME(watched, "QP", index, context);
	SAME(watched, "QP", index, qp_context);
	SAME(watched, "QP", index, pd);
	SAME(watched, "QP", index, send_cq);
	SAME(watched, "QP", index, recv_cq);
	SAME(watched, "QP", index, srq);
	SAME(watched, "QP", index, handle);
	SAME(watched, "QP", index, qp_num);
	SAME(watched, "QP", index, state);
	SAME(watched, "QP", index, qp_type);
	ask_qp(watched->object, &now, &init);
	SAME_ANSWER(qp_state);
	SAME_ANSWER(path_mtu);
	SAME_ANSWER(qkey);
	SAME_ANSWER(dest_qp_num);
	SAME_ANSWER(qp_access_flags);
	SAME_ANSWER(cap.max_send_wr);
	SAME_ANSWER(cap.max_recv_wr);
	SAME_ANSWER(cap.max_send_sge);
	SAME_ANSWER(cap.max_recv_sge);
	SAME_ANSWER(cap.max_inline_data);
	SAME_ANSWER(ah_attr.dlid);
	SAME_ANSWER(ah_attr.sl);
	SAME_ANSWER(ah_attr.is_global);
	SAME_ANSWER(ah_attr.port_num);
	SAME_ANSWER(ah_attr.grh.sgid_index);
	SAME_ANSWER(ah_attr.grh.hop_limit);
	SAME_ANSWER(ah_attr.grh.traffic_class);
	SAME_ANSWER(ah_attr.grh.flow_label);
	same_bytes(&now.ah_attr.grh.dgid, &watched->attributes.ah_attr.grh.dgid, 16,
		   "dgid of a QP");
	SAME_ANSWER(pkey_index);
	SAME_ANSWER(max_rd_atomic);
	SAME_ANSWER(max_dest_rd_atomic);
	SAME_ANSWER(min_rnr_timer);
	SAME_ANSWER(port_num);
	SAME_ANSWER(timeout);
	SAME_ANSWER(retry_cnt);
	SAME_ANSWER(rnr_retry);
	same((uintptr_t)init.send_cq, (uintptr_t)watched->init.send_cq, "QP", index,
	     "send_cq of the query");
	same((uintptr_t)init.recv_cq, (uintptr_t)watched->init.recv_cq, "QP", index,
	     "recv_cq of the query");
	same((uintptr_t)init.srq, (uintptr_t)watched->init.srq, "QP", index, "srq of the query");
	same((uintptr_t)init.qp_context, (uintptr_t)watched->init.qp_context, "QP", index,
	     "qp_context of the query");
	same(init.qp_type, watched->init.qp_type, "QP", index, "qp_type of the query");
	same(init.sq_sig_all, watched->init.sq_sig_all, "QP", index, "sq_sig_all of the query");
}

static void check_memory_and_queues(struct handles *handles)
{
	for (unsigned int i = 0; i < handles->mrs; i++) {
		SAME(&handles->mr[i], "MR", i, context);
		SAME(&handles->mr[i], "MR", i, pd);
		SAME(&handles->mr[i], "MR", i, addr);
		SAME(&handles->mr[i], "MR", i, length);
		SAME(&handles->mr[i], "MR", i, handle);
		SAME(&handles->mr[i], "MR", i, lkey);
		SAME(&handles->mr[i], "MR", i, rkey);
	}
	for (unsigned int i = 0; i < handles->cqs; i++) {
		SAME(&handles->cq[i], "CQ", i, context);
		SAME(&handles->cq[i], "CQ", i, channel);
		SAME(&handles->cq[i], "CQ", i, cq_context);
		SAME(&handles->cq[i], "CQ", i, handle);
		SAME(&handles->cq[i], "CQ", i, cqe);
	}
	for (unsigned int i = 0; i < handles->srqs; i++) {
		struct ibv_srq_attr now;

		SAME(&handles->srq[i], "SRQ", i, context);
		SAME(&handles->srq[i], "SRQ", i, srq_context);
		SAME(&handles->srq[i], "SRQ", i, pd);
		SAME(&handles->srq[i], "SRQ", i, handle);
		if (ibv_query_srq(handles->srq[i].object, &now))
			fail("ibv_query_srq: %s", strerror(errno));
		same(now.max_wr, handles->srq[i].attributes.max_wr, "SRQ", i, "max_wr");
		same(now.max_sge, handles->srq[i].attributes.max_sge, "SRQ", i, "max_sge");
	}
}

void check_handles(struct handles *handles)
{
	check_device(handles);
	for (unsigned int i = 0; i < handles->qps; i++)
		check_qp(&handles->qp[i], i);
	check_memory_and_queues(handles);
	for (unsigned int i = 0; i < handles->ahs; i++) {
		SAME(&handles->ah[i], "AH", i, context);
		SAME(&handles->ah[i], "AH", i, pd);
		SAME(&handles->ah[i], "AH", i, handle);
	}
	for (unsigned int i = 0; i < handles->channels; i++) {
		SAME(&handles->channel[i], "channel", i, context);
		SAME(&handles->channel[i], "channel", i, fd);
	}
	for (unsigned int i = 0; i < handles->pds; i++) {
		SAME(&handles->pd[i], "PD", i, context);
		SAME(&handles->pd[i], "PD", i, handle);
	}
	check_events(handles->context);
	handles->checks++;
}
