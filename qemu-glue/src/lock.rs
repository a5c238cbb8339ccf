//! Locks that suspend a coroutine: `CoMutex`, and a queue to wait in.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr;

use lock_api::{GuardNoSend, MutexGuard};
use parking_lot::Mutex;
use rust_qcow2::host::WaitQueue;

use crate::sys;

/// QEMU's `CoMutex`. It is fair, and it may be held across I/O.
///
/// It may only be locked in a coroutine, and only be unlocked in the same one,
/// although that may run in another thread by then.
pub(crate) struct CoMutex(UnsafeCell<sys::CoMutex>);

// SAFETY: a CoMutex is made for coroutines in several threads.
unsafe impl Send for CoMutex {}
// SAFETY: as above.
unsafe impl Sync for CoMutex {}

// SAFETY: QEMU's lock is exclusive. A value that is not locked has nothing that
// points to it (its queues are empty), so it may be moved until then.
unsafe impl lock_api::RawMutex for CoMutex {
    #[allow(
        clippy::declare_interior_mutable_const,
        reason = "the trait wants it so"
    )]
    const INIT: Self = {
        // SAFETY: qemu_co_mutex_init() does no more than fill it with zeroes.
        let zeroes = unsafe { MaybeUninit::zeroed().assume_init() };
        Self(UnsafeCell::new(zeroes))
    };

    type GuardMarker = GuardNoSend;

    #[inline]
    fn lock(&self) {
        // SAFETY: all callbacks of the driver that take locks run in coroutines.
        unsafe { sys::qemu_co_mutex_lock(self.0.get()) };
    }

    #[inline]
    fn try_lock(&self) -> bool {
        // SAFETY: as above.
        unsafe { sys::rq_co_mutex_trylock(self.0.get()) }
    }

    #[inline]
    unsafe fn unlock(&self) {
        // SAFETY: the caller vouches that this coroutine holds the lock.
        unsafe { sys::qemu_co_mutex_unlock(self.0.get()) };
    }
}

/// Coroutines that wait for an event.
///
/// QEMU's `CoQueue` points to itself and would have to be pinned; here the
/// queue is a list through the stacks of those that wait, newest first.
#[derive(Default)]
pub(crate) struct Queue(Mutex<Head>);

struct Head(*const Waiter);

/// One that waits. It lives in the frame of [`Queue::wait`], which is not left
/// before the coroutine is woken.
struct Waiter {
    coroutine: *mut sys::Coroutine,
    next: *const Waiter,
}

impl Default for Head {
    fn default() -> Self {
        Self(ptr::null())
    }
}

// SAFETY: the list is only touched under the lock around it, and its elements
// stay until they are taken out under that lock.
unsafe impl Send for Head {}

impl WaitQueue<CoMutex> for Queue {
    fn wait<T>(&self, guard: &mut MutexGuard<'_, CoMutex, T>) {
        // SAFETY: called in a coroutine, as the lock was taken in one.
        let coroutine = unsafe { sys::qemu_coroutine_self() };
        let mut waiter = Waiter {
            coroutine,
            next: ptr::null(),
        };
        {
            let mut head = self.0.lock();
            waiter.next = head.0;
            head.0 = &raw const waiter;
        }
        // Once the lock is released another thread may wake this coroutine
        // before it has yielded. QEMU copes: it is then entered by its own
        // thread's event loop, that is after the yield.
        MutexGuard::unlocked(guard, || {
            // SAFETY: in a coroutine; only `wake_all` enters it again.
            unsafe { sys::qemu_coroutine_yield() };
        });
    }

    fn wake_all(&self) {
        let mut next = std::mem::take(&mut *self.0.lock()).0;
        // Oldest first.
        let mut oldest: *const Waiter = ptr::null();
        while !next.is_null() {
            let waiter = next.cast_mut();
            // SAFETY: a waiter that is in the list lives, and nobody else has
            // this part of the list any more.
            unsafe {
                next = (*waiter).next;
                (*waiter).next = oldest;
            }
            oldest = waiter;
        }
        while !oldest.is_null() {
            // SAFETY: as above, until the coroutine is woken; nothing is read
            // from it after that.
            let coroutine = unsafe {
                let waiter = &*oldest;
                oldest = waiter.next;
                waiter.coroutine
            };
            // SAFETY: it waits in `wait` for just this.
            unsafe { sys::aio_co_wake(coroutine) };
        }
    }
}
