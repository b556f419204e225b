/* Copies standard input to a vsock connection and the connection to standard output, each until it
 * ends: `vsock connect CID PORT`, `vsock listen PORT` (one connection). */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void die(const char *what)
{
	fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Moves what there is from one to the other: 0 at its end. */
static int move(int from, int to, const char *what)
{
	static char buf[256 * 1024];
	ssize_t n = read(from, buf, sizeof(buf));

	if (n < 0)
		die(what);
	for (ssize_t done = 0; done < n;) {
		const ssize_t m = write(to, buf + done, (size_t)(n - done));

		if (m < 0)
			die(what);
		done += m;
	}
	return n > 0;
}

static void copy(int sock)
{
	struct pollfd fds[2] = { { .fd = 0, .events = POLLIN }, { .fd = sock, .events = POLLIN } };

	while (fds[0].fd >= 0 || fds[1].fd >= 0) {
		if (poll(fds, 2, -1) < 0)
			die("poll");
		if (fds[0].revents && !move(0, sock, "to the host")) {
			fds[0].fd = -1;
			shutdown(sock, SHUT_WR);
		}
		if (fds[1].revents && !move(sock, 1, "from the host"))
			fds[1].fd = -1;
	}
}

static unsigned int number(const char *text)
{
	return (unsigned int)strtoul(text, NULL, 10);
}

int main(int argc, char **argv)
{
	struct sockaddr_vm addr = { .svm_family = AF_VSOCK };
	int sock = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (sock < 0)
		die("socket");
	if (argc == 4 && !strcmp(argv[1], "connect")) {
		addr.svm_cid = number(argv[2]);
		addr.svm_port = number(argv[3]);
		if (connect(sock, (struct sockaddr *)&addr, sizeof(addr)))
			die("connect");
	} else if (argc == 3 && !strcmp(argv[1], "listen")) {
		addr.svm_cid = VMADDR_CID_ANY;
		addr.svm_port = number(argv[2]);
		if (bind(sock, (struct sockaddr *)&addr, sizeof(addr)) || listen(sock, 1))
			die("listen");
		sock = accept(sock, NULL, NULL);
		if (sock < 0)
			die("accept");
	} else {
		fprintf(stderr, "usage: vsock connect CID PORT | vsock listen PORT\n");
		return 2;
	}
	copy(sock);
	return 0;
}
