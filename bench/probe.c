/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program around QEMU's block layer that bench/run talks to: it opens an
 * image and reads from it for a while each time it is asked to, so that the
 * programs that are compared take turns every fraction of a second and none
 * of them pays for opening a long chain again. It is linked by bench/build
 * from the objects of qemu-img of each build tree, with the one source file
 * exchanged: what is measured is the block layer and the driver in the
 * process, neither a transport nor a guest.
 *
 * One command a line on standard input, one line of JSON for each on standard
 * output, with the wall time and the CPU time of all threads, in seconds:
 *
 *   open OPTIONS        a -blockdev description in JSON, opened for writing
 *                       as a guest's disk is
 *   aio MODE            how files are read, for "open": threads or io_uring
 *   direct              files are read past the page cache, for "open"
 *   offsets FILE        where requests go: 64-bit numbers, host byte order
 *   places FILE         the same in files that the file driver opens, without
 *                       any image: a line for each request: offset, path
 *   pass QD             4 KiB reads, each offset once
 *   read MS QD THREADS  4 KiB reads for so many milliseconds, going on in the
 *                       list where the last call stopped; in the main loop,
 *                       or with THREADS > 0 in so many threads with an event
 *                       loop each, QD requests in each of them
 *   write N             4 KiB writes at the next N offsets of the list, one
 *                       after the other: not for images that others measure
 *   status              asks for the block status of the whole disk, through all
 *                       layers, until it ends; counts the extents
 *   spin MS THREADS     arithmetic: what several threads get of the machine
 *   tables FILE         reads pieces of files through the file driver; a line
 *                       for each piece: offset, length, path
 *   close
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "block/aio.h"
#include "block/block.h"
#include "block/qdict.h"
#include "crypto/init.h"
#include "system/block-backend.h"
#include <sys/resource.h>

#define BLOCK 4096
#define LOOK_AT_CLOCK 8

typedef struct {
    double wall;
    double cpu;
} Moment;

/* The requests of one event loop. */
typedef struct {
    AioContext *ctx;
    QemuThread thread;
    uint64_t first;     /* in the list of offsets */
    uint64_t limit;     /* how many, 0: until the deadline */
    uint64_t started;
    uint64_t done;
    int queue_depth;
    int running;        /* coroutines */
    int64_t deadline;
    int ret;
} Load;

static BlockBackend *blk;
static BlockBackend **files;    /* of each of the offsets, or NULL */
static uint64_t *offsets;
static uint64_t n_offsets;
static uint64_t position;
static int flags = BDRV_O_RDWR;
static bool writing;

static Moment now(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (Moment) {
        .wall = g_get_monotonic_time() / 1e6,
        .cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
               (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6,
    };
}

static void answer(Moment begin, uint64_t count)
{
    Moment end = now();

    printf("{\"count\": %" PRIu64 ", \"seconds\": %.6f, \"cpu\": %.6f}\n",
           count, end.wall - begin.wall, end.cpu - begin.cpu);
    fflush(stdout);
}

static void coroutine_fn requests(void *opaque)
{
    Load *load = opaque;
    void *buffer = qemu_blockalign(NULL, BLOCK);

    memset(buffer, 0x5a, BLOCK);
    while (load->ret == 0) {
        uint64_t mine = load->started;

        if (load->limit ? mine >= load->limit :
            mine % LOOK_AT_CLOCK == 0 &&
            g_get_monotonic_time() >= load->deadline) {
            break;
        }
        load->started++;
        uint64_t which = (load->first + mine) % n_offsets;
        BlockBackend *target = files ? files[which] : blk;
        uint64_t offset = offsets[which];
        int ret = writing ? blk_co_pwrite(target, offset, BLOCK, buffer, 0)
                          : blk_co_pread(target, offset, BLOCK, buffer, 0);
        if (ret < 0) {
            load->ret = ret;
        }
        load->done++;
        if (load->done % LOOK_AT_CLOCK == 0) {
            /*
             * A request that is answered at once is answered in the middle of
             * its submission, and so is the next one, until the stack ends.
             * Guests return to the event loop, too.
             */
            aio_co_schedule(qemu_get_current_aio_context(),
                            qemu_coroutine_self());
            qemu_coroutine_yield();
        }
    }
    /* What the clock told one of them goes for all. */
    load->limit = load->limit ?: MAX(load->started, 1);
    load->running--;
    qemu_vfree(buffer);
    aio_wait_kick();
}

static void run_load(Load *load)
{
    load->running = load->queue_depth;
    for (int i = 0; i < load->queue_depth; i++) {
        aio_co_enter(load->ctx, qemu_coroutine_create(requests, load));
    }
    while (load->running > 0) {
        aio_poll(load->ctx, true);
    }
}

static void *load_thread(void *opaque)
{
    Load *load = opaque;

    rcu_register_thread();
    qemu_set_current_aio_context(load->ctx);
    run_load(load);
    rcu_unregister_thread();
    return NULL;
}

static int read_blocks(int64_t ms, uint64_t limit, int queue_depth, int threads)
{
    int n = MAX(threads, 1), ret = 0;
    g_autofree Load *loads = g_new0(Load, n);
    GMainContext *contexts[16] = {};
    uint64_t count = 0;
    Moment begin;

    assert(n <= ARRAY_SIZE(contexts));
    for (int i = 0; i < n; i++) {
        loads[i] = (Load) {
            .ctx = qemu_get_aio_context(),
            .first = position + n_offsets / n * i,
            .limit = limit,
            .queue_depth = queue_depth,
        };
        if (threads) {
            GSource *source;

            /* As an IOThread does: the context belongs to a GMainContext. */
            loads[i].ctx = aio_context_new(&error_fatal);
            contexts[i] = g_main_context_new();
            source = aio_get_g_source(loads[i].ctx);
            g_source_attach(source, contexts[i]);
            g_source_unref(source);
        }
    }
    begin = now();
    for (int i = 0; i < n; i++) {
        loads[i].deadline = g_get_monotonic_time() + ms * 1000;
    }
    if (threads) {
        for (int i = 0; i < n; i++) {
            qemu_thread_create(&loads[i].thread, "load", load_thread,
                               &loads[i], QEMU_THREAD_JOINABLE);
        }
        for (int i = 0; i < n; i++) {
            qemu_thread_join(&loads[i].thread);
        }
    } else {
        run_load(&loads[0]);
    }
    for (int i = 0; i < n; i++) {
        count += loads[i].done;
        ret = ret ?: loads[i].ret;
    }
    position = (position + loads[0].done) % n_offsets;
    if (ret == 0) {
        answer(begin, count);
    }
    for (int i = 0; threads && i < n; i++) {
        aio_context_unref(loads[i].ctx);
        g_main_context_unref(contexts[i]);
    }
    return ret;
}

static BlockBackend *open_blk(const char *json)
{
    QDict *options = qobject_to(QDict,
                                qobject_from_json(json, &error_fatal));

    qdict_flatten(options);
    return blk_new_open(NULL, NULL, options, flags, &error_fatal);
}

static void load_offsets(const char *path)
{
    g_autofree char *data = NULL;
    gsize length;

    if (!g_file_get_contents(path, &data, &length, NULL) || length < 8) {
        error_report("cannot read %s", path);
        exit(1);
    }
    g_free(offsets);
    offsets = (uint64_t *)g_steal_pointer(&data);
    g_clear_pointer(&files, g_free);
    n_offsets = length / 8;
    position = 0;
}

static BlockBackend *open_file(const char *path)
{
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "file");
    qdict_put_str(options, "filename", path);
    return blk_new_open(NULL, NULL, options, flags & ~BDRV_O_RDWR,
                        &error_fatal);
}

static void load_places(const char *list)
{
    g_autoptr(GHashTable) opened = g_hash_table_new(g_str_hash, g_str_equal);
    g_autofree char *data = NULL;
    g_auto(GStrv) lines = NULL;

    if (!g_file_get_contents(list, &data, NULL, NULL) || !*data) {
        error_report("cannot read %s", list);
        exit(1);
    }
    lines = g_strsplit(g_strchomp(data), "\n", -1);
    n_offsets = g_strv_length(lines);
    offsets = g_renew(uint64_t, offsets, n_offsets);
    files = g_renew(BlockBackend *, files, n_offsets);
    for (uint64_t i = 0; i < n_offsets; i++) {
        char *path;

        offsets[i] = g_ascii_strtoull(lines[i], &path, 10);
        path++;
        files[i] = g_hash_table_lookup(opened, path);
        if (!files[i]) {
            files[i] = open_file(path);
            g_hash_table_insert(opened, path, files[i]);
        }
    }
    position = 0;
}

static int read_tables(const char *list)
{
    g_autofree char *data = NULL;
    g_auto(GStrv) lines = NULL;
    g_autofree char *last = NULL;
    BlockBackend *file = NULL;
    Moment spent = {}, begin, end;
    uint64_t count = 0;

    if (!g_file_get_contents(list, &data, NULL, NULL)) {
        error_report("cannot read %s", list);
        exit(1);
    }
    lines = g_strsplit(data, "\n", -1);
    for (char **line = lines; *line && **line; line++) {
        char *rest;
        uint64_t offset = g_ascii_strtoull(*line, &rest, 10);
        uint64_t length = g_ascii_strtoull(rest, &rest, 10);
        g_autofree void *buffer = g_malloc(length);
        int ret;

        rest++;
        if (g_strcmp0(last, rest) != 0) {
            blk_unref(file);
            file = open_file(rest);
            g_free(last);
            last = g_strdup(rest);
        }
        begin = now();
        ret = blk_pread(file, offset, length, buffer, 0);
        end = now();
        if (ret < 0) {
            return ret;
        }
        /* The time to open files is not meant. */
        spent.wall += end.wall - begin.wall;
        spent.cpu += end.cpu - begin.cpu;
        count++;
    }
    blk_unref(file);
    begin = now();
    answer((Moment) { begin.wall - spent.wall, begin.cpu - spent.cpu }, count);
    return 0;
}

static int whole_status(void)
{
    int64_t length = blk_getlength(blk), offset = 0;
    uint64_t count = 0;
    Moment begin = now();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    while (offset < length) {
        int64_t n;
        int ret;

        ret = bdrv_block_status_above(blk_bs(blk), NULL, offset,
                                      length - offset, &n, NULL, NULL);
        if (ret < 0) {
            return ret;
        }
        offset += n;
        count++;
    }
    answer(begin, count);
    return 0;
}

static void *spin_thread(void *opaque)
{
    Load *load = opaque;

    while (g_get_monotonic_time() < load->deadline) {
        for (volatile int i = 0; i < 1000; i++) {
            /* nothing */
        }
        load->done++;
    }
    return NULL;
}

static void spin(int64_t ms, int threads)
{
    Moment begin = now();
    g_autofree Load *loads = g_new0(Load, threads);
    uint64_t count = 0;

    for (int i = 0; i < threads; i++) {
        loads[i].deadline = g_get_monotonic_time() + ms * 1000;
        qemu_thread_create(&loads[i].thread, "spin", spin_thread, &loads[i],
                           QEMU_THREAD_JOINABLE);
    }
    for (int i = 0; i < threads; i++) {
        qemu_thread_join(&loads[i].thread);
        count += loads[i].done;
    }
    answer(begin, count);
}

static int command(char *line)
{
    g_auto(GStrv) words = g_strsplit(line, " ", -1);
    const char *rest = strchr(line, ' ') ? strchr(line, ' ') + 1 : "";
    guint n = g_strv_length(words);
    Moment begin = now();

    if (g_str_equal(words[0], "open")) {
        blk = open_blk(rest);
    } else if (g_str_equal(words[0], "aio") && n == 2) {
        if (bdrv_parse_aio(words[1], &flags) < 0) {
            error_report("not a way to read files: %s", words[1]);
            exit(1);
        }
    } else if (g_str_equal(words[0], "direct")) {
        flags |= BDRV_O_NOCACHE;
    } else if (g_str_equal(words[0], "offsets")) {
        load_offsets(rest);
    } else if (g_str_equal(words[0], "places")) {
        load_places(rest);
    } else if (g_str_equal(words[0], "pass") && n == 2) {
        position = 0;
        return read_blocks(0, n_offsets, atoi(words[1]), 0);
    } else if (g_str_equal(words[0], "read") && n == 4) {
        return read_blocks(atoi(words[1]), 0, atoi(words[2]), atoi(words[3]));
    } else if (g_str_equal(words[0], "write") && n == 2) {
        int ret;

        writing = true;
        ret = read_blocks(0, atoi(words[1]), 1, 0);
        writing = false;
        return ret;
    } else if (g_str_equal(words[0], "status")) {
        return whole_status();
    } else if (g_str_equal(words[0], "spin") && n == 3) {
        spin(atoi(words[1]), atoi(words[2]));
        return 0;
    } else if (g_str_equal(words[0], "tables")) {
        return read_tables(rest);
    } else if (g_str_equal(words[0], "close")) {
        blk_unref(blk);
        blk = NULL;
        bdrv_drain_all();
    } else {
        error_report("not a command: %s", line);
        exit(1);
    }
    answer(begin, 0);
    return 0;
}

int main(int argc, char **argv)
{
    g_autofree char *line = NULL;
    size_t size = 0;

    error_init(argv[0]);
    module_call_init(MODULE_INIT_TRACE);
    qemu_init_exec_dir(argv[0]);
    qemu_init_main_loop(&error_fatal);
    qcrypto_init(&error_fatal);
    module_call_init(MODULE_INIT_QOM);
    bdrv_init();

    while (getline(&line, &size, stdin) > 0) {
        int ret = command(g_strchomp(line));

        if (ret < 0) {
            error_report("%s: %s", line, strerror(-ret));
            return 1;
        }
    }
    return 0;
}
