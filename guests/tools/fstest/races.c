/* Many processes at once. */
#include "fstest.h"

#define WORKERS 4
#define ROUNDS 40

static int start_line[2];

/* All workers begin together; each exits with what fn says. The sum of that. */
static int together(int (*fn)(int nr))
{
	pid_t pids[WORKERS];
	int sum = 0, status;
	char byte;

	OK(pipe(start_line));
	for (int i = 0; i < WORKERS; i++) {
		pids[i] = fork();
		CHECK(pids[i] >= 0);
		if (!pids[i]) {
			close(start_line[1]);
			if (read(start_line[0], &byte, 1))
				_exit(100);
			_exit(fn(i));
		}
	}
	close(start_line[1]);
	for (int i = 0; i < WORKERS; i++) {
		CHECK(waitpid(pids[i], &status, 0) == pids[i]);
		CHECK(WIFEXITED(status));
		sum += WEXITSTATUS(status);
	}
	return sum;
}

static int append(int nr)
{
	char line[40];
	const int fd = open("log", O_WRONLY | O_APPEND);

	OK(fd);
	for (int i = 0; i < ROUNDS; i++) {
		const int n = snprintf(line, sizeof(line), "%d %05d ......................\n", nr, i);

		CHECK(write(fd, line, (size_t)n) == n);
	}
	return 0;
}

static void appenders(const void *row)
{
	int next[WORKERS] = { 0 }, nr, at;
	char line[100];
	FILE *f;

	(void)row;
	make("log", 0, 1);
	CHECK(!together(append));
	f = fopen("log", "r");
	CHECK(f);
	while (fgets(line, sizeof(line), f)) {
		CHECK(sscanf(line, "%d %d ......................", &nr, &at) == 2);
		CHECK(nr >= 0 && nr < WORKERS && next[nr]++ == at);
	}
	for (int i = 0; i < WORKERS; i++)
		CHECK(next[i] == ROUNDS);
}

static int create_each(int nr)
{
	char name[20];
	int won = 0;

	(void)nr;
	for (int i = 0; i < 20; i++) {
		int fd;

		snprintf(name, sizeof(name), "new%d", i);
		fd = open(name, O_CREAT | O_EXCL | O_RDWR, 0644);
		won += fd >= 0;
		if (fd < 0 && errno != EEXIST)
			return 100;
		close(fd);
	}
	return won;
}

static int mkdir_each(int nr)
{
	char name[20];
	int won = 0;

	(void)nr;
	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "new%d", i);
		won += !mkdir(name, 0755);
	}
	return won;
}

static int link_each(int nr)
{
	char name[20];
	int won = 0;

	(void)nr;
	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "new%d", i);
		won += !link("file", name);
	}
	return won;
}

static int rename_each(int nr)
{
	char name[20], to[30];
	int won = 0;

	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "old%d", i);
		snprintf(to, sizeof(to), "to%d.%d", i, nr);
		won += !rename(name, to);
	}
	return won;
}

static int unlink_each(int nr)
{
	char name[20];
	int won = 0;

	(void)nr;
	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "old%d", i);
		won += !unlink(name);
	}
	return won;
}

static void one_wins(const void *row)
{
	int (*const *fn)(int) = row;
	char name[20];

	make("file", 1, 1);
	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "old%d", i);
		make(name, 1, 1);
	}
	CHECK(together(*fn) == 20);
}

static int come_and_go(int nr)
{
	char name[20];

	for (int i = 0; i < ROUNDS; i++) {
		snprintf(name, sizeof(name), "f%d", (nr + i) % 3);
		const int fd = open(name, O_CREAT | O_RDWR, 0644);

		if (fd >= 0) {
			if (pwrite(fd, "x", 1, nr) != 1)
				return 1;
			close(fd);
		} else if (errno != ENOENT && errno != ESTALE) {
			return 2;
		}
		if (i % 3 == 0)
			unlink(name);
		if (i % 3 == 1)
			rename(name, "g");
	}
	return 0;
}

static void churn(const void *row)
{
	(void)row;
	CHECK(!together(come_and_go));
}

static int replace(int nr)
{
	char name[20], byte;

	snprintf(name, sizeof(name), "tmp%d", nr);
	for (int i = 0; i < ROUNDS; i++) {
		int fd;

		if (nr < 2) {
			make(name, 100, nr);
			if (rename(name, "it"))
				return 1;
			continue;
		}
		/* Readers always find one, and a whole one. */
		fd = open("it", O_RDONLY);
		if (fd < 0 || pread(fd, &byte, 1, 99) != 1)
			return 2;
		close(fd);
	}
	return 0;
}

static void replaced(const void *row)
{
	(void)row;
	make("it", 100, 0);
	CHECK(!together(replace));
}

static int own_blocks(int nr)
{
	uint8_t block[4096];
	const int fd = open("file", O_RDWR);

	OK(fd);
	memset(block, nr + 1, sizeof(block));
	for (int i = nr; i < 200; i += WORKERS)
		CHECK(pwrite(fd, block, sizeof(block), i * 4096) == 4096);
	return 0;
}

static void parts_of_one_file(const void *row)
{
	uint8_t block[4096];
	int fd;

	(void)row;
	make("file", 0, 1);
	CHECK(!together(own_blocks));
	OK(fd = open("file", O_RDONLY));
	for (int i = 0; i < 200; i++) {
		CHECK(pread(fd, block, 4096, i * 4096) == 4096);
		CHECK(block[0] == i % WORKERS + 1 && block[4095] == i % WORKERS + 1);
	}
}

void races(void)
{
	static int (*const games[])(int) = { create_each, mkdir_each, link_each, rename_each,
					     unlink_each };
	static const char *const game_names[] = { "create", "mkdir", "link", "rename", "unlink" };

	run("many append", appenders, NULL);
	for (size_t i = 0; i < COUNT(games); i++)
		runf(one_wins, &games[i], "one wins: %s", game_names[i]);
	run("files come and go", churn, NULL);
	run("a file replaced under readers", replaced, NULL);
	run("many write one file", parts_of_one_file, NULL);
}
