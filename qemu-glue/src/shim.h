/*
 * What only C can do for the rqcow2 driver: macros, static inline functions
 * and option lists of QEMU, under names that Rust can call.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef RQCOW2_SHIM_H
#define RQCOW2_SHIM_H

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/coroutines.h"
#include "block/crypto.h"
#include "block/dirty-bitmap.h"
#include "block/qdict.h"
#include "block/snapshot.h"
#include "block/thread-pool.h"
#include "crypto/block.h"
#include "qapi/error.h"
#include "qapi/qapi-events-block-core.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-input-visitor.h"
#include "qapi/visitor.h"
#include "qemu/coroutine.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"

/* Options of an open image and of a new one. */
extern QemuOptsList rq_runtime_opts;
extern QemuOptsList rq_create_opts;
extern QemuOptsList rq_amend_opts;
extern const char *const rq_mutable_opts[];
extern const char *const rq_strong_runtime_opts[];

/*
 * Sets *errp to the text of len bytes, followed by a colon and the system's
 * text for os_errno unless that is 0.
 */
void rq_error_set(Error **errp, int os_errno, const char *text, int len);

/* Adds len bytes as a hint to *errp, which is set. */
void rq_error_hint(Error **errp, const char *text, int len);

/* Puts text in front of what *errp says. */
void rq_error_prepend(Error **errp, const char *text);

/* Adds a line of advice to what *errp says. */
void rq_error_append_hint(Error **errp, const char *text);

/* error_report() of len bytes. */
void rq_error_report(const char *text, int len);

/* warn_report() of len bytes, and a hint of hint_len bytes behind it. */
void rq_warn_report(const char *text, int len, const char *hint, int hint_len);

/*
 * Calls fn(opaque) in a coroutine in the AioContext of bs, with the graph
 * locked for reading, and handles events until it has returned. Where the
 * caller is in a coroutine (which then holds that lock) fn is just called.
 */
void rq_run_in_coroutine(BlockDriverState *bs, CoroutineEntry *fn,
                         void *opaque);

/* Locks mutex if that needs no waiting. */
bool coroutine_fn rq_co_mutex_trylock(CoMutex *mutex);

/* A timer in ctx in milliseconds of guest time; armed by rq_timer_arm(). */
QEMUTimer *rq_timer_new(AioContext *ctx, QEMUTimerCB *cb, void *opaque);
void rq_timer_arm(QEMUTimer *timer, int64_t seconds);
void rq_timer_free(QEMUTimer *timer);

/*
 * Calls func when whatever ctx is doing now is done: at once if it is the event
 * loop of this thread.
 */
void rq_run_after(AioContext *ctx, QEMUBHFunc *func, void *opaque);

/* Driver memory from and to a child. */
int coroutine_fn rq_co_pread(BdrvChild *child, int64_t offset, int64_t bytes,
                             void *buf);
int coroutine_fn rq_co_pwrite(BdrvChild *child, int64_t offset, int64_t bytes,
                              const void *buf);

void rq_qdict_unref(QDict *qdict);
void rq_qemu_iovec_init_buf(QEMUIOVector *qiov, void *buf, size_t len);

/* The main loop's lock on the graph, for callbacks that come without it. */
void rq_graph_rdlock_main_loop(void);
void rq_graph_rdunlock_main_loop(void);

/*
 * Trace events: that bs is open, and what serves a piece of a read from it.
 * file is where the data are, NULL where they are in none.
 */
void rq_trace_open(BlockDriverState *bs);
bool rq_traces_reads(void);
void rq_trace_read(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                   const char *what, int depth, BlockDriverState *file,
                   uint64_t host);

#endif
