/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The main function; see facts.h.
 */
#define _GNU_SOURCE
#include "facts.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ NULL, 0, NULL, 0 },
	};
	struct facts facts = { .gid_index = 1 };
	const char *device = "rxe0";
	int option;

	while ((option = getopt_long(count, arguments, "", names, NULL)) != -1) {
		if (option == 'd')
			device = optarg;
		else if (option == 'g')
			facts.gid_index = number("gid-index", optarg);
		else
			exit(2);
	}
	open_facts(&facts, device);
	queries(&facts);
	creation(&facts);
	destruction(&facts);
	states(&facts);
	memory(&facts);
	chains(&facts);
	overflow(&facts);
	empty_messages(&facts);
	refused_posts(&facts);
	errors(&facts);
	events(&facts);
	shared_receive_queue(&facts);
	optional_verbs(&facts);
	return close_facts(&facts);
}
