/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * holds: keeps hold of something that a checkpoint has to treat with care, beside a program that runs.
 *
 *   holds uverbs|sysv|console|deleted PROGRAM [ARGUMENT...]
 *
 *   uverbs   /dev/infiniband/uverbs0, opened past libibverbs
 *   sysv     a mapped System V shared memory segment
 *   console  a terminal that nobody in the job serves
 *   deleted  a file without a name, whose content is checked at the end
 *
 * SIGTERM is passed on to the program. The exit status is the program's; 1 where the content is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS 20000

static pid_t program;

static _Noreturn void give_up(const char *what)
{
	perror(what);
	exit(1);
}

static void pass_on(int number)
{
	kill(program, number);
}

static void hold_segment(void)
{
	int id = shmget(IPC_PRIVATE, 4096, 0600);

	if (id < 0 || shmat(id, NULL, 0) == (void *)-1)
		give_up("System V shared memory");
	/* It goes with its last user. */
	shmctl(id, IPC_RMID, NULL);
}

static int hold_deleted(void)
{
	char name[] = "/tmp/holds-XXXXXX";
	int file = mkostemp(name, O_CLOEXEC);

	if (file < 0 || unlink(name))
		give_up(name);
	for (uint32_t i = 0; i < WORDS; i++)
		if (write(file, &i, sizeof(i)) != sizeof(i))
			give_up("write");
	return file;
}

static int check_deleted(int file)
{
	uint32_t word;

	for (uint32_t i = 0; i < WORDS; i++) {
		if (pread(file, &word, sizeof(word), i * sizeof(word)) != sizeof(word) || word != i) {
			fprintf(stderr, "ERROR word %u of the deleted file is wrong\n", i);
			return 1;
		}
	}
	return pread(file, &word, 1, WORDS * sizeof(word)) != 0;
}

int main(int count, char **arguments)
{
	const char *what = count > 2 ? arguments[1] : "";
	int deleted = -1, status;

	if (!strcmp(what, "uverbs")) {
		if (open("/dev/infiniband/uverbs0", O_RDWR | O_CLOEXEC) < 0)
			give_up("/dev/infiniband/uverbs0");
	} else if (!strcmp(what, "console")) {
		if (open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC) < 0)
			give_up("/dev/console");
	} else if (!strcmp(what, "sysv")) {
		hold_segment();
	} else if (!strcmp(what, "deleted")) {
		deleted = hold_deleted();
	} else {
		fprintf(stderr, "usage: holds uverbs|sysv|console|deleted PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	program = fork();
	if (program == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execv(arguments[2], arguments + 2);
		give_up(arguments[2]);
	}
	if (program < 0)
		give_up("fork");
	signal(SIGTERM, pass_on);
	while (waitpid(program, &status, 0) != program)
		;
	if (deleted >= 0 && check_deleted(deleted))
		return 1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
