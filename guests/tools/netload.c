/*
 * netload: throughput and round-trip time of TCP and of vsock (HOST is then "vsock": whoever runs
 * this machine), for benchmarks.
 *
 *   netload serve PORT [PATH]		answers until killed; prints "ready" first. TCP, vsock where
 *					there is one, and an AF_UNIX socket at PATH
 *   netload send HOST PORT SECONDS STREAMS	prints "tx_mb_s=N"
 *   netload recv HOST PORT SECONDS STREAMS	prints "rx_mb_s=N"
 *   netload ping HOST PORT COUNT		prints "rtt_p50_us=N" and "rtt_p99_us=N"
 *   netload usend HOST PORT SECONDS	UDP, frames of 64 bytes: prints "utx_kpps=N"
 *   netload urecv HOST PORT SECONDS	prints "urx_kpps=N"
 *
 * The first byte of a connection says what the client does: 's', 'r', 'p', 'S' or 'R'. Rates are
 * those the receiving side saw, in units of 10^6 bytes or 10^3 datagrams.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define PIECE (128 << 10)
#define DATAGRAM 18 /* a frame of 64 bytes with its checksum */
#define BATCH 64

static char piece[PIECE];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void no_delay(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

static void push(int fd, double until)
{
	while (now() < until)
		if (write(fd, piece, sizeof(piece)) < 0)
			return;
}

static uint64_t drain(int fd, double until)
{
	uint64_t total = 0;
	ssize_t n;

	while (now() < until && (n = read(fd, piece, sizeof(piece))) > 0)
		total += (uint64_t)n;
	return total;
}

/* Up to BATCH datagrams from or to a connected socket; how many. */
static int many(int fd, int sending, int flags)
{
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec iov = { piece, DATAGRAM };
	int n;

	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &iov;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	n = sending ? sendmmsg(fd, messages, BATCH, flags) :
		      recvmmsg(fd, messages, BATCH, flags, NULL);
	return n < 0 ? 0 : n;
}

/* Datagrams that come until `until`, or until the connection beside them ends. */
static uint64_t count_datagrams(int fd, int beside, double until)
{
	struct pollfd wait[2] = { { .fd = fd, .events = POLLIN }, { .fd = beside, .events = POLLIN } };
	uint64_t total = 0;

	while (now() < until && poll(wait, 2, 100) >= 0) {
		int n = wait[0].revents & POLLIN ? many(fd, 0, MSG_DONTWAIT) : 0;

		total += (uint64_t)n;
		if (!n && wait[1].revents)
			break;
	}
	return total;
}

static void flood(int fd, double until)
{
	while (now() < until)
		many(fd, 1, 0);
}

/* The server's side: where datagrams go is said over the connection, and who sends the first is
 * who they are for. */
static void answer_datagrams(int client, int sending)
{
	struct sockaddr_in at = { .sin_family = AF_INET }, peer;
	socklen_t size = sizeof(at), peer_size = sizeof(peer);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	uint64_t total;
	double seconds;

	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) ||
	    getsockname(fd, (struct sockaddr *)&at, &size) ||
	    read(client, &seconds, sizeof(seconds)) != sizeof(seconds) ||
	    write(client, &at.sin_port, sizeof(at.sin_port)) < 0 ||
	    recvfrom(fd, piece, DATAGRAM, 0, (struct sockaddr *)&peer, &peer_size) < 0 ||
	    connect(fd, (struct sockaddr *)&peer, peer_size) || write(client, "", 1) < 0)
		return;
	if (sending) {
		flood(fd, now() + seconds);
		return;
	}
	total = count_datagrams(fd, client, now() + 3600);
	if (write(client, &total, sizeof(total)) < 0)
		return;
}

/* One client: sinks and reports, sources, or echoes. */
static void answer(int fd)
{
	uint64_t total;
	double seconds;
	char what;

	no_delay(fd);
	if (read(fd, &what, 1) != 1)
		return;
	if (what == 's') {
		total = drain(fd, now() + 3600);
		if (write(fd, &total, sizeof(total)) < 0)
			return;
	} else if (what == 'r') {
		if (read(fd, &seconds, sizeof(seconds)) == sizeof(seconds))
			push(fd, now() + seconds);
	} else if (what == 'S' || what == 'R') {
		answer_datagrams(fd, what == 'R');
	} else {
		while (read(fd, &what, 1) == 1 && write(fd, &what, 1) == 1)
			;
	}
}

static void listen_at(int *fds, int *count, int family, const void *at, socklen_t size)
{
	int fd = socket(family, SOCK_STREAM, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, at, size) || listen(fd, 64)) {
		if (family != AF_VSOCK)
			fail("listen");
		close(fd);
		return;
	}
	fds[(*count)++] = fd;
}

static int serve(int port, const char *path)
{
	struct sockaddr_in tcp = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	struct sockaddr_vm vsock = { .svm_family = AF_VSOCK, .svm_port = (unsigned int)port,
				     .svm_cid = VMADDR_CID_ANY };
	struct sockaddr_un local = { .sun_family = AF_UNIX };
	struct pollfd wait[3];
	int fds[3], count = 0;

	listen_at(fds, &count, AF_INET, &tcp, sizeof(tcp));
	listen_at(fds, &count, AF_VSOCK, &vsock, sizeof(vsock));
	if (path) {
		snprintf(local.sun_path, sizeof(local.sun_path), "%s", path);
		listen_at(fds, &count, AF_UNIX, &local, sizeof(local));
	}
	for (int i = 0; i < count; i++)
		wait[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	signal(SIGCHLD, SIG_IGN);
	puts("ready");
	fflush(stdout);
	for (;;) {
		poll(wait, (nfds_t)count, -1);
		for (int i = 0; i < count; i++) {
			int client = wait[i].revents & POLLIN ? accept(fds[i], NULL, NULL) : -1;

			if (client < 0)
				continue;
			if (fork() == 0) {
				answer(client);
				_exit(0);
			}
			close(client);
		}
	}
}

static int dial(const char *host, int port)
{
	struct sockaddr_in tcp = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	struct sockaddr_vm vsock = { .svm_family = AF_VSOCK, .svm_port = (unsigned int)port,
				     .svm_cid = VMADDR_CID_HOST };
	const int over_vsock = !strcmp(host, "vsock");
	const void *to = over_vsock ? (const void *)&vsock : (const void *)&tcp;
	const socklen_t size = over_vsock ? sizeof(vsock) : sizeof(tcp);
	int fd = -1;

	if (!over_vsock && inet_pton(AF_INET, host, &tcp.sin_addr) != 1)
		fail(host);
	for (int turn = 0; turn < 100; turn++) {
		fd = socket(over_vsock ? AF_VSOCK : AF_INET, SOCK_STREAM, 0);
		if (connect(fd, to, size) == 0) {
			no_delay(fd);
			return fd;
		}
		close(fd);
		poll(NULL, 0, 50);
	}
	fail("connect");
	return -1;
}

/* One stream, in a child process: bytes per second the receiver saw. */
static double one_stream(const char *host, int port, double seconds, int sending)
{
	int fd = dial(host, port);
	double began = now();
	uint64_t total = 0;

	if (sending) {
		if (write(fd, "s", 1) != 1)
			fail("write");
		push(fd, began + seconds);
		shutdown(fd, SHUT_WR);
		if (recv(fd, &total, sizeof(total), MSG_WAITALL) != sizeof(total))
			fail("the receiver's count");
	} else {
		if (write(fd, "r", 1) != 1 || write(fd, &seconds, sizeof(seconds)) < 0)
			fail("write");
		total = drain(fd, began + seconds + 60);
	}
	return (double)total / (now() - began);
}

static int load(char **argv, int sending)
{
	const int streams = atoi(argv[5]);
	double sum = 0, rate;
	int result[2];

	if (pipe(result))
		fail("pipe");
	for (int i = 0; i < streams; i++) {
		if (fork() == 0) {
			rate = one_stream(argv[2], atoi(argv[3]), atof(argv[4]), sending);
			_exit(write(result[1], &rate, sizeof(rate)) != sizeof(rate));
		}
	}
	close(result[1]);
	for (int i = 0; i < streams; i++) {
		if (read(result[0], &rate, sizeof(rate)) != sizeof(rate))
			fail("a stream's rate");
		sum += rate;
	}
	printf("%s_mb_s=%.1f\n", sending ? "tx" : "rx", sum / 1e6);
	return 0;
}

static int by_size(const void *a, const void *b)
{
	const double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int ping(char **argv)
{
	const int count = atoi(argv[4]);
	double *took = calloc((size_t)count, sizeof(*took));
	int fd = dial(argv[2], atoi(argv[3]));
	char byte = 'p';

	if (!took || count < 1 || write(fd, &byte, 1) != 1)
		fail("ping");
	for (int i = 0; i < count; i++) {
		double began = now();

		if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
			fail("ping");
		took[i] = (now() - began) * 1e6;
	}
	qsort(took, (size_t)count, sizeof(*took), by_size);
	printf("rtt_p50_us=%.0f\nrtt_p99_us=%.0f\n", took[count / 2], took[count * 99 / 100]);
	return 0;
}

static int datagrams(char **argv, int sending)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int beside = dial(argv[2], atoi(argv[3])), fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct pollfd wait = { .fd = beside, .events = POLLIN };
	double seconds = atof(argv[4]), began;
	uint64_t total;
	char byte;

	if (write(beside, sending ? "S" : "R", 1) != 1 ||
	    write(beside, &seconds, sizeof(seconds)) < 0 ||
	    read(beside, &to.sin_port, sizeof(to.sin_port)) != sizeof(to.sin_port) ||
	    inet_pton(AF_INET, argv[2], &to.sin_addr) != 1 ||
	    connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail("the server's port");
	do /* the first may be lost: whoever has to find the way drops some */
		many(fd, 1, 0);
	while (poll(&wait, 1, 200) == 0);
	if (read(beside, &byte, 1) != 1)
		fail("the server's answer");
	began = now();
	if (sending) {
		flood(fd, began + seconds);
		shutdown(beside, SHUT_WR);
		if (recv(beside, &total, sizeof(total), MSG_WAITALL) != sizeof(total))
			fail("the receiver's count");
	} else {
		total = count_datagrams(fd, beside, began + seconds + 60);
	}
	printf("%s_kpps=%.1f\n", sending ? "utx" : "urx", (double)total / seconds / 1e3);
	return 0;
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if ((argc == 3 || argc == 4) && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]), argc == 4 ? argv[3] : NULL);
	if (argc == 6 && !strcmp(argv[1], "send"))
		return load(argv, 1);
	if (argc == 6 && !strcmp(argv[1], "recv"))
		return load(argv, 0);
	if (argc == 5 && !strcmp(argv[1], "ping"))
		return ping(argv);
	if (argc == 5 && !strcmp(argv[1], "usend"))
		return datagrams(argv, 1);
	if (argc == 5 && !strcmp(argv[1], "urecv"))
		return datagrams(argv, 0);
	fprintf(stderr, "usage: netload serve PORT [PATH] | send|recv HOST PORT SECONDS STREAMS"
			" | ping HOST PORT COUNT"
			" | usend|urecv HOST PORT SECONDS\n");
	return 2;
}
