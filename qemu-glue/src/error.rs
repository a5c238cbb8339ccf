//! Errors between the two sides: negative error numbers and `Error **`.

use std::ffi::{CStr, CString, c_int};
use std::ptr;

use rust_qcow2::{Error, Result};

use crate::sys;

/// Where C wants the text of an error.
pub(crate) type ErrorPtr = *mut *mut sys::Error;

/// What a function of QEMU returned: zero or more, or a negative error number.
#[inline]
pub(crate) fn check(ret: c_int) -> Result<c_int> {
    if ret < 0 {
        Err(Error::errno(-ret))
    } else {
        Ok(ret)
    }
}

/// The same for lengths.
#[inline]
pub(crate) fn check_len(ret: i64) -> Result<u64> {
    u64::try_from(ret).map_err(|_| Error::errno(i32::try_from(-ret).unwrap_or(libc::EIO)))
}

/// What C is told of `result`: zero, or the negative error number.
#[inline]
pub(crate) fn code(result: Result<()>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => -error.code(),
    }
}

/// Length of a text for a `%.*s`.
fn text_len(text: &str) -> c_int {
    c_int::try_from(text.len()).unwrap_or(c_int::MAX)
}

/// Sets `*errp` to what `error` says, or to the system's text behind `what`.
///
/// # Safety
/// `errp` is null or an error pointer of QEMU that is not set yet.
pub(crate) unsafe fn set(errp: ErrorPtr, error: &Error, what: &str) {
    let (text, number) = match error.message() {
        Some(text) if error.appends_errno() => (text, error.code()),
        Some(text) => (text, 0),
        None => (what, error.code()),
    };
    // SAFETY: the caller vouches for errp; the text is as long as said.
    unsafe { sys::rq_error_set(errp, number, text.as_ptr().cast(), text_len(text)) };
    // A hint to an error that ends the program is of no use.
    if let Some(hint) = error.hint().filter(|_| !errp.is_null()) {
        // SAFETY: the error was set just now.
        unsafe { sys::rq_error_hint(errp, hint.as_ptr().cast(), text_len(hint)) };
    }
}

/// Puts `text` in front of the error in `*errp`.
///
/// # Safety
/// `errp` is null or an error pointer of QEMU that is set.
pub(crate) unsafe fn prepend(errp: ErrorPtr, text: &CStr) {
    // SAFETY: as above.
    unsafe { sys::rq_error_prepend(errp, text.as_ptr()) };
}

/// Adds a line of advice to the error in `*errp`.
///
/// # Safety
/// As for [`prepend`].
pub(crate) unsafe fn append_hint(errp: ErrorPtr, text: &CStr) {
    // SAFETY: as above.
    unsafe { sys::rq_error_append_hint(errp, text.as_ptr()) };
}

/// Tells the user what `error` says, behind `what` if it has no sentence.
pub(crate) fn report(error: &Error, what: &str) {
    report_text(&error.clone().context(what.to_owned()).to_string());
}

/// Tells the user something.
pub(crate) fn report_text(text: &str) {
    // SAFETY: the text is as long as said.
    unsafe { sys::rq_error_report(text.as_ptr().cast(), text_len(text)) };
}

/// Warns the user, and says what to do about it.
pub(crate) fn warn(sentence: &str, advice: &str) {
    // SAFETY: the texts are as long as said.
    unsafe {
        sys::rq_warn_report(
            sentence.as_ptr().cast(),
            text_len(sentence),
            advice.as_ptr().cast(),
            text_len(advice),
        );
    }
}

/// Calls a function of QEMU that reports its failure through an `Error **`,
/// and makes it an error here.
pub(crate) fn caught(f: impl FnOnce(ErrorPtr) -> c_int) -> Result<c_int> {
    let mut error = ptr::null_mut();
    let ret = f(&raw mut error);
    if error.is_null() {
        return check(ret);
    }
    // SAFETY: QEMU has set the error, and it is ours now.
    let text = unsafe {
        let text = CStr::from_ptr(sys::error_get_pretty(error))
            .to_string_lossy()
            .into_owned();
        sys::error_free(error);
        text
    };
    if ret < 0 {
        Err(Error::new(-ret, text))
    } else {
        Ok(ret)
    }
}

/// A text as C wants it, cut at the first NUL.
pub(crate) fn c_text(text: &[u8]) -> CString {
    let text = text.split(|byte| *byte == 0).next();
    CString::new(text.unwrap_or_default()).unwrap_or_default()
}
