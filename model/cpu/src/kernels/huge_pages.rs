//! Memory for data that is read completely for every token. It is in large pages where the system has them, because
//! looking up small pages costs a tenth of the bandwidth.

use std::alloc::{Layout, alloc, dealloc};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use ulmus_backend::BackendError;

use super::aligned::Line;

/// Size and alignment of a large page.
const LARGE: usize = 2 << 20;

/// A fixed number of lines.
pub(super) struct Pages {
    lines: NonNull<Line>,
    len: usize,
}

// SAFETY: `Pages` owns its memory exclusively, and lines are plain data.
unsafe impl Send for Pages {}
// SAFETY: a shared reference only allows reading, and lines are plain data.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `len` lines of zeros.
    #[expect(clippy::cast_ptr_alignment, reason = "the layout is that of lines")]
    pub(super) fn zeroed(len: usize) -> Result<Self, BackendError> {
        if len == 0 {
            return Ok(Self { lines: NonNull::dangling(), len });
        }
        let bytes = len.saturating_mul(size_of::<Line>());
        let layout = Self::layout(bytes).ok_or(BackendError::OutOfMemory { bytes })?;
        // SAFETY: the layout is not of size zero, because `len` is not 0.
        let memory = unsafe { alloc(layout) };
        let lines = NonNull::new(memory.cast::<Line>()).ok_or(BackendError::OutOfMemory { bytes })?;
        #[cfg(target_os = "linux")]
        if layout.align() == LARGE {
            // This is only advice: if the system ignores it, the memory works as well.
            // SAFETY: the range is the whole allocation, and this kind of advice does not change its contents.
            unsafe { libc::madvise(memory.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // Writing the zeros maps the pages now, so that a lack of memory shows here and not at the first token.
        // SAFETY: the allocation has `bytes` bytes.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { lines, len })
    }

    fn layout(bytes: usize) -> Option<Layout> {
        let align = if bytes >= LARGE { LARGE } else { align_of::<Line>() };
        Layout::from_size_align(bytes, align).ok()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let (1.., Some(layout)) = (self.len, Self::layout(self.len * size_of::<Line>())) {
            // SAFETY: `zeroed` allocated the memory with the same layout, which depends on the length alone.
            unsafe { dealloc(self.lines.as_ptr().cast(), layout) };
        }
    }
}

impl Deref for Pages {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: `zeroed` has allocated and written `len` lines, which are plain data.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: `zeroed` has allocated and written `len` lines, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} lines)", self.len)
    }
}
