/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "matrix.h"

#include <inttypes.h>
#include <stdio.h>

bool is_reliable(enum transport transport)
{
	return transport == RC || transport == SRQ;
}

/* Every fourth operation is a message, so a window of operations always has one: only a message
 * makes the receiver look. */
enum kind kind_of(enum transport transport, uint64_t key, uint64_t number)
{
	static const enum kind any[] = { SEND,	SEND_IMM, WRITE_IMM, WRITE,
					 WRITE, READ,	  FETCH_ADD, CMP_SWAP };
	uint64_t choice = key_of(key, number, 'k', 0) >> 8;

	if (transport == UD)
		return any[choice % 2];
	if (number % 4 == 3)
		return any[choice % 3];
	return any[choice % (transport == UC ? 4 : 8)];
}

uint32_t length_of(enum transport transport, uint64_t key, uint64_t number)
{
	uint32_t largest = transport == UD ? UD_LARGEST : matrix.options.max_size;
	uint64_t choice = key_of(key, number, 'l', 0);
	enum kind kind = kind_of(transport, key, number);
	uint32_t size = choice >> 32, least = sizeof(struct header);

	if (kind == FETCH_ADD || kind == CMP_SWAP)
		return 8;
	if (kind != SEND && kind != SEND_IMM)
		least = 0;
	switch (choice % 8) {
	case 0:
		return least;
	case 1 ... 4:
		return least + size % (64 - least + 1);
	case 5 ... 6:
		return least + size % 1000;
	default:
		return least + size % (largest - least + 1);
	}
}

uint64_t content_of(uint64_t key, uint64_t number)
{
	return key_of(key, number, 'c', 0);
}

/* The place and the lower bits of the number can be had back by one who knows the key. */
uint32_t immediate_of(uint64_t key, uint32_t place, uint64_t number)
{
	return (place << 24 | (number & 0xffffff)) ^ (uint32_t)key;
}

uint64_t library_key(uint32_t owner)
{
	return key_of(matrix.options.seed, owner, 'r', 0);
}

uint64_t first_ticket(uint32_t owner)
{
	return key_of(matrix.options.seed, owner, 't', 0);
}

uint64_t first_count(uint32_t owner, uint32_t lane)
{
	return key_of(matrix.options.seed, owner, lane, 'a');
}

size_t stride(void)
{
	return GRH_BYTES + matrix.options.max_size + MAX_SGE * GAP;
}

size_t slot_offset(uint32_t lane, uint64_t number)
{
	uint32_t window = matrix.options.window;

	return (lane * SLOTS + number % SLOTS) * stride();
}

unsigned char *ring_buffer(const struct region *region, const struct lane *lane, uint64_t number)
{
	return region->bytes + (lane->index * SEND_DEPTH + number % SEND_DEPTH) * stride();
}

const char *describe(const struct lane *lane, const char *what, uint64_t number)
{
	static const char *const transports[] = { "RC", "UC", "UD", "SRQ" };
	static __thread char text[160];

	snprintf(text, sizeof(text), "%s lane %u to process %u (QP 0x%x, place %u): %s %" PRIu64,
		 transports[lane->endpoint->transport], lane->index, lane->endpoint->peer,
		 lane->endpoint->qp->qp_num, lane->place, what, number);
	return text;
}

uint32_t most_missing(const struct poller *poller)
{
	return poller->concurrent ? (matrix.options.threads - 1) * BATCH : 0;
}
