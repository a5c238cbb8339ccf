/*
 * What only C can do for the rqcow2 driver; see shim.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "shim.h"
#include "layout.h"
#include "block/aio-wait.h"
#include "block/crypto.h"
#include "block/graph-lock.h"
#include "qemu/coroutine_int.h"
#include "qemu/timer.h"
#include "trace/trace-block.h"

#define OPT(n, t, h) { .name = n, .type = QEMU_OPT_##t, .help = h }
#define OPT_DEFAULT(n, t, h, d) \
    { .name = n, .type = QEMU_OPT_##t, .help = h, .def_value_str = d }

QemuOptsList rq_runtime_opts = {
    .name = "rqcow2",
    .head = QTAILQ_HEAD_INITIALIZER(rq_runtime_opts.head),
    .desc = {
        OPT("lazy-refcounts", BOOL, "Postpone refcount updates"),
        OPT("pass-discard-request", BOOL,
            "Pass guest discard requests to the layer below"),
        OPT("pass-discard-snapshot", BOOL,
            "Generate discard requests when snapshot related space is freed"),
        OPT("pass-discard-other", BOOL,
            "Generate discard requests when other clusters are freed"),
        OPT("discard-no-unref", BOOL,
            "Do not unreference discarded clusters"),
        OPT("overlap-check", STRING,
            "Selects which overlap checks to perform from a range of "
            "templates (none, constant, cached, all)"),
        OPT("overlap-check.template", STRING,
            "Selects which overlap checks to perform from a range of "
            "templates (none, constant, cached, all)"),
        OPT("overlap-check.main-header", BOOL,
            "Check for unintended writes into the main qcow2 header"),
        OPT("overlap-check.active-l1", BOOL,
            "Check for unintended writes into the active L1 table"),
        OPT("overlap-check.active-l2", BOOL,
            "Check for unintended writes into an active L2 table"),
        OPT("overlap-check.refcount-table", BOOL,
            "Check for unintended writes into the refcount table"),
        OPT("overlap-check.refcount-block", BOOL,
            "Check for unintended writes into a refcount block"),
        OPT("overlap-check.snapshot-table", BOOL,
            "Check for unintended writes into the snapshot table"),
        OPT("overlap-check.inactive-l1", BOOL,
            "Check for unintended writes into an inactive L1 table"),
        OPT("overlap-check.inactive-l2", BOOL,
            "Check for unintended writes into an inactive L2 table"),
        OPT("overlap-check.bitmap-directory", BOOL,
            "Check for unintended writes into the bitmap directory"),
        OPT("cache-size", SIZE,
            "Maximum combined metadata (L2 tables and refcount blocks) "
            "cache size"),
        OPT("l2-cache-size", SIZE, "Maximum L2 table cache size"),
        OPT("l2-cache-entry-size", SIZE, "Size of each entry in the L2 cache"),
        OPT("refcount-cache-size", SIZE, "Maximum refcount block cache size"),
        OPT("cache-clean-interval", NUMBER,
            "Clean unused cache entries after this time (in seconds)"),
        { /* end of list */ }
    },
};

const char *const rq_mutable_opts[] = {
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "overlap-check.template",
    "overlap-check.main-header",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.refcount-table",
    "overlap-check.refcount-block",
    "overlap-check.snapshot-table",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.bitmap-directory",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    NULL
};

const char *const rq_strong_runtime_opts[] = {
    "encrypt.key-secret",
    NULL
};

/* What can be set when an image is created, and amended later. */
#define COMMON_OPTIONS \
    OPT(BLOCK_OPT_SIZE, SIZE, "Virtual disk size"), \
    OPT(BLOCK_OPT_COMPAT_LEVEL, STRING, \
        "Compatibility level (v2 [0.10] or v3 [1.1])"), \
    OPT(BLOCK_OPT_BACKING_FILE, STRING, "File name of a base image"), \
    OPT(BLOCK_OPT_BACKING_FMT, STRING, "Image format of the base image"), \
    OPT(BLOCK_OPT_DATA_FILE, STRING, "File name of an external data file"), \
    OPT(BLOCK_OPT_DATA_FILE_RAW, BOOL, \
        "The external data file must stay valid as a raw image"), \
    OPT_DEFAULT(BLOCK_OPT_LAZY_REFCOUNTS, BOOL, \
                "Postpone refcount updates", "off"), \
    OPT_DEFAULT(BLOCK_OPT_REFCOUNT_BITS, NUMBER, \
                "Width of a reference count entry in bits", "16")

/*
 * The names and texts are those of the qcow2 driver: management tools and
 * "qemu-img create -o help" know them. What is not served is refused when an
 * image is created, by name.
 */
QemuOptsList rq_create_opts = {
    .name = "rqcow2-create-opts",
    .head = QTAILQ_HEAD_INITIALIZER(rq_create_opts.head),
    .desc = {
        OPT(BLOCK_OPT_ENCRYPT, BOOL,
            "Encrypt the image with format 'aes'. (Deprecated in favor of "
            BLOCK_OPT_ENCRYPT_FORMAT "=aes)"),
        OPT(BLOCK_OPT_ENCRYPT_FORMAT, STRING,
            "Encrypt the image, format choices: 'aes', 'luks'"),
        BLOCK_CRYPTO_OPT_DEF_KEY_SECRET("encrypt.",
            "ID of secret providing qcow AES key or LUKS passphrase"),
        BLOCK_CRYPTO_OPT_DEF_LUKS_CIPHER_ALG("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_CIPHER_MODE("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_IVGEN_ALG("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_IVGEN_HASH_ALG("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_HASH_ALG("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_ITER_TIME("encrypt."),
        OPT_DEFAULT(BLOCK_OPT_CLUSTER_SIZE, SIZE, "qcow2 cluster size",
                    "65536"),
        OPT_DEFAULT(BLOCK_OPT_EXTL2, BOOL, "Extended L2 tables", "off"),
        OPT(BLOCK_OPT_PREALLOC, STRING,
            "Preallocation mode (allowed values: off, metadata, falloc, "
            "full)"),
        OPT_DEFAULT(BLOCK_OPT_COMPRESSION_TYPE, STRING,
                    "Compression method used for image cluster compression",
                    "zlib"),
        COMMON_OPTIONS,
        { /* end of list */ }
    }
};

QemuOptsList rq_amend_opts = {
    .name = "rqcow2-amend-opts",
    .head = QTAILQ_HEAD_INITIALIZER(rq_amend_opts.head),
    .desc = {
        BLOCK_CRYPTO_OPT_DEF_LUKS_STATE("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_KEYSLOT("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_OLD_SECRET("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_NEW_SECRET("encrypt."),
        BLOCK_CRYPTO_OPT_DEF_LUKS_ITER_TIME("encrypt."),
        COMMON_OPTIONS,
        { /* end of list */ }
    }
};

void rq_error_set(Error **errp, int os_errno, const char *text, int len)
{
    if (os_errno) {
        error_setg_errno(errp, os_errno, "%.*s", len, text);
    } else {
        error_setg(errp, "%.*s", len, text);
    }
}

void rq_error_hint(Error **errp, const char *text, int len)
{
    error_append_hint(errp, "%.*s\n", len, text);
}

void rq_error_prepend(Error **errp, const char *text)
{
    ERRP_GUARD();
    if (*errp) {
        error_prepend(errp, "%s", text);
    }
}

void rq_error_append_hint(Error **errp, const char *text)
{
    ERRP_GUARD();
    if (*errp) {
        error_append_hint(errp, "%s\n", text);
    }
}

void rq_error_report(const char *text, int len)
{
    error_report("%.*s", len, text);
}

void rq_warn_report(const char *text, int len, const char *hint, int hint_len)
{
    warn_report("%.*s", len, text);
    error_printf("%.*s", hint_len, hint);
}

typedef struct RqCall {
    CoroutineEntry *fn;
    void *opaque;
    bool done;
} RqCall;

static void coroutine_fn rq_call_entry(void *opaque)
{
    RqCall *call = opaque;

    bdrv_graph_co_rdlock();
    call->fn(call->opaque);
    bdrv_graph_co_rdunlock();

    qatomic_store_release(&call->done, true);
    aio_wait_kick();
}

void rq_run_in_coroutine(BlockDriverState *bs, CoroutineEntry *fn, void *opaque)
{
    RqCall call = { .fn = fn, .opaque = opaque };
    AioContext *ctx;

    if (qemu_in_coroutine()) {
        fn(opaque);
        return;
    }
    ctx = bdrv_get_aio_context(bs);
    aio_co_enter(ctx, qemu_coroutine_create(rq_call_entry, &call));
    AIO_WAIT_WHILE(ctx, !qatomic_load_acquire(&call.done));
}

bool coroutine_fn rq_co_mutex_trylock(CoMutex *mutex)
{
    Coroutine *self = qemu_coroutine_self();

    if (qatomic_cmpxchg(&mutex->locked, 0, 1) != 0) {
        return false;
    }
    mutex->ctx = qemu_get_current_aio_context();
    mutex->holder = self;
    self->locks_held++;
    return true;
}

QEMUTimer *rq_timer_new(AioContext *ctx, QEMUTimerCB *cb, void *opaque)
{
    return aio_timer_new_with_attrs(ctx, QEMU_CLOCK_VIRTUAL, SCALE_MS,
                                    QEMU_TIMER_ATTR_EXTERNAL, cb, opaque);
}

void rq_timer_arm(QEMUTimer *timer, int64_t seconds)
{
    timer_mod(timer, qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL) + seconds * 1000);
}

void rq_timer_free(QEMUTimer *timer)
{
    timer_free(timer);
}

void rq_run_after(AioContext *ctx, QEMUBHFunc *func, void *opaque)
{
    if (ctx == qemu_get_current_aio_context()) {
        func(opaque);
    } else {
        aio_bh_schedule_oneshot(ctx, func, opaque);
    }
}

int coroutine_fn rq_co_pread(BdrvChild *child, int64_t offset, int64_t bytes,
                             void *buf)
{
    return bdrv_co_pread(child, offset, bytes, buf, BDRV_REQ_TRY_CACHE);
}

int coroutine_fn rq_co_pwrite(BdrvChild *child, int64_t offset, int64_t bytes,
                              const void *buf)
{
    return bdrv_co_pwrite(child, offset, bytes, buf, 0);
}

void rq_qdict_unref(QDict *qdict)
{
    qobject_unref(qdict);
}

void rq_qemu_iovec_init_buf(QEMUIOVector *qiov, void *buf, size_t len)
{
    qemu_iovec_init_buf(qiov, buf, len);
}

void rq_graph_rdlock_main_loop(void)
{
    bdrv_graph_rdlock_main_loop();
}

void rq_graph_rdunlock_main_loop(void)
{
    bdrv_graph_rdunlock_main_loop();
}

void rq_trace_open(BlockDriverState *bs)
{
    trace_rqcow2_open(bs, bs->file->bs->filename);
}

bool rq_traces_reads(void)
{
    return trace_event_get_state_backends(TRACE_RQCOW2_READ);
}

void rq_trace_read(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                   const char *what, int depth, BlockDriverState *file,
                   uint64_t host)
{
    trace_rqcow2_read(bs, offset, bytes, what, depth,
                      file ? file->filename : "-", host);
}
