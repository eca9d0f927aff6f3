/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The second way to do what ibv_create_cq, ibv_poll_cq, ibv_create_qp and ibv_post_send do: extended
 * objects, completions that are read field by field, requests that are built piece by piece.
 */
#ifndef REVERBS_TESTS_EXTENDED_H
#define REVERBS_TESTS_EXTENDED_H

#include "common.h"

struct ibv_cq *extended_cq(struct ibv_context *context, uint32_t entries, void *cq_context,
			   struct ibv_comp_channel *channel);
/* With all operations that the transport has. */
struct ibv_qp *extended_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init);
/* As ibv_poll_cq. */
int extended_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc);
/* A chain as one batch. What is refused is refused as a whole. */
int extended_post(struct ibv_qp *qp, const struct ibv_send_wr *wr);

#endif
