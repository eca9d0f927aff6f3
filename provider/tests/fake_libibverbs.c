/*
 * A libibverbs of any release, as far as registering a driver and opening one device goes: it says on stdout what the
 * driver did. Built by load.rs with SUFFIX, CONTEXT_OFFSET and a version script.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

struct match_entry {
	void *driver_data;
	uint64_t driver_id;
	uint16_t vendor, device;
	uint8_t kind;
};

struct driver {
	const char *name;
	uint32_t least_abi, greatest_abi;
	const struct match_entry *table;
	void *static_providers, *match_device;
	void *(*alloc_context)(void *device, int cmd_fd, void *private_data);
	void *import_context;
	void *(*alloc_device)(void *sysfs);
	void (*uninit_device)(void *device);
};

static const struct driver *registered;

void PASTE(verbs_register_driver_, SUFFIX)(const struct driver *driver)
{
	registered = driver;
	printf("registered %s\n", driver->name);
}

void *_verbs_init_and_alloc_context(void *device, int cmd_fd, size_t size, void *offset, uint32_t driver_id)
{
	char *context = calloc(1, size);

	printf("context of %zu bytes at %zu for driver %u\n", size, (size_t)offset, driver_id);
	memcpy(context + CONTEXT_OFFSET, &device, sizeof(device));
	*(int *)(context + CONTEXT_OFFSET + 264) = cmd_fd;
	*(int *)(context + CONTEXT_OFFSET + 268) = -1;
	return context;
}

void verbs_set_ops(void *context, void *const *operations)
{
	printf("operations\n");
}

void verbs_uninit_context(void *context)
{
	printf("closing: %d\n", close(*(int *)((char *)context + CONTEXT_OFFSET + 264)));
}

/* What libibverbs does with the device it has found (try_driver, verbs_open_device), for a device of driver 15. */
void fake_open(void)
{
	char *sysfs = calloc(1, 992), *device;
	const struct match_entry *entry;
	int cmd_fd;

	if (!registered)
		return;
	for (entry = registered->table; entry->kind; entry++)
		if (entry->kind == 3 && entry->driver_id == 15)
			printf("claims driver 15\n");
	strcpy(sysfs + 112, "fake0");
	*(uint32_t *)(sysfs + 952) = 15;
	device = registered->alloc_device(sysfs);
	memcpy(device + 664, &registered, sizeof(registered));
	memcpy(device + 696, &sysfs, sizeof(sysfs));
	cmd_fd = open("/dev/null", O_RDWR);
	printf("alloc_context: %s\n", registered->alloc_context(device, cmd_fd, NULL) ? "context" : "null");
	printf("descriptor: %s\n", fcntl(cmd_fd, F_GETFD) < 0 ? "closed" : "open");
	registered->uninit_device(device);
	fflush(stdout);
}

#define PUBLIC(name) void name(void) {}
PUBLIC(ibv_get_device_list)
PUBLIC(ibv_query_qp_data_in_order)
PUBLIC(ibv_alloc_dmah)
PUBLIC(ibv_dm_export_dmabuf_fd)
PUBLIC(ibv_alloc_buf)
PUBLIC(_ibv_query_comp_cntr_caps)
