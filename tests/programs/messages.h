/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What the traffic programs send: kinds of operations, and messages scattered over a buffer.
 */
#ifndef REVERBS_TESTS_MESSAGES_H
#define REVERBS_TESTS_MESSAGES_H

#include "common.h"

#define MAX_SGE 4
/* Bytes left unused between the pieces of a scattered message. */
#define GAP 16
#define MAX_CHAIN 8
#define MAX_INLINE 128

/* ACK is a WRITE by which a receiver says how far it is. */
enum kind { SEND, SEND_IMM, WRITE, WRITE_IMM, READ, FETCH_ADD, CMP_SWAP, ACK, KINDS };

/* Indexed by kind. */
extern const enum ibv_wc_opcode completed_as[KINDS];
extern const char *const kind_name[KINDS];

/* Whether the receiver gets a completion. */
bool is_message(enum kind kind);

/* Where the bytes of a message lie: pieces in one buffer, with gaps. */
struct layout {
	uint32_t pieces;
	uint32_t length[MAX_SGE];
};

/* Cuts so many bytes into at most `most` pieces of random lengths. */
void make_layout(uint64_t *random, struct layout *layout, uint32_t length, uint32_t most);

uint32_t make_sges(const struct layout *layout, struct ibv_sge *sges, void *buffer, uint32_t key);

/* Puts the first `length` bytes of what lies in a buffer together, poisons them there, and checks
 * that nobody has written behind them or into the gaps. */
void gather(const struct layout *layout, unsigned char *buffer, unsigned char *to, uint32_t length,
	    const char *what);

/* A chain of work requests on its way to ibv_post_send. */
struct chain {
	uint32_t length;
	struct ibv_send_wr wr[MAX_CHAIN];
	struct ibv_sge sge[MAX_CHAIN][MAX_SGE];
	/* Inline content lies in memory that is not registered and is overwritten after posting. */
	unsigned char small[MAX_CHAIN][MAX_INLINE + MAX_SGE * GAP];
};

/* Starts the next work request of a chain. */
struct ibv_send_wr *extend(struct chain *chain, enum kind kind, uint64_t id);

/* Puts content where the elements of a work request say. */
void scatter(const struct ibv_send_wr *wr, const unsigned char *content);

/* To be called when the chain was posted: spoils the inline content. */
void spoil(struct chain *chain);

#endif
