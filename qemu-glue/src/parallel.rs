//! Tasks of one request in several coroutines, and work for other threads.

use std::ffi::{c_int, c_void};
use std::panic::resume_unwind;
use std::vec;

use parking_lot::Mutex;
use rust_qcow2::host::Task;
use rust_qcow2::{Error, Result};

use crate::panic::{Payload, catch};
use crate::sys;

/// What the coroutines of one call share. It lives in the frame of [`run`],
/// which is not left before the last coroutine has ended.
struct Pool<'a>(Mutex<State<'a>>);

/// All coroutines of a pool run in the `AioContext` of the caller, so nobody
/// waits for the lock on it; it is never held while a task runs.
struct State<'a> {
    tasks: vec::IntoIter<Task<'a>>,
    /// The first failure; no task is started after it.
    error: Option<Error>,
    /// The first panic, to go on in the caller.
    panic: Option<Payload>,
    /// Coroutines that have not ended.
    running: usize,
    /// The caller, once it has nothing to do but wait.
    waiting: Option<Caller>,
}

struct Caller(*mut sys::Coroutine);

// SAFETY: coroutines may be woken from any thread.
unsafe impl Send for Caller {}

impl Pool<'_> {
    /// Runs tasks until there is none left that may be started.
    fn work(&self) {
        while let Some(task) = self.next() {
            let result = catch(task);
            let mut state = self.0.lock();
            match result {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    state.error.get_or_insert(error);
                }
                Err(payload) => {
                    state.panic.get_or_insert(payload);
                }
            }
        }
    }
}

impl<'a> Pool<'a> {
    fn next(&self) -> Option<Task<'a>> {
        let mut state = self.0.lock();
        if state.error.is_some() || state.panic.is_some() {
            return None;
        }
        state.tasks.next()
    }
}

/// Runs `tasks`, up to `workers` at a time; see [`rust_qcow2::host::Host`].
/// Called in a coroutine, which works along.
pub(crate) fn run(workers: usize, tasks: Vec<Task<'_>>) -> Result<()> {
    let helpers = workers.min(tasks.len()).saturating_sub(1);
    if helpers == 0 {
        return tasks.into_iter().try_for_each(|task| task());
    }
    let pool = Pool(Mutex::new(State {
        tasks: tasks.into_iter(),
        error: None,
        panic: None,
        running: helpers,
        waiting: None,
    }));
    for _ in 0..helpers {
        // SAFETY: the pool stays where it is and lives until `running` is zero;
        // the coroutine runs at once, until it waits for something.
        unsafe {
            let opaque = (&raw const pool).cast_mut().cast();
            sys::qemu_coroutine_enter(sys::qemu_coroutine_create(Some(help), opaque));
        }
    }
    pool.work();
    wait(&pool);

    let state = pool.0.into_inner();
    if let Some(payload) = state.panic {
        resume_unwind(payload);
    }
    state.error.map_or(Ok(()), Err)
}

/// Waits until all helpers have ended.
fn wait(pool: &Pool<'_>) {
    loop {
        {
            let mut state = pool.0.lock();
            if state.running == 0 {
                return;
            }
            // SAFETY: `run` is called in a coroutine.
            state.waiting = Some(Caller(unsafe { sys::qemu_coroutine_self() }));
        }
        // SAFETY: in a coroutine; the last helper enters it again.
        unsafe { sys::qemu_coroutine_yield() };
    }
}

unsafe extern "C" fn help(opaque: *mut c_void) {
    // SAFETY: the pointer is that of `run`, which waits for this coroutine.
    let pool = unsafe { &*opaque.cast_const().cast::<Pool<'_>>() };
    pool.work();
    let woken = {
        let mut state = pool.0.lock();
        state.running -= 1;
        if state.running == 0 {
            state.waiting.take()
        } else {
            None
        }
    };
    // The pool may be gone once the caller runs.
    if let Some(Caller(coroutine)) = woken {
        // SAFETY: it waits in `wait` for just this. It is entered when this
        // coroutine ends, as both have the same AioContext.
        unsafe { sys::aio_co_wake(coroutine) };
    }
}

/// Work for a thread of the pool, and what came of it.
struct Job<F, T> {
    work: Option<F>,
    result: Option<std::result::Result<T, Payload>>,
}

/// Runs `work` in a thread of QEMU's pool while the coroutine that calls this
/// waits.
pub(crate) fn offload<T: Send, F: FnOnce() -> T + Send>(work: F) -> T {
    let mut job = Job {
        work: Some(work),
        result: None,
    };
    // SAFETY: in a coroutine, which waits until the function has returned, so
    // the job outlives it; nobody else uses the job meanwhile.
    unsafe { sys::thread_pool_submit_co(Some(run_job::<T, F>), (&raw mut job).cast()) };
    match job.result {
        Some(Ok(result)) => result,
        Some(Err(payload)) => resume_unwind(payload),
        // The pool runs what it was given.
        None => panic!("the thread pool did not run its work"),
    }
}

unsafe extern "C" fn run_job<T, F: FnOnce() -> T>(opaque: *mut c_void) -> c_int {
    // SAFETY: the pointer is that of `offload`, which waits for this function.
    let job = unsafe { &mut *opaque.cast::<Job<F, T>>() };
    job.result = job.work.take().map(catch);
    0
}
