/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "messages.h"

#include <string.h>

static const enum ibv_wr_opcode opcode[KINDS] = {
	[SEND] = IBV_WR_SEND,
	[SEND_IMM] = IBV_WR_SEND_WITH_IMM,
	[WRITE] = IBV_WR_RDMA_WRITE,
	[WRITE_IMM] = IBV_WR_RDMA_WRITE_WITH_IMM,
	[READ] = IBV_WR_RDMA_READ,
	[FETCH_ADD] = IBV_WR_ATOMIC_FETCH_AND_ADD,
	[CMP_SWAP] = IBV_WR_ATOMIC_CMP_AND_SWP,
	[ACK] = IBV_WR_RDMA_WRITE,
};

const enum ibv_wc_opcode completed_as[KINDS] = {
	[SEND] = IBV_WC_SEND,	      [SEND_IMM] = IBV_WC_SEND,
	[WRITE] = IBV_WC_RDMA_WRITE,  [WRITE_IMM] = IBV_WC_RDMA_WRITE,
	[READ] = IBV_WC_RDMA_READ,    [FETCH_ADD] = IBV_WC_FETCH_ADD,
	[CMP_SWAP] = IBV_WC_COMP_SWAP, [ACK] = IBV_WC_RDMA_WRITE,
};

const char *const kind_name[KINDS] = { "send", "send_imm",  "write",	"write_imm",
				       "read", "fetch_add", "cmp_swap", "ack" };

bool is_message(enum kind kind)
{
	return kind == SEND || kind == SEND_IMM || kind == WRITE_IMM;
}

void make_layout(uint64_t *random, struct layout *layout, uint32_t length, uint32_t most)
{
	uint32_t pieces = length ? 1 + roll(random, most) : 0;

	if (pieces > length)
		pieces = length;
	layout->pieces = pieces;
	for (uint32_t i = 0; i < pieces; i++) {
		uint32_t after = pieces - i - 1;

		layout->length[i] = after ? 1 + roll(random, length - after) : length;
		length -= layout->length[i];
	}
}

uint32_t make_sges(const struct layout *layout, struct ibv_sge *sges, void *buffer, uint32_t key)
{
	uintptr_t address = (uintptr_t)buffer;

	for (uint32_t i = 0; i < layout->pieces; i++) {
		sges[i] = (struct ibv_sge){ address, layout->length[i], key };
		address += layout->length[i] + GAP;
	}
	return layout->pieces;
}

void gather(const struct layout *layout, unsigned char *buffer, unsigned char *to, uint32_t length,
	    const char *what)
{
	for (uint32_t i = 0; i < layout->pieces; i++) {
		uint32_t part = length < layout->length[i] ? length : layout->length[i];

		memcpy(to, buffer, part);
		poison(buffer, part);
		check_poison(buffer + part, layout->length[i] - part + GAP, what);
		buffer += layout->length[i] + GAP;
		to += part;
		length -= part;
	}
}

struct ibv_send_wr *extend(struct chain *chain, enum kind kind, uint64_t id)
{
	struct ibv_send_wr *wr = &chain->wr[chain->length];

	*wr = (struct ibv_send_wr){
		.wr_id = id,
		.opcode = opcode[kind],
		.sg_list = chain->sge[chain->length],
	};
	if (chain->length)
		chain->wr[chain->length - 1].next = wr;
	chain->length++;
	return wr;
}

void scatter(const struct ibv_send_wr *wr, const unsigned char *content)
{
	for (int i = 0; i < wr->num_sge; i++) {
		memcpy((void *)(uintptr_t)wr->sg_list[i].addr, content, wr->sg_list[i].length);
		content += wr->sg_list[i].length;
	}
}

void spoil(struct chain *chain)
{
	memset(chain->small, 0x5A, sizeof(chain->small));
	chain->length = 0;
}
