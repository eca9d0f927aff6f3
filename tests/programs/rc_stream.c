/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "rc_traffic.h"

/* Every fourth operation is a message, so a window of operations always has one: only a message
 * makes the receiver look. */
enum kind kind_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number)
{
	static const enum kind any[] = { SEND, SEND_IMM, WRITE_IMM, WRITE,
					 WRITE, READ,	  FETCH_ADD, CMP_SWAP };
	uint64_t choice = key_of(traffic->options.seed, from * MAX_QPS + qp, number, 'k') >> 8;

	return any[number % 4 == 3 ? choice % 3 : choice % 8];
}

uint32_t length_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number)
{
	uint64_t choice = key_of(traffic->options.seed, from * MAX_QPS + qp, number, 'l');
	uint32_t size = choice >> 32;

	switch (choice % 16) {
	case 0:
		return 0;
	case 1 ... 8:
		return 1 + size % 64;
	case 9 ... 14:
		return 1 + size % 1024;
	default:
		return 1 + size % traffic->options.max_size;
	}
}

uint64_t content_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number)
{
	return key_of(traffic->options.seed, from * MAX_QPS + qp, number, 'c');
}

uint32_t immediate_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number)
{
	return key_of(traffic->options.seed, from * MAX_QPS + qp, number, 'i') & ~LAST_FLAG;
}

uint64_t counter_start(const struct traffic *traffic, int owner, uint32_t index)
{
	return key_of(traffic->options.seed, owner, index, 'a');
}

uint64_t library_key(const struct traffic *traffic, int owner, uint32_t page)
{
	return key_of(traffic->options.seed, owner, page, 'r');
}

uint64_t proof_of(uint64_t verified)
{
	return mix(verified ^ 0x61636b);
}

size_t buffer_size(const struct traffic *traffic)
{
	return traffic->options.max_size + MAX_SGE * GAP;
}

size_t slot_offset(const struct traffic *traffic, uint32_t qp, uint64_t number)
{
	const struct options *options = &traffic->options;

	return (qp * options->window + number % options->window) * buffer_size(traffic);
}

size_t acknowledgement_offset(const struct traffic *traffic, uint32_t qp)
{
	const struct options *options = &traffic->options;

	return options->qps * options->window * buffer_size(traffic) +
	       qp * sizeof(struct acknowledgement);
}
