/* The virtio-serial ports: finding them by name, and writing to the one for control. */
#define _GNU_SOURCE
#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PORT_WAIT_MS 20000

int ctl_fd = -1;

void ctl_send(const char *fmt, ...)
{
	char text[600];
	va_list ap;
	int len;

	va_start(ap, fmt);
	len = vsnprintf(text, sizeof(text) - 1, fmt, ap);
	va_end(ap);
	if (len < 0)
		return;
	if (len > (int)sizeof(text) - 2)
		len = sizeof(text) - 2;
	text[len++] = '\n';
	for (int done = 0; done < len;) {
		ssize_t put = write(ctl_fd, text + done, len - done);

		if (put > 0)
			done += put;
		else if (put < 0 && errno == EAGAIN)
			poll(&(struct pollfd){ .fd = ctl_fd, .events = POLLOUT }, 1, 100);
		else if (put < 0 && errno != EINTR)
			return; /* the host is gone: there is nobody to tell */
	}
}

/* Looks through /sys for the port of this name; fills the path of its node. */
static bool port_find(const char *name, char *path, size_t size)
{
	DIR *dir = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	bool found = false;

	while (dir && !found && (entry = readdir(dir))) {
		char file[300], text[100] = "";
		int fd;

		snprintf(file, sizeof(file), "/sys/class/virtio-ports/%s/name", entry->d_name);
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (read(fd, text, sizeof(text) - 1) > 0) {
			text[strcspn(text, "\n")] = '\0';
			found = strcmp(text, name) == 0;
		}
		close(fd);
		if (found)
			snprintf(path, size, "/dev/%s", entry->d_name);
	}
	if (dir)
		closedir(dir);
	return found;
}

int port_open(const char *prefix, const char *name)
{
	char full[100], path[300];
	int fd = -1;

	snprintf(full, sizeof(full), "%s%s", prefix, name);
	for (int left = PORT_WAIT_MS; left > 0; left--) {
		if (fd < 0 && port_find(full, path, sizeof(path)))
			fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (fd >= 0) {
			struct pollfd p = { .fd = fd, .events = POLLOUT };

			if (poll(&p, 1, 0) >= 0 && !(p.revents & POLLHUP))
				return fd;
		}
		poll(NULL, 0, 1);
	}
	die("the virtio-serial port %s did not appear", full);
}

/* Reads exactly `size` bytes from the control port, waiting as long as the host is there. */
static void ctl_read(char *buf, size_t size)
{
	struct pollfd p = { .fd = ctl_fd, .events = POLLIN };

	while (size > 0) {
		ssize_t got = read(ctl_fd, buf, size);

		if (got > 0) {
			buf += got;
			size -= got;
			continue;
		}
		poll(&p, 1, -1);
		if ((p.revents & POLLHUP) && !(p.revents & POLLIN))
			die("the host closed the control port");
	}
}

char *ctl_read_plan(size_t *size)
{
	char line[64] = "", *plan;
	size_t len;

	/* Other lines were for a command that has ended. */
	while (sscanf(line, "plan %zu", size) != 1) {
		len = 0;
		do {
			ctl_read(line + len, 1);
		} while (line[len] != '\n' && ++len < sizeof(line) - 1);
		line[len] = '\0';
	}
	plan = malloc(*size + 1);
	if (!plan)
		die("out of memory");
	ctl_read(plan, *size);
	plan[*size] = '\0';
	return plan;
}
