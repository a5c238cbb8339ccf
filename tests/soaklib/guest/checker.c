/*
 * Uses a disk and checks every sector that it reads.
 *
 *   checker sum FILE                prints the digest of a raw image
 *   checker use DISK SEED THREADS   reads, writes, zeroes, discards and flushes
 *                                   until standard input ends
 *
 * Each block of 4 KiB belongs to one thread: only that writes it, and knows what
 * it has to contain, by a hash of each sector. Threads take turns on the CPUs, so
 * that a disk with a queue for each CPU is used through all of them.
 *
 * What is said begins with @@, on a line of its own:
 *   begin DIGEST    what the disk contained at first
 *   done N          so many operations have ended
 *   rest DIGEST     no operation is under way, all of the disk was read
 *   wrong TEXT      a sector has other content than it has to
 *   fail TEXT       an operation failed
 *
 * Commands on standard input: p (come to rest), r (go on).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    SECTOR = 512,
    WORDS = SECTOR / 8,
    BLOCK_SECTORS = 8,          /* of 4 KiB */
    MOST_BLOCKS = 64,           /* of one request */
    MOST_THREADS = 64,
    BUFFER = 1 << 20,
    MOST_REPORTS = 20,
};

static int disk;
static uint64_t sectors;
static uint64_t *expected;      /* a hash for each sector */
static uint64_t zero_hash;
static unsigned int thread_count;

static atomic_ulong operations;
static atomic_uint reports;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool resting;
static unsigned int at_work;

__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...)
{
    va_list arguments;

    flockfile(stdout);
    va_start(arguments, format);
    fputs("@@ ", stdout);
    vprintf(format, arguments);
    putchar('\n');
    fflush(stdout);
    va_end(arguments);
    funlockfile(stdout);
}

static void fail(const char *what, uint64_t sector, uint64_t count)
{
    say("fail %s of %" PRIu64 " sectors at %" PRIu64 ": %s", what, count, sector,
        strerror(errno));
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint64_t hash(const uint64_t *words, uint64_t count)
{
    uint64_t value = 1469598103934665603u;

    for (uint64_t i = 0; i < count; i++) {
        value = (value ^ words[i]) * 1099511628211u;
        value ^= value >> 29;
    }
    return value;
}

static void check(uint64_t sector, const uint64_t *words)
{
    if (hash(words, WORDS) != expected[sector] &&
        atomic_fetch_add(&reports, 1) < MOST_REPORTS) {
        say("wrong sector %" PRIu64 ": %016" PRIx64 " %016" PRIx64 "...", sector,
            words[0], words[1]);
    }
}

/* Reads all of the disk, to know or to check it; returns the digest. */
static uint64_t read_all(bool known)
{
    uint64_t *words = aligned_alloc(4096, BUFFER);
    uint64_t count;

    for (uint64_t sector = 0; sector < sectors; sector += count) {
        count = BUFFER / SECTOR;
        if (count > sectors - sector) {
            count = sectors - sector;
        }
        if (pread(disk, words, count * SECTOR, sector * SECTOR) !=
            (ssize_t)(count * SECTOR)) {
            fail("read", sector, count);
            break;
        }
        for (uint64_t i = 0; i < count; i++) {
            if (known) {
                check(sector + i, words + i * WORDS);
            } else {
                expected[sector + i] = hash(words + i * WORDS, WORDS);
            }
        }
    }
    free(words);
    return hash(expected, sectors);
}

/* One operation of a thread, which has `words` for data. */
static void operate(uint64_t *state, unsigned int self, uint64_t *words)
{
    uint64_t blocks = sectors / BLOCK_SECTORS;
    uint64_t block = next(state) % blocks;
    unsigned int kind = next(state) % 100;
    uint64_t sector, count, range[2];

    if (kind < 50) {
        /* Anybody's blocks are read, one's own are checked. */
        count = 1 + next(state) % (next(state) % 8 ? 8 : MOST_BLOCKS);
        if (count > blocks - block) {
            count = blocks - block;
        }
        sector = block * BLOCK_SECTORS;
        if (pread(disk, words, count * BLOCK_SECTORS * SECTOR, sector * SECTOR) !=
            (ssize_t)(count * BLOCK_SECTORS * SECTOR)) {
            fail("read", sector, count * BLOCK_SECTORS);
            return;
        }
        for (uint64_t i = 0; i < count * BLOCK_SECTORS; i++) {
            if ((sector + i) / BLOCK_SECTORS % thread_count == self) {
                check(sector + i, words + i * WORDS);
            }
        }
        return;
    }
    if (kind < 52) {
        if (fsync(disk)) {
            fail("flush", 0, 0);
        }
        return;
    }

    block = block - block % thread_count + self;
    if (block >= blocks) {
        return;
    }
    sector = block * BLOCK_SECTORS;
    count = BLOCK_SECTORS;
    if (next(state) % 4 == 0) {
        uint64_t skipped = next(state) % BLOCK_SECTORS;
        sector += skipped;
        count = 1 + next(state) % (BLOCK_SECTORS - skipped);
    }
    range[0] = sector * SECTOR;
    range[1] = count * SECTOR;
    if (kind < 84) {
        for (uint64_t i = 0; i < count * WORDS; i++) {
            words[i] = next(state);
        }
        if (pwrite(disk, words, range[1], range[0]) != (ssize_t)range[1]) {
            fail("write", sector, count);
            return;
        }
        for (uint64_t i = 0; i < count; i++) {
            expected[sector + i] = hash(words + i * WORDS, WORDS);
        }
    } else if (kind < 92) {
        if (ioctl(disk, BLKZEROOUT, range)) {
            fail("zeroing", sector, count);
            return;
        }
        for (uint64_t i = 0; i < count; i++) {
            expected[sector + i] = zero_hash;
        }
    } else {
        /* May make zeroes, or leave what was there. */
        if (ioctl(disk, BLKDISCARD, range)) {
            fail("discard", sector, count);
            return;
        }
        if (pread(disk, words, range[1], range[0]) != (ssize_t)range[1]) {
            fail("read after a discard", sector, count);
            return;
        }
        for (uint64_t i = 0; i < count; i++) {
            if (hash(words + i * WORDS, WORDS) == zero_hash) {
                expected[sector + i] = zero_hash;
            }
            check(sector + i, words + i * WORDS);
        }
    }
}

struct worker {
    unsigned int number;
    uint64_t state;
};

static void *work(void *opaque)
{
    struct worker *self = opaque;
    uint64_t *words = aligned_alloc(4096, MOST_BLOCKS * BLOCK_SECTORS * SECTOR);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(self->number % cpus, &set);
    sched_setaffinity(0, sizeof(set), &set);
    for (;;) {
        pthread_mutex_lock(&lock);
        while (resting) {
            pthread_cond_wait(&changed, &lock);
        }
        at_work++;
        pthread_mutex_unlock(&lock);

        operate(&self->state, self->number, words);
        atomic_fetch_add(&operations, 1);

        pthread_mutex_lock(&lock);
        at_work--;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void rest(bool wanted)
{
    pthread_mutex_lock(&lock);
    resting = wanted;
    pthread_cond_broadcast(&changed);
    while (wanted && at_work) {
        pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
}

static void command_loop(void)
{
    struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
    char command;

    for (;;) {
        if (poll(&input, 1, 250) == 0) {
            say("done %lu", operations);
            continue;
        }
        if (read(STDIN_FILENO, &command, 1) != 1) {
            return;
        }
        if (command == 'p') {
            rest(true);
            if (fsync(disk)) {
                fail("flush", 0, 0);
            }
            say("rest %016" PRIx64, read_all(true));
        } else if (command == 'r') {
            rest(false);
        }
    }
}

int main(int argc, char **argv)
{
    static const uint64_t zeroes[WORDS];
    static struct worker workers[MOST_THREADS];
    bool use = argc == 5 && !strcmp(argv[1], "use");
    off_t size;

    if (!use && !(argc == 3 && !strcmp(argv[1], "sum"))) {
        fprintf(stderr, "usage: checker sum FILE | use DISK SEED THREADS\n");
        return 2;
    }
    disk = open(argv[2], use ? O_RDWR | O_DIRECT : O_RDONLY);
    size = disk < 0 ? -1 : lseek(disk, 0, SEEK_END);
    if (size < 0) {
        perror(argv[2]);
        return 1;
    }
    sectors = size / SECTOR;
    expected = calloc(sectors, sizeof(*expected));
    zero_hash = hash(zeroes, WORDS);
    if (!use) {
        printf("%016" PRIx64 "\n", read_all(false));
        return 0;
    }

    say("begin %016" PRIx64, read_all(false));
    thread_count = atoi(argv[4]);
    if (thread_count < 1 || thread_count > MOST_THREADS) {
        thread_count = 1;
    }
    for (unsigned int i = 0; i < thread_count; i++) {
        pthread_t thread;

        workers[i].number = i;
        workers[i].state = (strtoull(argv[3], NULL, 10) << 8 | i) * 2 + 1;
        if (pthread_create(&thread, NULL, work, &workers[i])) {
            say("fail no thread");
            return 1;
        }
    }
    command_loop();
    return 0;
}
